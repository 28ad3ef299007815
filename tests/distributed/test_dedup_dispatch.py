"""Deduplicated dispatch: bytes by hand and next to all-to-all. test_parity.py and
test_hierarchical.py compare values and gradients.

Four ranks with two experts each, two of them a node: experts 0 to 3 on the first node.
"""

import os
from typing import Any

import pytest
import torch

from moe_dist.config.schema import MeshConfig
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.spawn import run_distributed
from moe_dist.engine.dispatcher_choice import build_dispatcher
from moe_dist.moe.routing import Routing, build_routing
from moe_dist.nn.token_context import TokenContext

pytestmark = pytest.mark.timeout(150)

DIM = 8
ROW = DIM * 4  # bytes
EACH = 4 + 2 * 4  # of an assignment: its weight; its row and its expert there
# rank -> its tokens' experts
CHOSEN = {
    0: [[0, 1, 2], [2, 4, 5], [4, 6, 7], [3, 2, 0]],
    1: [[6, 7, 5]],
    2: [],
    3: [[1, 2, 3], [7, 6, 4]],
}


class Scale:
    """Expert i multiplies by 1 + i."""

    needs_context = False

    def __init__(self, first: int) -> None:
        self.first = first

    def __call__(self, x_TD: torch.Tensor, routing: Routing, ctx: TokenContext) -> Any:
        expert_N = torch.arange(len(routing.count_E)).repeat_interleave(routing.count_E)
        scale_T = torch.zeros(len(x_TD)).index_add(
            0, routing.token_N, routing.gate_N * (1 + self.first + expert_N)
        )
        return x_TD * scale_T.to(x_TD.dtype)[:, None], None


def context() -> TokenContext:
    nothing = torch.zeros(0, dtype=torch.int64)
    return TokenContext(nothing, nothing, nothing.bool(), 0, 1, True, 0, 1, 1, 1, layer_call=7)


def sent(
    x_TD: torch.Tensor, routing: Routing, num_experts: int, mesh: meshes.Mesh, kind: str
) -> dict[str, Any]:
    before = mesh.bytes_sent
    first = mesh.local_experts(num_experts).start
    y_TD, _ = build_dispatcher(mesh, MeshConfig(dispatcher=kind), num_experts, 3, "middle")(
        x_TD, routing, Scale(first), context()
    )
    now = mesh.bytes_sent
    assert {key.place for key in now} == {"middle"}
    result: dict[str, Any] = {"y": y_TD}
    for key, num_bytes in now.items():
        link = "_between_nodes" if key.inter_node else ""
        result[key.direction + link] = num_bytes - before[key]
    return result


def by_hand() -> dict[str, Any]:
    mesh = start()
    expert_TK = torch.tensor(CHOSEN[mesh.dp.index], dtype=torch.int64).view(-1, 3)
    x_TD = torch.arange(len(expert_TK) * DIM, dtype=torch.float32).view(-1, DIM)
    routing = build_routing(
        expert_TK, torch.full(expert_TK.shape, 0.5), torch.ones_like(expert_TK, dtype=torch.bool), 8
    )
    told = {
        kind: sent(x_TD, routing, 8, mesh, kind)
        for kind in ("all_to_all", "dedup_rank", "dedup_node")
    }
    scale_T = 0.5 * (1.0 + expert_TK).sum(1)
    for kind in told.values():
        torch.testing.assert_close(kind.pop("y"), x_TD * scale_T[:, None])
    meshes.shutdown()
    return told


def start() -> meshes.Mesh:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    meshes.init_process_group()
    return meshes.build_mesh(4)


