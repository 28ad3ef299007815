"""The tensors of a run that a checkpoint contains and that DeepSpeed does not manage.

Saving and loading (`checkpoint.saver`, `checkpoint.loader`) share these keys and shapes.
"""

from typing import TYPE_CHECKING, Protocol

import torch

from moe_dist.distributed.mesh import Mesh
from moe_dist.optim.expert_state import ShardedExpertParam
from moe_dist.optim.optimizer import Optimizer

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class TaskState(Protocol):
    """A task's tensors in a checkpoint; `tasks.task.Task` has them."""

    def save_state(self) -> dict[str, torch.Tensor]:
        """Returns the tensors by name, equal on every rank. A collective."""
        ...

    def load_state(self, saved: dict[str, torch.Tensor]) -> None:
        """Restores what `save_state` returned."""
        ...


def stack_tensors(
    optimizer: Optimizer,
) -> dict[str, tuple[torch.Tensor, ShardedExpertParam]]:
    """Returns this rank's owned rows of each global stack, with their parameter, by key.

    Stacks are the weights and the optimizer state for experts and for gates inside expert groups.
    """
    tensors: dict[str, tuple[torch.Tensor, ShardedExpertParam]] = {}
    for kind, params in (("experts", optimizer.experts), ("gates", optimizer.group_gates)):
        for name, param in params.items():
            for suffix, tensor in param.tensors(optimizer.updates).items():
                tensors[f"{kind}/{name}{suffix}"] = (tensor, param)
    return tensors


def as_shard(tensor: torch.Tensor, param: ShardedExpertParam, mesh: Mesh) -> "DTensor":
    """Returns this rank's rows of a global stack as a DTensor.

    A stack is split over the expert-parallel ranks and then over their replicas, the owners; the
    owners' parts may differ in size.
    """
    from torch.distributed.tensor import DTensor, Shard  # in the call: see the package's docstring

    num_rows = len(param.p) * mesh.ep.size
    whole = tensor.new_empty(num_rows, *tensor.shape[1:], device="meta")
    return DTensor.from_local(
        tensor,
        mesh.device_mesh,
        [Shard(0), Shard(0)],
        shape=whole.shape,
        stride=whole.stride(),
        run_check=False,
    )


def row_tensors(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Returns the tables with one row per word by key; every rank holds them completely."""
    tensors: dict[str, torch.Tensor] = {}
    for table in optimizer.row_tables.values():
        for name, tensor in table.tensors().items():
            tensors[f"rows/{name}"] = tensor
    return tensors
