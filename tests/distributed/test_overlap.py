"""Overlap of communication and computation: the order of events in forward and backward, on one of
two ranks, and rows in bf16. test_parity.py compares the results."""

import os
from typing import Any

import pytest
import torch

from moe_dist.config.schema import MeshConfig
from moe_dist.distributed import chunked_all_to_all
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.spawn import run_distributed
from moe_dist.engine.dispatcher_choice import build_dispatcher
from moe_dist.moe.delayed_wgrad import DelayedWeightGrads
from moe_dist.moe.experts import Experts, GeluExperts
from moe_dist.moe.hierarchical import ExpertGroups
from moe_dist.moe.kernels import cpu_ffn
from moe_dist.moe.routing import build_routing
from moe_dist.nn.token_context import TokenContext

pytestmark = pytest.mark.timeout(100)
T, D, F, E = 16, 8, 12, 8


def events(kind: str, pieces: int, what: str = "fast") -> list[str]:
    """Returns the order of events for rows without their weights: sends ("+"), waits ("-"),
    and the experts' products."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    meshes.init_process_group()
    mesh = meshes.build_mesh(torch.distributed.get_world_size())
    told: list[str] = []
    start, wait, form = (
        chunked_all_to_all._Direction.start,
        chunked_all_to_all._Direction.wait,
        DelayedWeightGrads.defer,
    )

    def name(way: Any, c: int) -> str:
        return f"{way.label.direction} {c}"

    def started(way: Any, c: int, x: torch.Tensor) -> None:
        told.extend([f"+{name(way, c)}"] if x.dim() == 2 and x.is_floating_point() else [])
        start(way, c, x)

    def waited(way: Any, c: int) -> torch.Tensor:
        x = wait(way, c)
        told.extend([f"-{name(way, c)}"] if x.dim() == 2 and x.is_floating_point() else [])
        return x

    def defer(later: DelayedWeightGrads, i: int, s: int, do: Any) -> None:
        def formed(out: torch.Tensor | None) -> torch.Tensor:
            told.append(f"w{s + 1} {i}")
            return do(out)

        form(later, i, s, formed)

    (
        chunked_all_to_all._Direction.start,
        chunked_all_to_all._Direction.wait,
        DelayedWeightGrads.defer,
    ) = (
        started,
        waited,
        defer,
    )  # type: ignore
    cpu_ffn.MIN_BYTES_PER_EXPERT = 0 if what == "fast" else 2**40
    mine = E // mesh.ep.size
    experts = (
        ExpertGroups(mine, 3, D, F, k=2)
        if what == "groups"
        else (GeluExperts if what == "gelu" else Experts)(mine, D, F)
    )
    experts.first_group = mesh.local_experts(E).start  # type: ignore[assignment]
    for p in experts.parameters():
        torch.nn.init.uniform_(p, 0.5, 1)
    x_TD = torch.ones(T, D, requires_grad=True)
    expert_TK = torch.stack([torch.arange(T) % E, (torch.arange(T) + 3) % E], 1)
    routing = build_routing(expert_TK, torch.ones(T, 2), expert_TK >= 0, E)
    token_T = torch.arange(T)
    ctx = TokenContext(token_T, token_T, token_T >= 0, 0, 0, True, 0, 4 * T, 4 * T, 1)
    y_TD, _ = build_dispatcher(mesh, MeshConfig(dispatcher=kind, overlap_chunks=pieces), E, 2)(
        x_TD, routing, experts, ctx
    )
    told.append("backward")
    y_TD.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in [x_TD, *experts.parameters()])
    meshes.shutdown()
    return told


def test_chunks_overlap_experts_and_wgrads_run_last() -> None:
    first, second = run_distributed(events, 2, "all_to_all", 2, timeout=90)
    assert (
        first
        == second
        == [
            "+dispatch 0",
            "+dispatch 1",
            "-dispatch 0",
            "+combine 0",
            "-dispatch 1",
            "+combine 1",
            "-combine 0",
            "-combine 1",
            "backward",
            "+combine_backward 0",
            "+combine_backward 1",
            "-combine_backward 1",
            "+dispatch_backward 1",
            "-combine_backward 0",
            "+dispatch_backward 0",
            "w1 0",
            "w1 1",
            "w2 0",
            "w2 1",
            "-dispatch_backward 0",
            "-dispatch_backward 1",
        ]
    )


@pytest.mark.parametrize(
    "kind, what",
    [
        ("all_to_all", "fast"),
        ("dedup_rank", "fast"),
        ("all_to_all", "groups"),
        ("dedup_rank", "groups"),
    ],
)
def test_one_chunk_delays_only_wgrads(kind: str, what: str) -> None:
    told = run_distributed(events, 2, kind, 1, what, timeout=90)[0]
    assert told[-4:] == ["+dispatch_backward 0", "w1 0", "w2 0", "-dispatch_backward 0"]


def test_dedup_node_wgrads_wait_for_rows_of_other_nodes() -> None:
    told = run_distributed(events, 4, "dedup_node", 4, timeout=90)[0]
    assert told[told.index("backward") :] == [
        "backward",
        "+combine_backward 0",
        "-combine_backward 0",
        "+combine_backward 0",
        "-combine_backward 0",
        "+dispatch_backward 0",
        "-dispatch_backward 0",  # in the node
        "+dispatch_backward 0",
        "w1 0",
        "w2 0",
        "-dispatch_backward 0",
    ]


@pytest.mark.parametrize("kind", ["all_to_all", "dedup_rank"])
def test_without_chunks_nothing_is_delayed(kind: str) -> None:
    told = run_distributed(events, 2, kind, 0, timeout=90)[0]
    assert told[-2:] == ["+dispatch_backward 0", "-dispatch_backward 0"] and not any(
        event[0] == "w" for event in told
    )


@pytest.mark.parametrize("what", ["plain", "gelu"])
def test_experts_without_a_fast_path_overlap_too(what: str) -> None:
    told = run_distributed(events, 2, "all_to_all", 2, what, timeout=90)[0]
    assert told[:2] == ["+dispatch 0", "+dispatch 1"]
    assert told[-6:] == [
        "w1 0",
        "w1 1",
        "w2 0",
        "w2 1",
        "-dispatch_backward 0",
        "-dispatch_backward 1",
    ]


def narrow() -> dict[str, tuple[float, float]]:
    """Returns by dispatcher: the distance of output and gradient from those of float32 rows,
    and the ratio of bytes."""
    meshes.init_process_group()
    mesh = meshes.build_mesh(2)
    generator = torch.Generator().manual_seed(mesh.dp.index)
    x = torch.randn(T, D, generator=generator)
    token_T, experts = torch.arange(T), Experts(E // 2, D, F)
    for p in experts.parameters():
        torch.nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    ctx = TokenContext(token_T, token_T, token_T >= 0, 0, 0, True, 0, 2 * T, 2 * T, 1)
    expert_TK = torch.randint(E, (T, 2), generator=generator)
    told: dict[str, tuple[float, float]] = {}
    for kind in ("all_to_all", "dedup_rank"):
        results, sent = [], []
        for wire in ("same", "bf16"):
            before, x_TD = mesh.bytes_sent, x.clone().requires_grad_()
            exchange = build_dispatcher(mesh, MeshConfig(dispatcher=kind, comm_dtype=wire), E, 2)
            y_TD, _ = exchange(
                x_TD, build_routing(expert_TK, torch.ones(T, 2), expert_TK >= 0, E), experts, ctx
            )
            y_TD.square().sum().backward()
            assert x_TD.grad is not None and y_TD.dtype == x_TD.grad.dtype == torch.float32
            results.append(torch.cat([y_TD.detach(), x_TD.grad]))
            sent.append(
                sum(
                    num_bytes - before[key]
                    for key, num_bytes in mesh.bytes_sent.items()
                    if key.direction.startswith("combine")
                )
            )
        told[kind] = (
            ((results[1] - results[0]).norm() / results[0].norm()).item(),
            sent[1] / sent[0],
        )
    meshes.shutdown()
    return told


def test_bf16_rows_halve_the_bytes() -> None:
    for told in run_distributed(narrow, 2, timeout=90):
        for error, share in told.values():
            assert share == 0.5
            assert 1e-4 < error < 8e-3  # a rounding of 2^-9 there and one back
