"""The experts, on the CPU's fast path and on the plain one, against a loop over assignments:
output, every gradient, and the tensors saved for backward.

Legend: T tokens, N assignments, D width, F hidden units, E experts.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from contexts import NOWHERE

from moe_dist.moe.experts import Experts, GeluExperts, grouped_matmul
from moe_dist.moe.kernels import cpu_ffn, grouped_mm, kernel_choice
from moe_dist.moe.routing import Routing, build_routing
from moe_dist.nn import prng

T, D, F, E, K = 40, 8, 64, 7, 3
Told = dict[str, torch.Tensor]


class Fast(Experts):
    """Experts that use the fast path at any size."""

    def _select_kernel(
        self, num_rows: int, x_TD: torch.Tensor, relu_mask: kernel_choice.ReluMask | None, *_: Any
    ) -> kernel_choice.FeedForward:
        return partial(cpu_ffn.feedforward, relu_mask=relu_mask)


class Plain(Experts):
    """Experts that never use the fast path, like on a device without one."""

    def _select_kernel(self, *_: Any) -> None:
        return None


def drawn(*shape: int, key: str) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float64).normal_(
        generator=prng.generator("test_experts", key)
    )


def choices(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns experts and weights (T, K). `ragged`: experts 2 and 5 get nothing, expert 0 a
    third of all; some weights are zero or below. `dropped`: also, half of the tokens go
    nowhere. `nothing`: all do."""
    expert_TK = torch.stack(
        [torch.zeros(T), 1 + 2 * (torch.arange(T) % 2), torch.full((T,), 4)], 1
    ).long()
    expert_TK[::7, 2] = 6
    gate_TK = drawn(T, K, key="gate").abs()
    gate_TK[3, 0], gate_TK[5, 1] = 0, -0.5
    return expert_TK, gate_TK


def kept(kind: str) -> torch.Tensor:
    keep_TK = torch.ones(T, K, dtype=torch.bool)
    if kind != "ragged":
        keep_TK[:: 2 if kind == "dropped" else 1] = False
    return keep_TK


def leaves() -> Told:
    return {
        "x": drawn(T, D, key="x").requires_grad_(),
        "gate": choices("ragged")[1].requires_grad_(),
        "w1": drawn(E, D, F, key="w1").requires_grad_(),
        "w2": (drawn(E, F, D, key="w2") / 8).requires_grad_(),
    }


def expected(kind: str) -> Told:
    leaf, expert_TK = leaves(), choices(kind)[0]
    rows = []
    for t in range(T):
        y_D = torch.zeros(D, dtype=torch.float64)
        for k in range(K):
            if kept(kind)[t, k]:
                i = expert_TK[t, k]
                y_D = y_D + leaf["gate"][t, k] * (
                    torch.relu(leaf["x"][t] @ leaf["w1"][i]) @ leaf["w2"][i]
                )
        rows.append(y_D)
    return told(torch.stack(rows), leaf)


def told(y_TD: torch.Tensor, leaf: Told) -> Told:
    if y_TD.requires_grad:  # a loop over nothing does not
        (y_TD * drawn(T, D, key="dy").to(y_TD.dtype)).sum().backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in leaf.items()}
    return {"y": y_TD.detach()} | grads


def ours(
    kind: str,
    cls: type[Experts],
    dtype: torch.dtype,
    recompute: bool = False,
    units_on: bool = False,
) -> Told:
    """Computes the layer; `units_on` overrides the ReLU mask."""
    leaf = {name: t.detach().to(dtype) for name, t in leaves().items()}
    leaf["gate"] = (
        leaves()["gate"].detach().to(torch.promote_types(dtype, torch.float32))
    )  # as gates give it
    experts = cls(E, D, F, recompute).to(dtype)
    experts.w1_eDF, experts.w2_eFD = (torch.nn.Parameter(leaf[name]) for name in ("w1", "w2"))
    leaf |= {"x": leaf["x"].requires_grad_(), "gate": leaf["gate"].requires_grad_()}
    leaf |= {"w1": experts.w1_eDF, "w2": experts.w2_eFD}
    if units_on:
        experts.relu_mask_override = lambda h_RF, which, ctx_R: h_RF > 0
    routing = build_routing(choices(kind)[0], leaf["gate"], kept(kind), E)
    return told(experts(leaf["x"], routing, NOWHERE)[0], leaf)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    assert torch.get_num_threads() == request.param, "threads of ours leave torch's alone"
    torch.set_num_threads(before)


