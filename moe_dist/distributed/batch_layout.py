"""Decides which rank holds which samples of a global batch."""

import math
from dataclasses import dataclass

from moe_dist.config.schema import Config, MoEConfig, mixture


def check_ep(ep: int, world: int) -> None:
    if ep < 1 or world % ep:
        divisors = [d for d in range(1, world + 1) if world % d == 0]
        raise ValueError(f"mesh.ep={ep} does not divide {world} ranks; possible: {', '.join(map(str, divisors))}")


@dataclass(frozen=True)
class Layout:
    """Which samples of the global batch lie where: micro-batch m holds `samples_per_micro_batch` consecutive samples,
    and each rank a consecutive share of those. So one rank's order of samples is the global order."""

    world: int
    samples: int
    accumulation: int
    samples_per_balance_group: int
    samples_per_token_group: int

    @property
    def samples_per_micro_batch(self) -> int:
        """Over all ranks."""
        return self.samples // self.accumulation

    @property
    def samples_per_rank(self) -> int:
        """Of one micro-batch."""
        return self.samples_per_micro_batch // self.world

    @property
    def num_balance_groups(self) -> int:
        """Of the whole batch."""
        return self.samples // self.samples_per_balance_group

    def first_sample(self, micro: int) -> int:
        """Global index of the first sample of micro-batch `micro`."""
        return micro * self.samples_per_micro_batch

    def my_samples(self, micro: int, rank: int) -> range:
        """Global indices of the samples of `rank` in micro-batch `micro`."""
        first = self.first_sample(micro) + rank * self.samples_per_rank
        return range(first, first + self.samples_per_rank)


def lay_out(config: Config, world: int) -> Layout:
    """The layout of `config` on `world` ranks. Where there is none, ValueError names the nearest legal number."""
    batch, ep = config.batch, config.mesh.ep
    check_ep(ep, world)
    experts = mixture(config)
    if experts:
        section, moe = experts
        groups = moe.num_groups if isinstance(moe, MoEConfig) else None
        key, spread = ("num_experts", moe.num_experts) if groups is None else ("num_groups", groups)
        if spread < 1 or spread % ep:
            raise ValueError(
                f"{section}.{key}={spread} is not a multiple of mesh.ep={ep}; "
                f"nearest: {_nearest_multiple(spread, ep)}, or mesh.ep={math.gcd(spread, world)}"
            )
    if batch.accumulation < 1:
        raise ValueError(f"batch.accumulation={batch.accumulation}: at least 1")
    if batch.accumulation > 1 and config.optim.free_gradients:
        raise ValueError(
            f"batch.accumulation={batch.accumulation}, but with optim.free_gradients no gradient waits for a second "
            f"micro-batch; it must be 1"
        )
    parts = batch.accumulation * world
    if batch.samples < 1 or batch.samples % parts:
        raise ValueError(
            f"batch.samples={batch.samples} is not a multiple of accumulation x ranks = "
            f"{batch.accumulation} x {world}; "
            f"nearest: {_nearest_multiple(batch.samples, parts)}"
        )
    micro = batch.samples // batch.accumulation
    balance = batch.samples if batch.samples_per_balance_group is None else batch.samples_per_balance_group
    if balance < 1 or micro % balance:
        raise ValueError(
            f"batch.samples_per_balance_group={balance} does not divide a micro-batch of {micro} samples "
            f"({batch.samples} samples / {batch.accumulation} accumulation); "
            f"nearest: {_nearest_divisor(micro, balance)}"
        )
    mine, token_group = batch.samples // parts, batch.samples_per_token_group
    if experts and experts[1].capacity_factor is not None and (token_group < 1 or mine % token_group):
        raise ValueError(
            f"batch.samples_per_token_group={token_group} does not divide a rank's micro-batch of {mine} samples; "
            f"nearest: {_nearest_divisor(mine, token_group)}"
        )
    return Layout(world, batch.samples, batch.accumulation, balance, token_group)


def _nearest_multiple(number: int, of: int) -> int:
    return max(of, round(number / of) * of)


def _nearest_divisor(number: int, to: int) -> int:
    to = min(max(to, 1), number)
    return next(d for gap in range(to) for d in (to - gap, to + gap) if number % d == 0)  # 1 is one
