"""WideNet's router: numbers by hand, and the layer against loops, in float64.

Legend: T tokens, D width, E experts, G balance groups.
"""

import math
from typing import Any

import pytest
import torch
from comparisons import close
from contexts import NOWHERE, context
from reference import Gate
from reference_widenet import gelu_experts, moe

from moe_dist.moe.experts import GeluExperts
from moe_dist.moe.gating.balance_loss import switch_balance
from moe_dist.moe.gating.softmax_topk import SoftmaxTopK
from moe_dist.moe.layer import MoE
from moe_dist.moe.routing import Routing
from moe_dist.nn import prng, token_noise
from moe_dist.nn.init import init_bounds, init_parameter

FLOAT64 = torch.float64
DIM, HIDDEN, NUM_EXPERTS, NUM_SAMPLES, TOKENS = 6, 10, 5, 6, 4


def make_gate(w_DE: torch.Tensor, k: int, **options: Any) -> SoftmaxTopK:
    gate = SoftmaxTopK(*w_DE.shape, k, **options).to(w_DE.dtype)
    with torch.no_grad():
        gate.router.w_DE.copy_(w_DE)
    return gate


def drawn(*shape: int, key: str) -> torch.Tensor:
    return torch.empty(*shape, dtype=FLOAT64).normal_(
        generator=prng.generator("test_softmax_topk", key)
    )


# numbers worked out by hand


def test_weights_are_probabilities_over_all_experts() -> None:
    # Tokens are unit vectors, so their logits are the rows of the router.
    # Token 0: e^logit = 1, 3, 6, 2, sum 12. The best two are experts 2 and 1: weights 6/12 and
    # 3/12, not 2/3 and 1/3.
    # Token 1: e^logit = 4, 1, 3, 12, sum 20. The best two are experts 3 and 0: weights 12/20 and
    # 4/20.
    w_DE = torch.tensor([[1, 3, 6, 2], [4, 1, 3, 12]], dtype=FLOAT64).log()
    gate = make_gate(w_DE, k=2, noise=False, balance_loss_weight=0.5)
    routing, told = gate(torch.eye(2, dtype=FLOAT64), context(2))
    assert routing.count_E.tolist() == [1, 1, 1, 1]
    assert routing.token_N.tolist() == [1, 0, 0, 1]
    close(routing.gate_N, [4 / 20, 3 / 12, 6 / 12, 12 / 20])
    close(told.load_GE, [[1, 1, 1, 1]])
    close(
        told.importance_GE, [[1 / 12 + 4 / 20, 3 / 12 + 1 / 20, 6 / 12 + 3 / 20, 2 / 12 + 12 / 20]]
    )
    # all m are 1/4, and the P add up to 1: 0.5 x 4 x 1/4
    close(gate.balance_loss(told.importance_GE, told.load_GE), 0.5)


def test_balance_loss() -> None:
    # Group 0, 4 tokens with one choice each: m = 3/4, 1/4, 0; P = 2/4, 1/4, 1/4; 3 (3/4 2/4 + 1/4
    # 1/4) = 3 x 7/16.
    # Group 1 has no token. Group 2, 2 tokens with two choices each, is even in m: 3 x 1/3 = 1
    # whatever P is.
    probability_GE = torch.tensor(
        [[2, 1, 1], [0, 0, 0], [1.5, 0.25, 0.25]], dtype=FLOAT64, requires_grad=True
    )
    chosen_GE = torch.tensor([[3, 1, 0], [0, 0, 0], [4 / 3, 4 / 3, 4 / 3]], dtype=FLOAT64)
    loss_G = switch_balance(probability_GE, chosen_GE)
    close(loss_G, [21 / 16, 0, 1])
    gate = SoftmaxTopK(2, 3, 1)
    close(gate.balance_loss(probability_GE, chosen_GE), 0.01 * (21 / 16 + 1))
    # the gradient of a sum of probabilities is E m_i / tokens, tokens held fixed: 3/4 x (3/4, 1/4,
    # 0), and 3/2 x 1/3
    loss_G.sum().backward()
    assert probability_GE.grad is not None
    close(probability_GE.grad, [[9 / 16, 3 / 16, 0], [0, 0, 0], [1 / 2, 1 / 2, 1 / 2]])