@pytest.mark.parametrize("cls", [Fast, Plain])
@pytest.mark.parametrize("kind", ["ragged", "dropped", "nothing"])
def test_output_and_gradients_equal_a_loop(kind: str, cls: type[Experts], threads: None) -> None:
    right = expected(kind)
    for options in (
        {},
        {"recompute": True},
        {"units_on": True},
        {"recompute": True, "units_on": True},
    ):
        actual = ours(kind, cls, torch.float64, **options)
        for name, wanted in right.items():
            torch.testing.assert_close(
                actual[name], wanted, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
    if kind == "nothing":
        assert not any(t.any() for t in right.values())


@pytest.mark.parametrize("cls", [Fast, Plain])
def test_bf16_is_within_its_rounding(cls: type[Experts]) -> None:
    right, actual = expected("ragged"), ours("ragged", cls, torch.bfloat16)
    for name, wanted in right.items():
        # an element is rounded by 2^-9 at most where it is stored: x, weights, hidden units,
        # outputs, their gradients;
        # a unit within that of zero may fall either way, and its gradient is whole or none
        assert (actual[name] - wanted).norm() < 0.02 * wanted.norm(), name
    assert actual["gate"].dtype == torch.float32 and actual["w1"].dtype == torch.bfloat16


@pytest.mark.parametrize("cls", [Fast, Plain])
def test_inference_mode_applies_to_all_threads(cls: type[Experts], threads: None) -> None:
    experts, x_TD = cls(E, D, F).double(), drawn(T, D, key="x")
    with torch.no_grad():
        for p, key in zip(experts.parameters(), ("w1", "w2"), strict=True):
            p.copy_(leaves()[key])
    routing = build_routing(choices("ragged")[0], choices("ragged")[1], kept("ragged"), E)
    with torch.inference_mode():
        y_TD, _ = experts(x_TD, routing, NOWHERE)
    torch.testing.assert_close(y_TD.clone(), expected("ragged")["y"], rtol=1e-12, atol=1e-12)


def test_later_threads_use_the_torch_settings() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    grouped_mm._threads.cache_clear()
    ours("ragged", Fast, torch.float64)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2
    torch.set_num_threads(before)


def test_torch_grouped_matmul_is_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package uses it only on CUDA (tests/distributed/test_gpu.py); torch has a slow CPU
    version."""
    count_e = torch.tensor([100, 0, 7, 193, 0])
    results: list[list[torch.Tensor]] = []
    for native in (False, True):
        monkeypatch.setattr(grouped_mm, "has_grouped_mm", lambda *_, native=native: native)
        x_RD, w_eDF = drawn(300, 64, key="x").bfloat16(), drawn(5, 64, 128, key="w").bfloat16()
        x_RD, w_eDF = x_RD.requires_grad_(), w_eDF.requires_grad_()
        y_RF = grouped_matmul(x_RD, w_eDF, count_e)
        y_RF.backward(drawn(300, 128, key="dy").bfloat16())
        assert x_RD.grad is not None and w_eDF.grad is not None
        results.append([y_RF.detach(), x_RD.grad, w_eDF.grad])
    for portable, own in zip(*results, strict=True):
        assert (
            portable - own
        ).float().norm() < 0.005 * portable.float().norm()  # each element rounded by 2^-8
    assert not results[1][2][1].any(), "an expert without rows has a zero gradient"


def test_experts_without_any_token() -> None:
    for cls in (Fast, Plain):
        experts = cls(E, D, F)
        x_TD = torch.zeros(0, D, requires_grad=True)
        nothing = torch.zeros(0, dtype=torch.int64)
        routing = Routing(
            nothing, torch.zeros(0, requires_grad=True), torch.zeros(E, dtype=torch.int64)
        )
        y_TD, _ = experts(x_TD, routing, NOWHERE.select(nothing))
        y_TD.sum().backward()
        assert y_TD.shape == (0, D)
        assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


def test_relu_mask_override_decides() -> None:
    """A unit below zero that is on adds to the output, and its gradient comes through: x = 1, w1 =
    (-2, 3), w2 = (5, 7), of which the first alone is on: y = -10, dx = -2 x 5, dw1 = (5, 0), dw2 =
    (-2, 0).
    """
    for cls in (Fast, Plain):
        experts = cls(1, 1, 2)
        with torch.no_grad():
            experts.w1_eDF.copy_(torch.tensor([[[-2.0, 3.0]]]))
            experts.w2_eFD.copy_(torch.tensor([[[5.0], [7.0]]]))
        experts.relu_mask_override = lambda h_RF, which, ctx_R: torch.tensor([[True, False]])
        x = torch.ones(1, 1, requires_grad=True)
        y, _ = experts(x, Routing(torch.tensor([0]), torch.ones(1), torch.tensor([1])), NOWHERE)
        y.sum().backward()
        assert y.item() == -10 and x.grad is not None and x.grad.item() == -10
        assert [p.grad is not None and p.grad.flatten().tolist() for p in experts.parameters()] == [
            [5, 0],
            [-2, 0],
        ]


@pytest.mark.parametrize("cls", [Fast, Plain, GeluExperts])
def test_recompute_saves_no_hidden_activations(cls: type[Experts]) -> None:
    numbers = []
    for recompute in (False, True):
        experts, sizes = cls(E, D, F, recompute), []

        def pack(t: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(t.numel() * (t.shape[-1] == F and t.shape[0] == T * K))
            return t

        x_TD, (expert_TK, gate_TK) = drawn(T, D, key="x").float(), choices("ragged")
        routing = build_routing(expert_TK, gate_TK.float(), kept("ragged"), E)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            experts(x_TD, routing, NOWHERE)
        numbers.append(sum(sizes))
    assert numbers[0] >= T * K * F and numbers[1] == 0


def test_fast_path_is_used_for_large_experts() -> None:
    """128 KiB of hidden units per expert: 4 experts of 64 units reach this from 4 x 2^17 / (4
    x 64) = 2048 rows."""

    def is_fast(experts: Experts, num_rows: int, num_experts: int = 4) -> bool:
        weights = (w[:num_experts] for w in experts.parameters())
        return experts._select_kernel(num_rows, torch.zeros(40, 8), None, *weights) is not None

    experts = Experts(4, 8, 64)
    assert [is_fast(experts, n) for n in (0, 2047, 2048, 10000)] == [False, False, True, True]
    assert [is_fast(experts, 1024, 2), is_fast(experts, 1023, 2)] == [True, False]
    assert not is_fast(GeluExperts(4, 8, 64), 10000)
