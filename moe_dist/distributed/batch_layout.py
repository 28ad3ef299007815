"""Assigns a global batch's samples to micro-batches and ranks."""

import math
from dataclasses import dataclass
from typing import Any

from moe_dist.config.schema import Config, MoEConfig, moe_section


def check_ep(ep: int, world: int) -> None:
    """Checks if `mesh.ep` divides the world size.

    Args:
        ep: The value of `mesh.ep`.
        world: World size.

    Raises:
        ValueError: It does not; the message lists all divisors.
    """
    if ep < 1 or world % ep:
        divisors = [str(d) for d in range(1, world + 1) if world % d == 0]
        raise ValueError(
            f"mesh.ep={ep} does not divide {world} ranks; possible: {', '.join(divisors)}"
        )


@dataclass(frozen=True)
class BatchLayout:
    """Splits the global batch into micro-batches, and each micro-batch into one share per rank.

    Micro-batch m contains `samples_per_micro_batch` consecutive samples, and each rank has a
    consecutive share. So a single rank's sample order is the global order.

    Attributes:
        world: World size.
        global_batch_size: Samples per step, over all ranks and micro-batches.
        grad_accum_steps: Number of micro-batches.
        balance_loss_group_size: Samples over which a balance loss is computed.
        capacity_group_size: Samples over which expert capacity is computed.
    """

    world: int
    global_batch_size: int
    grad_accum_steps: int
    balance_loss_group_size: int
    capacity_group_size: int

    @property
    def samples_per_micro_batch(self) -> int:
        """Samples in a micro-batch, over all ranks."""
        return self.global_batch_size // self.grad_accum_steps

    @property
    def samples_per_rank(self) -> int:
        """Samples on one rank in a micro-batch."""
        return self.samples_per_micro_batch // self.world

    @property
    def num_balance_groups(self) -> int:
        """Balance groups in the global batch."""
        return self.global_batch_size // self.balance_loss_group_size

    def first_sample(self, micro: int) -> int:
        """Returns the global index at which micro-batch `micro` starts."""
        return micro * self.samples_per_micro_batch

    def local_samples(self, micro: int, rank: int) -> range:
        """Returns the global sample indices of `rank` in micro-batch `micro`."""
        first = self.first_sample(micro) + rank * self.samples_per_rank
        return range(first, first + self.samples_per_rank)


def make_batch_layout(config: Config, world: int) -> BatchLayout:
    """Computes a config's batch layout.

    Args:
        config: The run's config.
        world: World size.

    Returns:
        The layout, with the defaults of the batch section filled in.

    Raises:
        ValueError: Two sizes do not fit together; the message contains the nearest valid number.
    """
    batch = config.batch
    check_ep(config.mesh.ep, world)
    section = moe_section(config)
    if section:
        _check_expert_count(*section, config.mesh.ep, world)
    if batch.grad_accum_steps < 1:
        raise ValueError(f"batch.grad_accum_steps={batch.grad_accum_steps}: use at least 1")
    if batch.grad_accum_steps > 1 and config.optim.fuse_expert_update_in_backward:
        raise ValueError(
            f"batch.grad_accum_steps={batch.grad_accum_steps} does not fit "
            "optim.fuse_expert_update_in_backward=true, which frees each gradient within the "
            "micro-batch; use batch.grad_accum_steps=1"
        )
    shares = batch.grad_accum_steps * world
    if batch.global_batch_size < 1 or batch.global_batch_size % shares:
        raise ValueError(
            f"batch.global_batch_size={batch.global_batch_size} is not a multiple of "
            f"accumulation x ranks = {batch.grad_accum_steps} x {world}; "
            f"nearest: {_nearest_multiple(batch.global_batch_size, shares)}"
        )
    micro = batch.global_batch_size // batch.grad_accum_steps
    balance = batch.balance_loss_group_size
    if balance is None:
        balance = batch.global_batch_size
    if balance < 1 or micro % balance:
        raise ValueError(
            f"batch.balance_loss_group_size={balance} does not divide a micro-batch of {micro} "
            f"samples ({batch.global_batch_size} samples / {batch.grad_accum_steps} "
            f"accumulation); nearest: {_nearest_divisor(micro, balance)}"
        )
    local = batch.global_batch_size // shares
    capacity = batch.capacity_group_size
    has_capacity = section is not None and section[1].capacity_factor is not None
    if has_capacity and (capacity < 1 or local % capacity):
        raise ValueError(
            f"batch.capacity_group_size={capacity} does not divide a rank's micro-batch of {local} "
            f"samples; nearest: {_nearest_divisor(local, capacity)}"
        )
    return BatchLayout(world, batch.global_batch_size, batch.grad_accum_steps, balance, capacity)


def _check_expert_count(section: str, moe: Any, ep: int, world: int) -> None:
    """Checks if `ep` divides the number of experts, or expert groups."""
    groups = moe.num_groups if isinstance(moe, MoEConfig) else None
    if groups is None:
        key = "num_experts"
        count = moe.num_experts
    else:
        key = "num_groups"
        count = groups
    if count < 1 or count % ep:
        raise ValueError(
            f"{section}.{key}={count} is not a multiple of mesh.ep={ep}; "
            f"nearest: {_nearest_multiple(count, ep)}, or mesh.ep={math.gcd(count, world)}"
        )


def _nearest_multiple(number: int, base: int) -> int:
    """Returns the multiple of `base`, at least `base`, nearest to `number`."""
    return max(base, round(number / base) * base)


def _nearest_divisor(number: int, target: int) -> int:
    """Returns the divisor of `number` nearest to `target`."""
    target = min(max(target, 1), number)
    for distance in range(target):  # 1 is a divisor, so the loop always returns
        for divisor in (target - distance, target + distance):
            if number % divisor == 0:
                return divisor
    raise ValueError(f"{number} has no divisor near {target}")
