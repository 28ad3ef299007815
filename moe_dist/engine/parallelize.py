"""A plain model on a mesh, changed from outside, in this order:

  1. every rank keeps the experts, or groups of experts, that the mesh says are its own;
  2. parameters, so far on the meta device, are filled: dense ones keyed by name, experts by name and global id;
  3. each MoE layer gets the exchange of the mesh, and the sums that its balance loss needs;
  4. gate, exchange and experts of each layer are timed by the mesh's clock;
  5. experts, and matrices that are updated by row (`by_row`, large vocabularies), leave the module tree: DeepSpeed
     sees dense parameters only, and `optim` updates all.

Legend: a stacked expert parameter holds this rank's experts along its first dimension.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_dist.config.schema import MeshConfig
from moe_dist.distributed.collectives import StatReducer
from moe_dist.distributed.mesh import Mesh
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher, LocalDispatcher
from moe_dist.moe.dispatch.deduplicated import per_node, per_rank
from moe_dist.moe.hierarchical import ExpertGroups, GroupProjection
from moe_dist.moe.layer import MoE
from moe_dist.monitoring.step_timer import StepTimer
from moe_dist.nn.init import init_bounds, init_parameter

DEFAULT = MeshConfig()


@dataclass(frozen=True)
class ParallelModel:
    """`dense` runs the whole model and registers its dense parameters alone; the others are held by name: matrices of
    experts, of the gates that choose within a group of experts, and by module those updated by row."""

    dense: nn.Module
    experts: dict[str, nn.Parameter]
    gates: dict[str, nn.Parameter]
    row_tables: dict[str, dict[str, nn.Parameter]]


def parallelize(
    model: nn.Module, mesh: Mesh, seed: int, dtype: torch.dtype, config: MeshConfig = DEFAULT
) -> ParallelModel:
    """`model` must be on the meta device; afterwards it is on the mesh's, in `dtype`. `config`: of the exchange.

    Raises ValueError for an exchange that the mesh cannot have."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    bounds = init_bounds(model)
    ids: dict[str, range] = {}
    for name, layer in layers.items():  # 1
        for prefix, module in layer.experts.named_modules(prefix=f"{name}.experts"):
            for key, p in module.named_parameters(recurse=False):
                ids[f"{prefix}.{key}"] = mine = mesh.local_experts(p.shape[0])
                setattr(module, key, nn.Parameter(p[mine.start : mine.stop].contiguous()))
            if isinstance(module, ExpertGroups):
                module.first_group = mesh.local_experts(layer.gate.num_experts).start
    # as `to_empty` does, whose empty_like of a meta tensor imports sympy: 0.6 CPU seconds (torch 2.13, test_startup.py)
    model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=mesh.device)).to(dtype)
    experts: dict[str, nn.Parameter] = {}
    gates: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        for prefix, module in layer.experts.named_modules(prefix=f"{name}.experts"):
            if isinstance(module, GroupProjection):
                module.to(torch.promote_types(dtype, torch.float32))
            kind = gates if isinstance(module, GroupProjection) else experts
            kind |= {f"{prefix}.{key}": p for key, p in module.named_parameters(recurse=False)}
        layer.dispatcher = build_dispatcher(  # 3
            mesh, config, layer.gate.num_experts, layer.gate.k, name
        )
        layer.stat_reducer = StatReducer(mesh)
        time_layer(layer, name, mesh.step_timer)  # 4
        layer.__dict__["experts"] = layer._modules.pop(
            "experts"
        )  # 5: an attribute, no longer a submodule
    for name, p in (experts | gates | dict(model.named_parameters())).items():
        init_parameter(p, name, bounds[name], seed, ids.get(name))  # 2
    rows: dict[str, dict[str, nn.Parameter]] = {}
    for name, module in model.named_modules():
        if getattr(module, "by_row", False):
            rows[name] = {f"{name}.{key}": p for key, p in module.named_parameters(recurse=False)}
            module.__dict__ |= module._parameters  # attributes, no longer parameters
            module._parameters.clear()
    return ParallelModel(model, experts, gates, rows)


