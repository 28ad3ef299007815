"""Growth: a checkpoint goes on with more experts than it was saved with.

Each expert becomes `times` experts, one after the other: itself, and copies of its matrices, of its optimizer's state
and of its columns in the gates. Every weight of a copy is multiplied by 1 + noise x U(-1, 1), keyed by its name, the
number of experts and its global id, so that copies part ways, on any layout in the same way. With noise 0 and k `times`
as large the grown model computes what the saved one did: a word goes to all copies of its experts, with an equal share
of their weight.
"""

from dataclasses import dataclass
from typing import Any

import torch

from moe_dist.config.overrides import override
from moe_dist.config.schema import Config, moe_section
from moe_dist.distributed.mesh import Mesh
from moe_dist.nn import prng


@dataclass(frozen=True)
class Upcycling:
    """How a checkpoint's experts become more."""

    times: int
    noise: float  # largest relative change of a copy's weights
    seed: int

    def of(self, config: Config) -> Config:
        """The grown model's."""
        experts = moe_section(config)
        assert experts
        section, moe = experts
        return override(config, [f"{section}.num_experts={moe.num_experts * self.times}"])

    def dim(self, saved: torch.Size, wanted: torch.Size) -> int | None:
        """The dimension along which the experts of a tensor lie: `times` as large as the saved one. None where nothing
        has grown."""
        if len(saved) != len(wanted):
            return None
        other = [i for i, (a, b) in enumerate(zip(saved, wanted, strict=True)) if a != b]
        return (
            other[0]
            if len(other) == 1 and saved[other[0]] * self.times == wanted[other[0]]
            else None
        )

    def smaller(self, wanted: Any, saved: torch.Size, mesh: Mesh) -> Any:
        """Returns memory for the saved tensor from which `fill` makes `wanted`; None where it has not grown."""
        from torch.distributed.tensor import (
            DTensor,
            Replicate,
            Shard,
        )  # here: see the package's docstring

        dim = self.dim(saved, wanted.shape)
        if dim is None or not isinstance(wanted, DTensor):
            return None if dim is None else wanted.new_empty(saved)
        local, cut = list(wanted.to_local().shape), wanted.placements
        local[dim] //= self.times
        if (
            dim == 0
        ):  # experts of all replicas: an owner's part of the grown ones may begin within one
            local[0], cut = saved[0] // mesh.ep.size, (Shard(0), Replicate())
        whole = torch.empty(saved, dtype=wanted.dtype, device="meta")
        part = torch.empty(local, dtype=wanted.dtype)
        return DTensor.from_local(
            part, mesh.device_mesh, cut, shape=saved, stride=whole.stride(), run_check=False
        )

    def fill(self, wanted: Any, smaller: Any, mine: range, key: str, *, perturb: bool) -> None:
        """Makes the experts of `wanted` from those that were read. `mine`: global ids of this rank's first dimension,
        of a tensor that lies over ranks."""
        from torch.distributed.tensor import DTensor  # here: see the package's docstring

        dim = self.dim(smaller.shape, wanted.shape)
        assert dim is not None
        spread = isinstance(wanted, DTensor)
        grown = (smaller.to_local() if spread else smaller).repeat_interleave(self.times, dim)
        target = wanted.to_local() if spread else wanted
        if spread and dim == 0:
            start = mine.start % max(1, len(grown))
            grown = grown[start : start + len(mine)]
        target.copy_(grown)
        name = (
            key,
            wanted.shape[dim],
        )  # the number of experts: else a second growth would draw the same again
        if perturb and spread and dim > 0:  # gates: a row for each group of experts
            for group, part in zip(mine, target, strict=True):
                self._perturb(part, dim - 1, *name, group)
        elif perturb:
            self._perturb(target, dim, *name, first=mine.start if spread else 0)

    def _perturb(self, experts: torch.Tensor, dim: int, *key: int | str, first: int = 0) -> None:
        """Changes copies in place, keyed by `key` and their place along `dim`, which is `first` for the first one."""
        for expert, weights in enumerate(experts.unbind(dim), first):
            if expert % self.times:
                drawn = prng.uniform(weights.numel(), self.seed, "grow", *key, expert).view(
                    weights.shape
                )
                weights.mul_(1 + self.noise * (2 * drawn - 1))