def test_dedup_bytes_by_hand() -> None:
    told = run_distributed(by_hand, 4, timeout=120)
    # rank 0, by rank of the experts: [0, 0, 1], [1, 2, 2], [2, 3, 3], [1, 1, 0]
    # ragged: to rank 1 four of its rows, to the other node 2 + 3; a weight each
    assert told[0]["all_to_all"]["dispatch"] == 4 * (ROW + 4)
    assert told[0]["all_to_all"]["dispatch_between_nodes"] == 5 * (ROW + 4)
    # once: rank 1 gets tokens 0, 1, 3 with four assignments; rank 2 tokens 1 and 2, rank 3 token 2:
    # five assignments
    assert told[0]["dedup_rank"]["dispatch"] == 3 * ROW + 4 * EACH
    assert told[0]["dedup_rank"]["dispatch_between_nodes"] == 3 * ROW + 5 * EACH
    # node: tokens 1 and 2 cross, each once, with five assignments. Inside: rank 1 gets tokens 0, 1,
    # 3 as above, and of rank 3's token [1, 2, 3], which is the 0th there and lands on rank 0, two
    # assignments
    assert told[0]["dedup_node"]["dispatch_between_nodes"] == 2 * ROW + 5 * EACH
    assert told[0]["dedup_node"]["dispatch"] == 4 * ROW + 6 * EACH
    # rank 1: [6, 7, 5] is on both ranks of the other node: ragged sends three rows, once two, node
    # one
    assert [
        told[1][kind]["dispatch_between_nodes"]
        for kind in ("all_to_all", "dedup_rank", "dedup_node")
    ] == [3 * (ROW + 4), 2 * ROW + 3 * EACH, ROW + 3 * EACH]
    # token 2 of rank 0 and token 0 of rank 1, being even, land on rank 2 and go on to rank 3, with
    # two assignments;
    # rank 3 sends its own token [7, 6, 4] to rank 2 with one
    assert told[2]["dedup_node"]["dispatch"] == 2 * ROW + 4 * EACH
    assert told[3]["dedup_node"]["dispatch"] == ROW + EACH
    # what rows went there comes back, and nothing else: tokens 1 and 2 of rank 0, and that of rank
    # 1, from rank 2
    assert [told[rank]["dedup_node"]["combine_between_nodes"] for rank in range(4)] == [
        ROW,
        0,
        3 * ROW,
        0,
    ]
    assert told[3]["dedup_node"]["combine"] == 2 * ROW


def a_page() -> tuple[float, ...]:
    """Returns inter-node and total bytes for 1,024 bf16 tokens per rank, 4 of 256 experts by
    Zipf's law with exponent 0.6."""
    mesh = start()
    generator = torch.Generator().manual_seed(mesh.dp.index)
    weight_E = (1.0 + torch.randperm(256, generator=torch.Generator().manual_seed(9))) ** -0.6
    expert_TK = torch.multinomial(weight_E.expand(1024, -1), 4, generator=generator)
    routing = build_routing(
        expert_TK, torch.rand(1024, 4, generator=generator), torch.ones_like(expert_TK).bool(), 256
    )
    x_TD, bytes_ = torch.randn(1024, 512).bfloat16(), []
    for kind in ("all_to_all", "dedup_node"):
        told = sent(x_TD, routing, 256, mesh, kind)
        del told["y"]
        bytes_ += [
            sum(n for d, n in told.items() if d.endswith("between_nodes")),
            sum(told.values()),
        ]
    meshes.shutdown()
    return tuple(map(float, bytes_))


def test_dedup_node_halves_inter_node_bytes() -> None:
    far, total, far_once, total_once = (
        torch.tensor(run_distributed(a_page, 4, timeout=120)).sum(0).tolist()
    )
    assert far_once <= 0.5 * far and total_once <= 0.75 * total


def chosen(kind: str, ep: int, per_node: int, k: int) -> str:
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    meshes.init_process_group()
    mesh = meshes.build_mesh(ep)
    try:
        exchange = build_dispatcher(mesh, MeshConfig(dispatcher=kind), 64, k)
        return f"{type(exchange).__name__} {getattr(exchange, 'num_chunks', '')}{getattr(exchange, 'delay_wgrad', '')}"
    finally:
        meshes.shutdown()


@pytest.mark.parametrize(
    ("kind", "ep", "per_node", "k", "name"),
    [
        ("auto", 2, 2, 4, "DedupDispatcher False"),
        ("auto", 2, 2, 2, "AllToAllDispatcher 0"),
        ("dedup_rank", 2, 2, 4, "DedupDispatcher False"),
        ("dedup_node", 1, 2, 4, "LocalDispatcher "),
        ("auto", 2, 1, 4, "DedupDispatcher True"),
        ("auto", 2, 1, 2, "AllToAllDispatcher 4"),
    ],
)
def test_default_dispatcher_depends_on_ranks_per_node(
    kind: str, ep: int, per_node: int, k: int, name: str
) -> None:
    assert run_distributed(chosen, 2, kind, ep, per_node, k) == [name] * 2


def test_default_dispatcher_without_inter_node_links() -> None:
    with pytest.raises(ValueError, match="do not span several nodes of 2 ranks evenly"):
        run_distributed(chosen, 2, "dedup_node", 2, 2, 4)