def time_layer(layer: MoE, name: str, clock: StepTimer) -> None:
    """Its gate, exchange and experts, and those inside of groups of experts, become ranges of the clock."""
    layer.gate.forward = clock.timed("gate", layer.gate.forward, f"gate {name}")
    layer.dispatcher = clock.timed("dispatch", layer.dispatcher, f"dispatch {name}")
    experts = layer.experts
    if isinstance(experts, ExpertGroups):
        experts.run_groups = clock.timed("gate", experts.run_groups, f"gates of groups {name}")  # type: ignore[method-assign]
        experts.dispatcher = clock.timed(
            "dispatch", experts.dispatcher, f"dispatch in groups {name}"
        )  # type: ignore
        experts = experts.experts
    each = "run_experts" if hasattr(experts, "split_experts") else "forward"  # of a piece
    setattr(experts, each, clock.timed("experts", getattr(experts, each), f"experts {name}"))


def build_dispatcher(
    mesh: Mesh, config: MeshConfig, num_experts: int, k: int, layer_name: str = "moe"
) -> Any:
    """The exchange that is configured, for k of `num_experts` experts, or groups, of a token. `layer_name`: in the
    labels of its collectives. Raises ValueError where the mesh cannot have it."""
    kind = dispatcher_kind(config.dispatcher, num_experts, k, mesh.ep.size, mesh.ranks_per_node)
    wire = torch.bfloat16 if config.comm_dtype == "bf16" else None
    pieces = num_overlap_chunks(config, crosses_nodes=bool(mesh.ep.node_P))
    if kind == "local":
        return LocalDispatcher()
    if kind == "all_to_all":
        return AllToAllDispatcher(mesh.ep, pieces, wire, layer_name)
    if kind == "dedup_rank":
        return per_rank(mesh.ep, wire, pieces > 0, layer_name)
    assert mesh.intra_node
    return per_node(mesh.ep, mesh.intra_node, wire, pieces > 0, layer_name)


def dispatcher_kind(asked: str, num_experts: int, k: int, ranks: int, per_node: int) -> str:
    """ "local", or "all_to_all", "dedup_rank" or "dedup_node" as was `asked` for (`mesh.dispatcher`). "auto" is what was the fastest
    (docs/log.md, 2026-11-30): to each node once where the ranks span several nodes of several ranks evenly; else to
    each rank once, where that halves the rows at least; else plainly, for between nodes such rows may travel in pieces
    while experts run, and in a node they are as fast. Raises ValueError for "dedup_node" without such nodes."""
    evenly = 1 < per_node < ranks and ranks % per_node == 0
    if ranks == 1:
        return "local"
    if asked == "dedup_node" and not evenly:
        raise ValueError(
            f"mesh.dispatcher='dedup_node': {ranks} expert-parallel ranks do not span several nodes of {per_node} ranks "
            "evenly; give 'auto', or as mesh.ep the ranks of two nodes or more"
        )
    if asked != "auto":
        return asked
    if evenly:
        return "dedup_node"
    return "dedup_rank" if expected_blocks_visited(num_experts, k, ranks) <= k / 2 else "all_to_all"


def num_overlap_chunks(config: MeshConfig, crosses_nodes: bool) -> int:
    """Returns into how many chunks an all-to-all is cut so that experts run while rows travel, 0 for no overlap.

    The default is 4 if the expert-parallel group has ranks on several nodes, else 0.

    Args:
        config: The section `mesh` of the config, with `overlap_chunks` if the user chose a number.
        crosses_nodes: True if some expert-parallel group has ranks on more than one node.
    """
    if config.overlap_chunks is not None:
        return config.overlap_chunks
    return 4 if crosses_nodes else 0


def expected_blocks_visited(num_experts: int, k: int, blocks: int) -> float:
    """Of B blocks of experts, how many have one of the k distinct experts that a token chooses, on average, experts
    being as popular as each other: B (1 - C(E - E/B, k) / C(E, k))."""
    elsewhere = num_experts - num_experts // blocks
    return blocks * (1 - math.prod((elsewhere - i) / (num_experts - i) for i in range(k)))
