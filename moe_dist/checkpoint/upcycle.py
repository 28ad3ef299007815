"""Upcycling: continues training from a checkpoint with more experts than it contains.

Each expert becomes `times` consecutive experts: the expert itself and its copies. Its matrices, its
optimizer state and its columns in the gates are copied (sparse upcycling, Komatsuzaki et al. 2022).
Every weight in a copy is multiplied by 1 + noise x U(-1, 1), so copies learn different things. The
noise is keyed by the tensor's name, the number of experts and the expert's global id, so it is the
same on every layout.

With noise 0 and `times` as many chosen experts (k), the larger model computes the same function: a
token goes to all copies of its experts, and each copy has an equal share of the gate weight.
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
    """Multiplies the number of experts when a checkpoint is loaded.

    Attributes:
        times: Experts per saved expert, 2 or more.
        noise: Largest relative change of a copy's weights, 0 to 1.
        seed: Seed for the noise.
    """

    times: int
    noise: float
    seed: int

    def grow_config(self, config: Config) -> Config:
        """Returns the larger model's config."""
        section_with_key = moe_section(config)
        assert section_with_key
        key, moe = section_with_key
        return override(config, [f"{key}.num_experts={moe.num_experts * self.times}"])

    def expert_dim(self, saved: torch.Size, wanted: torch.Size) -> int | None:
        """Finds a tensor's expert dimension.

        Args:
            saved: The tensor's shape in the checkpoint.
            wanted: The tensor's shape in the larger model.

        Returns:
            The dimension that is `times` as large; None if the shapes are equal or differ in
            another way.
        """
        if len(saved) != len(wanted):
            return None
        changed = [dim for dim in range(len(saved)) if saved[dim] != wanted[dim]]
        if len(changed) != 1:
            return None
        (dim,) = changed
        return dim if saved[dim] * self.times == wanted[dim] else None

    def empty_saved(self, wanted: Any, saved: torch.Size, mesh: Mesh) -> Any:
        """Allocates memory for a saved tensor; `fill` computes the larger one from it.

        Args:
            wanted: The larger model's tensor, complete or sharded (DTensor).
            saved: The complete tensor's shape in the checkpoint.
            mesh: The ranks.

        Returns:
            An uninitialized tensor, sharded if `wanted` is; None if the tensor has not grown.
        """
        # imported in the call: see the package's docstring
        from torch.distributed.tensor import DTensor, Replicate, Shard

        dim = self.expert_dim(saved, wanted.shape)
        if dim is None:
            return None
        if not isinstance(wanted, DTensor):
            return wanted.new_empty(saved)
        local_shape = list(wanted.to_local().shape)
        local_shape[dim] //= self.times
        placements = wanted.placements
        if dim == 0:
            # An owner's rows in the larger tensor can begin in the middle of one expert's copies,
            # so every replica reads all experts on its expert-parallel rank.
            local_shape[0] = saved[0] // mesh.ep.size
            placements = (Shard(0), Replicate())
        whole = torch.empty(saved, dtype=wanted.dtype, device="meta")
        local = torch.empty(local_shape, dtype=wanted.dtype)
        return DTensor.from_local(
            local,
            mesh.device_mesh,
            placements,
            shape=saved,
            stride=whole.stride(),
            run_check=False,
        )

    def fill(self, wanted: Any, smaller: Any, owned: range, key: str, *, perturb: bool) -> None:
        """Fills the larger model's tensor with copies of the saved experts.

        Args:
            wanted: The larger model's tensor, changed in place.
            smaller: The saved tensor, read into `empty_saved`'s memory.
            owned: Global ids of this rank's rows, for a sharded tensor.
            key: The tensor's key; it also keys the noise.
            perturb: If True, multiplies the copies by the noise (weights, not optimizer state).
        """
        from torch.distributed.tensor import DTensor  # in the call: see the package's docstring

        dim = self.expert_dim(smaller.shape, wanted.shape)
        assert dim is not None
        is_sharded = isinstance(wanted, DTensor)
        saved_local = smaller.to_local() if is_sharded else smaller
        copies = saved_local.repeat_interleave(self.times, dim)
        target = wanted.to_local() if is_sharded else wanted
        if is_sharded and dim == 0:
            start = owned.start % max(1, len(copies))
            copies = copies[start : start + len(owned)]
        target.copy_(copies)
        if not perturb:
            return
        # The key includes the number of experts: otherwise a second growth would draw the same
        # noise again.
        noise_key = (key, wanted.shape[dim])
        if is_sharded and dim > 0:  # gates, with one row per expert group
            for group, gate in zip(owned, target, strict=True):
                self._perturb(gate, dim - 1, *noise_key, group)
        else:
            self._perturb(target, dim, *noise_key, first=owned.start if is_sharded else 0)

    def _perturb(self, experts: torch.Tensor, dim: int, *key: int | str, first: int = 0) -> None:
        """Multiplies the copies along `dim` by the noise, in place; ids start at `first`."""
        for expert, weights in enumerate(experts.unbind(dim), first):
            if expert % self.times:  # the first of `times` experts stays as it was saved
                uniform = prng.uniform(weights.numel(), self.seed, "grow", *key, expert)
                weights.mul_(1 + self.noise * (2 * uniform.view(weights.shape) - 1))
