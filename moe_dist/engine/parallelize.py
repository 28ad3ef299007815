"""Makes a plain model parallel.

`parallelize` changes a model in four steps, in this order:

  1. keep_local_experts    every rank keeps the experts, or expert groups, assigned to it by the
                           mesh
  2. fill_parameters       parameters move from the meta device to memory and get their initial
                           values: dense ones keyed by name, experts by name and global id, so every
                           layout starts with the same values
  3. connect               each MoE layer gets the mesh's dispatcher, and its sums over ranks
  4. time_layer            the mesh's step timer times each layer's gate, dispatcher and experts

Experts stay in the module tree: `parameters()`, `state_dict()` and `.to()` include this rank's
experts. `ParallelModel` lists the parameters by how they are reduced and updated;
`engine.deepspeed` gives DeepSpeed only the dense ones.

Legend: a stacked expert parameter holds this rank's experts along its first dimension.
"""

from dataclasses import dataclass

import torch
from torch import nn

from moe_dist.config.schema import MeshConfig
from moe_dist.distributed.collectives import StatReducer
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.dispatcher_choice import build_dispatcher
from moe_dist.moe.hierarchical import ExpertGroups, GroupProjection
from moe_dist.moe.layer import MoE
from moe_dist.monitoring.step_timer import StepTimer
from moe_dist.nn.init import init_bounds, init_parameter

DEFAULT = MeshConfig()


@dataclass(frozen=True)
class ParallelModel:
    """This rank's model, and its parameters by how they are reduced and updated.

    Attributes:
        module: The whole model, with this rank's experts.
        experts: Stacked expert weights by name.
        group_gates: Stacked gates inside expert groups, by name.
        row_tables: For each module with `by_row` (a vocabulary updated row by row), its parameters
            by name.
    """

    module: nn.Module
    experts: dict[str, nn.Parameter]
    group_gates: dict[str, nn.Parameter]
    row_tables: dict[str, dict[str, nn.Parameter]]

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Returns, by name, the parameters equal on all ranks; DeepSpeed shards them."""
        others = {*self.experts, *self.group_gates}
        for table in self.row_tables.values():
            others |= table.keys()
        return {name: p for name, p in self.module.named_parameters() if name not in others}


def parallelize(
    model: nn.Module, mesh: Mesh, seed: int, dtype: torch.dtype, config: MeshConfig = DEFAULT
) -> ParallelModel:
    """Makes a plain model parallel, in place.

    Args:
        model: The model on the meta device, with all experts.
        mesh: The ranks.
        seed: Seed for the initial weights.
        dtype: Dtype for parameters and activations.
        config: The config's section `mesh`, for the dispatcher.

    Returns:
        The model on the mesh's device, with this rank's experts.

    Raises:
        ValueError: The mesh cannot have the configured dispatcher.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    bounds = init_bounds(model)
    expert_ids: dict[str, range] = {}
    for name, layer in layers.items():
        expert_ids |= keep_local_experts(layer, name, mesh)
    fill_parameters(model, mesh, seed, dtype, bounds, expert_ids)
    for name, layer in layers.items():
        connect(layer, name, mesh, config)
        time_layer(layer, name, mesh.step_timer)
    return _by_update(model, layers)


def keep_local_experts(layer: MoE, name: str, mesh: Mesh) -> dict[str, range]:
    """Replaces each stacked parameter in a layer's experts by this rank's part.

    Args:
        layer: The layer, with all experts.
        name: Its name in the model.
        mesh: The ranks.

    Returns:
        Each parameter's global expert (or group) ids, by parameter name.
    """
    ids = {}
    experts = layer.get_submodule("experts")
    for prefix, module in experts.named_modules(prefix=f"{name}.experts"):
        for key, p in module.named_parameters(recurse=False):
            local = mesh.local_experts(p.shape[0])
            ids[f"{prefix}.{key}"] = local
            setattr(module, key, nn.Parameter(p[local.start : local.stop].contiguous()))
        if isinstance(module, ExpertGroups):
            module.first_group = mesh.local_experts(layer.gate.num_experts).start
    return ids


def fill_parameters(
    model: nn.Module,
    mesh: Mesh,
    seed: int,
    dtype: torch.dtype,
    bounds: dict[str, float],
    expert_ids: dict[str, range],
) -> None:
    """Gives every parameter memory on the mesh's device, and its initial value.

    Args:
        model: The model on the meta device.
        mesh: The ranks.
        seed: Seed for the initial weights.
        dtype: Dtype for the parameters; gates inside expert groups have float32 or wider.
        bounds: Bound for each parameter's uniform distribution, by name.
        expert_ids: Each stacked parameter's global expert ids, by name.
    """
    # FENCE. Replaces `to_empty`, whose empty_like on a meta tensor imports sympy: 0.6 CPU seconds
    # (torch 2.13, held by test_startup.py)
    model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=mesh.device)).to(dtype)
    for module in model.modules():
        if isinstance(module, GroupProjection):
            module.to(torch.promote_types(dtype, torch.float32))
    for name, p in model.named_parameters():
        init_parameter(p, name, bounds[name], seed, expert_ids.get(name))


def connect(layer: MoE, name: str, mesh: Mesh, config: MeshConfig) -> None:
    """Gives a layer a mesh's dispatcher and sums over ranks.

    Args:
        layer: The layer; its `dispatcher` and `stat_reducer` are replaced.
        name: The layer's name in the model, for its collectives' labels.
        mesh: The ranks.
        config: The config's section `mesh`.

    Raises:
        ValueError: The mesh cannot have the configured dispatcher.
    """
    layer.dispatcher = build_dispatcher(mesh, config, layer.gate.num_experts, layer.gate.k, name)
    layer.stat_reducer = StatReducer(mesh)


def time_layer(layer: MoE, name: str, timer: StepTimer) -> None:
    """Times a layer's gate, dispatcher and experts, and those inside expert groups."""
    timer.attach(layer.get_submodule("gate"), "gate", f"gate {name}")
    timer.attach(layer.get_submodule("dispatcher"), "dispatch", f"dispatch {name}")
    experts = layer.get_submodule("experts")
    if isinstance(experts, ExpertGroups):
        timer.attach(experts, "gate", f"gates of groups {name}")
        inner = experts.get_submodule("dispatcher")
        timer.attach(inner, "dispatch", f"dispatch in groups {name}")
        experts = experts.experts
    timer.attach(experts, "experts", f"experts {name}")


def _by_update(model: nn.Module, layers: dict[str, MoE]) -> ParallelModel:
    """Sorts the parameters by how they are reduced and updated."""
    experts: dict[str, nn.Parameter] = {}
    group_gates: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        module_of_experts = layer.get_submodule("experts")
        for prefix, module in module_of_experts.named_modules(prefix=f"{name}.experts"):
            named = {f"{prefix}.{key}": p for key, p in module.named_parameters(recurse=False)}
            if isinstance(module, GroupProjection):
                group_gates |= named
            else:
                experts |= named
    row_tables = {}
    for name, module in model.named_modules():
        if getattr(module, "by_row", False):
            row_tables[name] = {
                f"{name}.{key}": p for key, p in module.named_parameters(recurse=False)
            }
    return ParallelModel(model, experts, group_gates, row_tables)