def test_noise_has_deviation_one_over_num_experts() -> None:
    # Logits are zero, so log p differs between two experts by the difference of their noise:
    # variance 2 / E² = 1/8.
    gate = make_gate(torch.zeros(1, 4), k=4, capacity_factor=None)
    x_TD = torch.ones(4000, 1)
    routing, _ = gate(x_TD, context(4000))
    p_ET = routing.gate_N.view(4, -1)  # with k = E every expert has every token, in their order
    assert (p_ET[0] / p_ET[1]).log().var().item() == pytest.approx(1 / 8, rel=0.1)
    still, _ = gate(x_TD, context(4000, train=False))
    close(still.gate_N, [1 / 4] * 16000)
    elsewhere, _ = gate(x_TD, context(4000).at_layer(2))
    assert not torch.equal(elsewhere.gate_N, routing.gate_N), "another use, other noise"


def test_capacity_equals_the_paper() -> None:
    # 5 tokens of one sample, all to expert 0: ceil(1.2 x 1 x 5 / 4) = ceil(1.5) = 2 find room, 3
    # are dropped
    gate = make_gate(torch.tensor([[9.0, 0, 0, 0]]), k=1, noise=False)
    routing, told = gate(torch.ones(5, 1), context(5, 5))
    assert routing.token_N.tolist() == [0, 1] and told.dropped == 3
    assert told.load_GE.tolist() == [[5, 0, 0, 0]], "choices, before any is dropped"


def test_k_larger_than_num_experts_is_rejected() -> None:
    for k in (0, 5):
        with pytest.raises(
            ValueError, match=f"k={k} experts per token: must be 1 to num_experts=4"
        ):
            SoftmaxTopK(3, 4, k)


def test_router_starts_with_the_configured_logit_variance() -> None:
    gate = SoftmaxTopK(256, 64, 2)
    for name, bound in init_bounds(gate).items():
        init_parameter(gate.get_parameter(name), name, bound, seed=0)
    x_TD = torch.empty(200, 256).normal_(generator=prng.generator("variance"))
    assert gate.router(x_TD).var().item() == pytest.approx(0.1, rel=0.1)


def test_router_computes_in_float32_or_wider() -> None:
    gate = SoftmaxTopK(8, 4, 2)
    with torch.no_grad():
        gate.router.w_DE.copy_(drawn(8, 4, key="wide"))
    x_TD = drawn(20, 8, key="x")
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (FLOAT64, FLOAT64),
    ):
        routing, told = gate.to(dtype)(x_TD.to(dtype), context(20))
        assert routing.gate_N.dtype == wide and told.importance_GE.dtype == FLOAT64


# against loops

