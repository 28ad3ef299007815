"""Decides which rank holds which samples of a global batch."""

import math
from dataclasses import dataclass

from moe_dist.config.schema import Config, MoEConfig, moe_section


def check_ep(ep: int, world: int) -> None:
    if ep < 1 or world % ep:
        divisors = [d for d in range(1, world + 1) if world % d == 0]
        raise ValueError(
            f"mesh.ep={ep} does not divide {world} ranks; possible: {', '.join(map(str, divisors))}"
        )


@dataclass(frozen=True)
class BatchLayout:
    """Which samples of the global batch lie where: micro-batch m holds `samples_per_micro_batch` consecutive samples,
    and each rank a consecutive share of those. So one rank's order of samples is the global order."""

    world: int
    global_batch_size: int
    grad_accum_steps: int
    balance_loss_group_size: int
    capacity_group_size: int

    @property
    def samples_per_micro_batch(self) -> int:
        """Over all ranks."""
        return self.global_batch_size // self.grad_accum_steps

    @property
    def samples_per_rank(self) -> int:
        """Of one micro-batch."""
        return self.samples_per_micro_batch // self.world

    @property
    def num_balance_groups(self) -> int:
        """Of the whole batch."""
        return self.global_batch_size // self.balance_loss_group_size

    def first_sample(self, micro: int) -> int:
        """Global index of the first sample of micro-batch `micro`."""
        return micro * self.samples_per_micro_batch

    def local_samples(self, micro: int, rank: int) -> range:
        """Global indices of the samples of `rank` in micro-batch `micro`."""
        first = self.first_sample(micro) + rank * self.samples_per_rank
        return range(first, first + self.samples_per_rank)


def make_batch_layout(config: Config, world: int) -> BatchLayout:
    """The layout of `config` on `world` ranks. Where there is none, ValueError names the nearest legal number."""
    batch, ep = config.batch, config.mesh.ep
    check_ep(ep, world)
    experts = moe_section(config)
    if experts:
        section, moe = experts
        groups = moe.num_groups if isinstance(moe, MoEConfig) else None
        key, spread = ("num_experts", moe.num_experts) if groups is None else ("num_groups", groups)
        if spread < 1 or spread % ep:
            raise ValueError(
                f"{section}.{key}={spread} is not a multiple of mesh.ep={ep}; "
                f"nearest: {_nearest_multiple(spread, ep)}, or mesh.ep={math.gcd(spread, world)}"
            )
    if batch.grad_accum_steps < 1:
        raise ValueError(f"batch.grad_accum_steps={batch.grad_accum_steps}: at least 1")
    if batch.grad_accum_steps > 1 and config.optim.fuse_expert_update_in_backward:
        raise ValueError(
            f"batch.grad_accum_steps={batch.grad_accum_steps}, but with optim.fuse_expert_update_in_backward no gradient waits for a second "
            f"micro-batch; it must be 1"
        )
    parts = batch.grad_accum_steps * world
    if batch.global_batch_size < 1 or batch.global_batch_size % parts:
        raise ValueError(
            f"batch.global_batch_size={batch.global_batch_size} is not a multiple of accumulation x ranks = "
            f"{batch.grad_accum_steps} x {world}; "
            f"nearest: {_nearest_multiple(batch.global_batch_size, parts)}"
        )
    micro = batch.global_batch_size // batch.grad_accum_steps
    balance = (
        batch.global_batch_size
        if batch.balance_loss_group_size is None
        else batch.balance_loss_group_size
    )
    if balance < 1 or micro % balance:
        raise ValueError(
            f"batch.balance_loss_group_size={balance} does not divide a micro-batch of {micro} samples "
            f"({batch.global_batch_size} samples / {batch.grad_accum_steps} accumulation); "
            f"nearest: {_nearest_divisor(micro, balance)}"
        )
    mine, token_group = batch.global_batch_size // parts, batch.capacity_group_size
    if (
        experts
        and experts[1].capacity_factor is not None
        and (token_group < 1 or mine % token_group)
    ):
        raise ValueError(
            f"batch.capacity_group_size={token_group} does not divide a rank's micro-batch of {mine} samples; "
            f"nearest: {_nearest_divisor(mine, token_group)}"
        )
    return BatchLayout(world, batch.global_batch_size, batch.grad_accum_steps, balance, token_group)


def _nearest_multiple(number: int, of: int) -> int:
    return max(of, round(number / of) * of)


def _nearest_divisor(number: int, to: int) -> int:
    to = min(max(to, 1), number)
    return next(d for gap in range(to) for d in (to - gap, to + gap) if number % d == 0)  # 1 is one
