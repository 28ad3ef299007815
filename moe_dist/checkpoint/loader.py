"""Reads a run's state with all ranks, on any layout.

torch.distributed.checkpoint reads the safetensors files; reading them executes no code.
"""

from pathlib import Path
from typing import Any

import torch

from moe_dist.checkpoint.format import (
    STATE_SUFFIXES,
    check_shape,
    check_values,
    read_state,
    tensor_index,
)
from moe_dist.checkpoint.run_tensors import TaskState, as_shard, row_tensors, stack_tensors
from moe_dist.checkpoint.upcycle import Upcycling
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed import Engine
from moe_dist.optim.expert_state import ShardedExpertParam
from moe_dist.optim.optimizer import Optimizer


def load(
    checkpoint: Path, engine: Engine, task: TaskState, mesh: Mesh, growth: Upcycling | None = None
) -> None:
    """Loads a run's complete state, on any layout. A collective.

    It fills parameters, float32 masters, optimizer state and the task's state. It overwrites all
    state from earlier steps.

    Args:
        checkpoint: A complete checkpoint's folder.
        engine: The engine, changed in place.
        task: The task; its state is changed in place.
        mesh: The ranks.
        growth: Upcycling, if the engine has more experts than the checkpoint.

    Raises:
        ValueError: On every rank, before anything is changed: a file is damaged; or a tensor is
            missing, has overlapping parts, is not finite, or has another shape or dtype. The
            message has its key.
    """
    import torch.distributed.checkpoint as dcp  # in the call: see the package's docstring

    optimizer = engine.optimizer
    state = read_state(checkpoint)
    unmanaged = _UnmanagedTensors(optimizer, mesh)
    dense = engine.empty_dense_state()
    task_state = {key: torch.empty_like(t, device="cpu") for key, t in task.save_state().items()}
    wanted = dict(unmanaged.to_read)
    wanted |= {f"dense/{key}": tensor for key, tensor in dense.items()}
    wanted |= {f"task/{key}": tensor for key, tensor in task_state.items()}
    index = tensor_index(checkpoint)

    smaller: dict[str, Any] = {}  # tensors with fewer experts in the checkpoint
    if growth:
        for key, tensor in wanted.items():
            if key in index and (key in unmanaged.owned_ids or ".gate." in key):
                saved = growth.empty_saved(tensor, index[key].size, mesh)
                if saved is not None:
                    smaller[key] = saved
    to_read = wanted | smaller
    for key, tensor in to_read.items():
        check_shape(checkpoint, index, key, tensor)
    check_values(checkpoint, wanted, mesh.checkpoint_group)
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    dcp.load(to_read, storage_reader=reader, process_group=mesh.checkpoint_group)

    for key, saved in smaller.items():
        assert growth
        owned = unmanaged.owned_ids.get(key, range(0))
        is_weight = not key.endswith(STATE_SUFFIXES)
        growth.fill(wanted[key], saved, owned, key, perturb=is_weight)
    unmanaged.copy_from_cpu()
    optimizer.updates = state["updates"]
    optimizer.previous_norm = state["previous_norm"]
    engine.load_dense_state(dense, optimizer.updates)
    optimizer.round_masters()
    task.load_state(task_state)


def load_matching_weights(
    checkpoint: Path, engine: Engine, mesh: Mesh, new: tuple[str, ...] = ()
) -> tuple[int, list[str]]:
    """Loads the weights with equal name and complete shape, on any layout. A collective.

    Args:
        checkpoint: A complete checkpoint's folder.
        engine: A new engine. Other weights stay as they are.
        mesh: The ranks.
        new: Name prefixes that are never loaded, such as ("head.",).

    Returns:
        The number of loaded weights, and the other weights' names.

    Raises:
        ValueError: On every rank, before anything is changed: a file is damaged, no weight matches,
            or a matching weight has overlapping parts, is not finite or has another dtype. The
            message has its key.
    """
    import torch.distributed.checkpoint as dcp  # in the call: see the package's docstring

    optimizer = engine.optimizer
    unmanaged = _UnmanagedTensors(optimizer, mesh)
    dense = {key: tensor.to("cpu", copy=True) for key, tensor in engine.dense_state()}
    wanted = dict(unmanaged.to_read)
    wanted |= {f"dense/{key}": tensor for key, tensor in dense.items()}
    index = tensor_index(checkpoint)

    matching: dict[str, Any] = {}
    others: list[str] = []
    for key, tensor in wanted.items():
        if key.endswith(STATE_SUFFIXES):
            continue
        name = key.partition("/")[2]
        same_shape = key in index and tuple(index[key].size) == tuple(tensor.shape)
        if same_shape and not name.startswith(new):
            matching[key] = tensor
        else:
            others.append(name)
    if not matching:
        raise ValueError(
            f"{checkpoint}: no weight has the name and shape of a weight of this model; check that "
            "it is a run of a similar model"
        )
    check_values(checkpoint, matching, mesh.checkpoint_group)
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    dcp.load(matching, storage_reader=reader, process_group=mesh.checkpoint_group)

    unmanaged.copy_from_cpu()
    engine.load_dense_state(dense, optimizer.updates)
    optimizer.round_masters()
    return len(matching), others


class _UnmanagedTensors:
    """The tensors not managed by DeepSpeed, ready to be filled from a checkpoint.

    Attributes:
        to_read: The tensors on CPU, by key; this rank's rows of a stack are a DTensor.
        owned_ids: Global ids of this rank's rows, by stack key.
    """

    def __init__(self, optimizer: Optimizer, mesh: Mesh) -> None:
        """Copies the tensors to CPU, except those already there.

        Args:
            optimizer: Their optimizer.
            mesh: The ranks.
        """
        self.to_read: dict[str, Any] = {}
        self.owned_ids: dict[str, range] = {}
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []  # (tensor, the same on CPU)
        for key, (tensor, param) in stack_tensors(optimizer).items():
            on_cpu = tensor.cpu()
            self.to_read[key] = as_shard(on_cpu, param, mesh)
            self.owned_ids[key] = _owned_ids(param, mesh)
            self._pairs.append((tensor, on_cpu))
        for key, tensor in row_tensors(optimizer).items():
            on_cpu = tensor.cpu()
            self.to_read[key] = on_cpu
            self._pairs.append((tensor, on_cpu))

    def copy_from_cpu(self) -> None:
        """Copies the values read on CPU to the optimizer's tensors."""
        for tensor, on_cpu in self._pairs:
            tensor.copy_(on_cpu)


def _owned_ids(param: ShardedExpertParam, mesh: Mesh) -> range:
    """Returns the global ids of this rank's owned experts or groups."""
    first = mesh.ep.index * len(param.p)
    return range(first + param.owned.start, first + param.owned.stop)