CASES: dict[str, dict[str, Any]] = {
    "k1": {"k": 1, "capacity_factor": None},
    "k2": {"k": 2, "capacity_factor": None},
    "all_experts": {"k": NUM_EXPERTS, "capacity_factor": None},
    "capacity": {"k": 2, "capacity_factor": 0.8},
    "capacity_no_noise": {"k": 1, "capacity_factor": 1.2, "noise": False},
    "evaluation": {"k": 2, "capacity_factor": 1.0, "train": False},
}


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_loops(name: str) -> None:
    """Outputs, statistics and every gradient, with padding, two balance groups and capacity by two
    samples.
    """
    case = {"noise": True, "train": True} | CASES[name]
    num_tokens = NUM_SAMPLES * TOKENS
    ctx = context(
        num_tokens,
        TOKENS,
        train=case["train"],
        valid_T=torch.arange(num_tokens) % 7 != 3,
        balance_loss_group_size=NUM_SAMPLES // 2,
        capacity_group_size=2,
    )
    options = {key: case[key] for key in ("noise", "capacity_factor")}
    layer = MoE(
        SoftmaxTopK(DIM, NUM_EXPERTS, case["k"], balance_loss_weight=0.7, **options),
        GeluExperts(NUM_EXPERTS, DIM, HIDDEN),
    ).double()
    with torch.no_grad():
        for key, p in layer.named_parameters():
            p.copy_(drawn(*p.shape, key=key))
    theirs = {key: p.detach().clone().requires_grad_() for key, p in layer.named_parameters()}
    x_TD, weight_TD = drawn(num_tokens, DIM, key="tokens"), drawn(num_tokens, DIM, key="weight")
    mine, their = (x_TD.clone().requires_grad_() for _ in range(2))

    y_TD, stats = layer(mine, ctx)
    ((weight_TD * y_TD).sum() + stats.balance_loss).backward()
    gate = Gate(
        theirs["gate.router.w_DE"],
        torch.empty(0),
        case["k"],
        token_noise.token_normal(ctx, "gate", torch.arange(NUM_EXPERTS), FLOAT64)
        if case["noise"] and case["train"]
        else None,
        valid_T=ctx.valid_T.tolist(),
        balance_group_T=[t // (num_tokens // 2) for t in range(num_tokens)],
        num_balance_groups=2,
        token_group_T=[t // (2 * TOKENS) for t in range(num_tokens)],
        capacity_factor=case["capacity_factor"],
    )
    expected = moe(their, gate, 0.7, gelu_experts(theirs, "experts"))
    ((weight_TD * expected.y_TD).sum() + expected.balance_loss).backward()

    _, told = layer.gate(mine, ctx)
    pairs = [
        (y_TD, expected.y_TD),
        (stats.balance_loss, expected.balance_loss),
        (told.importance_GE, expected.importance_GE),
        (told.load_GE, expected.load_GE),
        (mine.grad, their.grad),
        *((p.grad, theirs[key].grad) for key, p in layer.named_parameters()),
    ]
    for i, (actual, wanted) in enumerate(pairs):
        torch.testing.assert_close(
            actual, wanted, atol=1e-10, rtol=0, msg=lambda m, i=i: f"{name}, pair {i}: {m}"
        )
    assert stats.load_E.tolist() == expected.rows_E and stats.dropped == expected.dropped
    assert (expected.dropped > 0) == (case["capacity_factor"] is not None)


def test_gelu_experts_by_hand() -> None:
    # One unit: gelu(2 x 1 + 1) = 3 Phi(3); of two experts the second has the row, weight 1/2: (4 x
    # 3 Phi(3) + 5) / 2.
    experts = GeluExperts(2, 1, 1).double()
    with torch.no_grad():
        for p, value in zip(
            (experts.w1_eDF, experts.b1_e1F, experts.w2_eFD, experts.b2_e1D),
            (2, 1, 4, 5),
            strict=True,
        ):
            p.copy_(torch.tensor([0.0, value]).view(2, 1, 1))
    routing = Routing(torch.tensor([0]), torch.tensor([0.5]), torch.tensor([0, 1]))
    y_RD, _ = experts(torch.ones(1, 1, dtype=FLOAT64), routing, NOWHERE)
    close(y_RD, [[(4 * 3 * (1 + math.erf(3 / 2**0.5)) / 2 + 5) / 2]])


def test_recomputed_gelu_experts_are_equal() -> None:
    told = []
    for recompute in (False, True):
        experts = GeluExperts(3, DIM, HIDDEN, recompute).double()
        with torch.no_grad():
            for key, p in experts.named_parameters():
                p.copy_(drawn(*p.shape, key=key))
        routing = Routing(torch.arange(7), torch.ones(7, dtype=FLOAT64), torch.tensor([4, 0, 3]))
        y_RD, _ = experts(drawn(7, DIM, key="rows"), routing, NOWHERE)
        y_RD.square().sum().backward()
        told.append([y_RD.detach(), *(p.grad for p in experts.parameters())])
    assert all(torch.equal(plain, again) for plain, again in zip(*told, strict=True))
