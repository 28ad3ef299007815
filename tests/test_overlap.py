"""What is done while rows travel: the order of events in forward and backward, on one of two ranks. That results are
the same is in test_parity.py. And rows that travel in bf16."""

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from moe_dist.config import MeshConfig
from moe_dist.context import Context
from moe_dist.experts import Experts, GeluExperts
from moe_dist.kernels import cpu
from moe_dist.later import Later
from moe_dist.parallel import collectives
from moe_dist.parallel import mesh as meshes
from moe_dist.parallel.spawn import run_distributed
from moe_dist.parallelize import exchange_on
from moe_dist.routing import route

pytestmark = pytest.mark.timeout(100)
T, D, F, E = 16, 8, 12, 8


def events(pieces: int, gelu: bool = False) -> list[str]:
    """Of rows alone, not of their weights: what leaves ("+") and is waited for ("-"), and what the experts form."""
    meshes.join()
    mesh = meshes.arrange(2)
    told: list[str] = []
    start, wait, form = collectives._Way.start, collectives._Way.wait, Later.put_off

    def name(way: Any, c: int) -> str:
        return f"{way.label[1]} {c}"

    def started(way: Any, c: int, x: torch.Tensor) -> None:
        told.extend([f"+{name(way, c)}"] if x.dim() == 2 else [])
        start(way, c, x)

    def waited(way: Any, c: int) -> torch.Tensor:
        x = wait(way, c)
        told.extend([f"-{name(way, c)}"] if x.dim() == 2 else [])
        return x

    def put_off(later: Later, i: int, do: Any) -> None:
        def formed(*gradients: torch.Tensor) -> None:
            told.append(f"weights {i}")
            do(*gradients)

        form(later, i, formed)

    collectives._Way.start, collectives._Way.wait, Later.put_off = started, waited, put_off  # type: ignore
    cpu.WORTH_IT = 0
    experts = (GeluExperts if gelu else Experts)(E // 2, D, F)
    x_TD = torch.ones(T, D, requires_grad=True)
    expert_TK = torch.stack([torch.arange(T) % E, (torch.arange(T) + 3) % E], 1)
    routing = route(expert_TK, torch.ones(T, 2), expert_TK >= 0, E)
    token_T = torch.arange(T)
    ctx = Context(token_T, token_T, token_T >= 0, 0, 0, True, 0, 2 * T, 2 * T, 1)
    y_TD, _ = exchange_on(mesh, MeshConfig(exchange="ragged", pieces=pieces))(x_TD, routing, experts, ctx)
    told.append("backward")
    y_TD.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in [x_TD, experts.w1_eDF, experts.w2_eFD])
    meshes.stop()
    return told


def test_pieces_travel_while_experts_run_and_weights_wait_for_the_last() -> None:
    first, second = run_distributed(events, 2, 2, timeout=90)
    assert first == second == [
        "+dispatch 0", "+dispatch 1", "-dispatch 0", "+combine 0", "-dispatch 1", "+combine 1",
        "-combine 0", "-combine 1",
        "backward",
        "+combine:grad 0", "+combine:grad 1",
        "-combine:grad 1", "+dispatch:grad 1", "-combine:grad 0", "+dispatch:grad 0",
        "weights 0", "weights 1",
        "-dispatch:grad 0", "-dispatch:grad 1",
    ]  # fmt: skip


def test_in_one_piece_the_weights_alone_wait() -> None:
    told = run_distributed(events, 2, 1, timeout=90)[0]
    assert told[-3:] == ["+dispatch:grad 0", "weights 0", "-dispatch:grad 0"]


def test_without_pieces_nothing_is_put_off() -> None:
    told = run_distributed(events, 2, 0, timeout=90)[0]
    assert told[-2:] == ["+dispatch:grad 0", "-dispatch:grad 0"] and not any("weights" in event for event in told)


def test_experts_without_a_fast_path_go_in_pieces_too() -> None:
    told = run_distributed(events, 2, 2, True, timeout=90)[0]
    assert told[0:2] == ["+dispatch 0", "+dispatch 1"] and not any("weights" in event for event in told)


def narrow() -> dict[str, tuple[float, float]]:
    """By exchange: how far the output and the gradient are from those of float32 rows, and the bytes over theirs."""
    meshes.join()
    mesh = meshes.arrange(2)
    generator = torch.Generator().manual_seed(mesh.dp.index)
    x = torch.randn(T, D, generator=generator)
    token_T, experts = torch.arange(T), Experts(E // 2, D, F)
    for p in experts.parameters():
        torch.nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    ctx = Context(token_T, token_T, token_T >= 0, 0, 0, True, 0, 2 * T, 2 * T, 1)
    expert_TK = torch.randint(E, (T, 2), generator=generator)
    told: dict[str, tuple[float, float]] = {}
    for kind in ("ragged", "once"):
        results, sent = [], []
        for wire in ("same", "bf16"):
            before, x_TD = mesh.sent, x.clone().requires_grad_()
            exchange = exchange_on(mesh, MeshConfig(exchange=kind, wire=wire))
            y_TD, _ = exchange(x_TD, route(expert_TK, torch.ones(T, 2), expert_TK >= 0, E), experts, ctx)
            y_TD.square().sum().backward()
            assert x_TD.grad is not None and y_TD.dtype == x_TD.grad.dtype == torch.float32
            results.append(torch.cat([y_TD.detach(), x_TD.grad]))
            sent.append(sum(n - before[label] for label, n in mesh.sent.items() if label[1].startswith("combine")))
        told[kind] = ((results[1] - results[0]).norm() / results[0].norm()).item(), sent[1] / sent[0]
    meshes.stop()
    return told


def test_rows_that_travel_in_bf16_are_half_the_bytes() -> None:
    for told in run_distributed(narrow, 2, timeout=90):
        for error, share in told.values():
            assert share == 0.5
            assert 1e-4 < error < 8e-3  # a rounding of 2^-9 there and one back


@pytest.mark.parametrize("backward", [True, False])
def test_what_was_put_off_is_let_go(backward: bool) -> None:
    later = Later([2, 2], nn.Parameter(torch.ones(4, 3)))
    known = weakref.ref(later)
    y = later.part(0)[0].sum() + later.part(1)[0].sum()
    if backward:
        y.backward()
    del later, y
    assert known() is None
