"""Chooses a layer's dispatcher from the config and the mesh.

kind          a token's row is sent
local         never: there is one expert-parallel rank
all_to_all    once for each chosen expert
dedup_rank    once to each rank with a chosen expert
dedup_node    once to each node with a chosen expert, and from there to the node's ranks
"""

import math

import torch

from moe_dist.config.schema import MeshConfig
from moe_dist.distributed.mesh import Mesh
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.deduplicated import per_node, per_rank
from moe_dist.moe.dispatch.local import LocalDispatcher
from moe_dist.moe.interfaces import Dispatcher


def build_dispatcher(
    mesh: Mesh, config: MeshConfig, num_experts: int, k: int, layer_name: str = "moe"
) -> Dispatcher:
    """Builds the configured dispatcher.

    Args:
        mesh: The ranks.
        config: The config's section `mesh`.
        num_experts: Number of experts, or expert groups, the gate chooses from.
        k: Experts or groups per token.
        layer_name: The layer's name, for its collectives' labels.

    Returns:
        The dispatcher of the kind that `dispatcher_kind` returns. One expert-parallel rank always
        gets a `LocalDispatcher`.

    Raises:
        ValueError: The mesh cannot have this dispatcher.
    """
    kind = dispatcher_kind(config.dispatcher, num_experts, k, mesh.ep.size, mesh.ranks_per_node)
    comm_dtype = torch.bfloat16 if config.comm_dtype == "bf16" else None
    num_chunks = num_overlap_chunks(config, crosses_nodes=bool(mesh.ep.node_P))
    delay_wgrad = num_chunks > 0
    if kind == "local":
        return LocalDispatcher()
    if kind == "all_to_all":
        return AllToAllDispatcher(mesh.ep, num_chunks, comm_dtype, layer_name)
    if kind == "dedup_rank":
        return per_rank(mesh.ep, comm_dtype, delay_wgrad, layer_name)
    assert mesh.intra_node
    return per_node(mesh.ep, mesh.intra_node, comm_dtype, delay_wgrad, layer_name)


def dispatcher_kind(
    configured: str, num_experts: int, k: int, num_ranks: int, ranks_per_node: int
) -> str:
    """Chooses the kind of dispatcher for a layer.

    "auto" is the fastest kind in measurements (docs/log.md, 2026-11-30): "dedup_node" if the ranks
    span several nodes of several ranks evenly; else "dedup_rank" if it sends at most half the rows;
    else "all_to_all", which overlaps chunks between nodes with the experts and is as fast within a
    node.

    Args:
        configured: The config's `mesh.dispatcher`.
        num_experts: Number of experts, or expert groups, the gate chooses from.
        k: Experts or groups per token.
        num_ranks: Expert-parallel ranks.
        ranks_per_node: Ranks on each node.

    Returns:
        "local" for one rank; else `configured`, or for "auto" one of "all_to_all", "dedup_rank" and
        "dedup_node".

    Raises:
        ValueError: "dedup_node" is configured and the ranks do not span several nodes evenly.
    """
    spans_nodes_evenly = 1 < ranks_per_node < num_ranks and num_ranks % ranks_per_node == 0
    if num_ranks == 1:
        return "local"
    if configured == "dedup_node" and not spans_nodes_evenly:
        raise ValueError(
            f"mesh.dispatcher='dedup_node': {num_ranks} expert-parallel ranks do not span several "
            f"nodes of {ranks_per_node} ranks evenly; use 'auto', or set mesh.ep to the number of "
            "ranks of two nodes or more"
        )
    if configured != "auto":
        return configured
    if spans_nodes_evenly:
        return "dedup_node"
    halves_the_rows = expected_blocks_visited(num_experts, k, num_ranks) <= k / 2
    return "dedup_rank" if halves_the_rows else "all_to_all"


def num_overlap_chunks(config: MeshConfig, crosses_nodes: bool) -> int:
    """Returns the number of chunks in an all-to-all overlapped with the experts.

    Args:
        config: The config's section `mesh`, with `overlap_chunks` if the user chose a number.
        crosses_nodes: True if some expert-parallel group has ranks on more than one node.

    Returns:
        `config.overlap_chunks`, or by default 4 if `crosses_nodes`, else 0; 0 is no overlap.
    """
    if config.overlap_chunks is not None:
        return config.overlap_chunks
    return 4 if crosses_nodes else 0


def expected_blocks_visited(num_experts: int, k: int, num_blocks: int) -> float:
    """Returns how many expert blocks contain one of a token's k distinct experts, on average.

    If E equally popular experts form B equal blocks, it is B (1 - C(E - E/B, k) / C(E, k)).
    """
    elsewhere = num_experts - num_experts // num_blocks
    none_here = math.prod((elsewhere - i) / (num_experts - i) for i in range(k))
    return num_blocks * (1 - none_here)
