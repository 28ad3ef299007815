"""The noisy top-k gate: numbers by hand, probabilities against random draws, and limits without any
token.

Legend: T tokens, D width, E experts, K chosen, G balance groups.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch
from comparisons import close
from contexts import context

from moe_dist.moe.experts import Experts
from moe_dist.moe.gating.balance_loss import cv_squared
from moe_dist.moe.gating.noisy_topk import NoisyTopK, probability_in_top_k
from moe_dist.moe.layer import MoE
from moe_dist.moe.routing import build_routing, capacity_mask, sum_by_group
from moe_dist.nn import prng, token_noise
from moe_dist.nn.token_context import TokenContext

FLOAT64 = torch.float64


def make_gate(
    w_gate_DE: torch.Tensor, k: int, w_noise_DE: torch.Tensor | None = None, **options: Any
) -> NoisyTopK:
    """Returns a gate with these weights, in their dtype; `w_noise_DE` None is zeros."""
    gate = NoisyTopK(*w_gate_DE.shape, k, **options).to(w_gate_DE.dtype)
    with torch.no_grad():
        gate.w_gate.w_DE.copy_(w_gate_DE)
        gate.w_noise.w_DE.copy_(torch.zeros_like(w_gate_DE) if w_noise_DE is None else w_noise_DE)
    return gate


def drawn(*shape: int, key: str) -> torch.Tensor:
    return torch.empty(*shape, dtype=FLOAT64).normal_(generator=prng.generator("test_gating", key))


# numbers worked out by hand


def test_weights_are_the_softmax_over_chosen_experts() -> None:
    # Tokens are unit vectors, so their logits are the rows of w_gate.
    # Token 0: e^logit = 1, 3, 6, 2. The best two are experts 2 and 1: weights 6 / (6 + 3) and 3 /
    # (6 + 3).
    # Token 1: e^logit = 4, 1, 2, 12. The best two are experts 3 and 0: weights 12 / (12 + 4) and 4
    # / (12 + 4).
    gate = make_gate(
        torch.tensor([[1, 3, 6, 2], [4, 1, 2, 12]], dtype=FLOAT64).log(), k=2, noise=False
    )
    routing, told = gate(torch.eye(2, dtype=FLOAT64), context(2))
    assert routing.count_E.tolist() == [1, 1, 1, 1]
    assert routing.token_N.tolist() == [1, 0, 0, 1]
    close(routing.gate_N, [1 / 4, 1 / 3, 2 / 3, 3 / 4])
    close(told.importance_GE, [[1 / 4, 1 / 3, 2 / 3, 3 / 4]])
    close(told.load_GE, [[1, 1, 1, 1]])  # no noise: Eq. 9 is 0 or 1
    # importance: mean 1/2, variance ((1/4)² + (1/6)² + (1/6)² + (1/4)²) / 4 = 13/288, CV² = 13/72;
    # load is even
    close(gate.balance_loss(told.importance_GE, told.load_GE), 0.1 * 13 / 72)


def test_noise_is_scaled_by_softplus_and_changes_the_choice() -> None:
    # softplus(ln(e^s - 1)) = s: deviations 1 and 3. With k = 1 the higher of z0 and ln 2 + 3 z1 is
    # chosen.
    deviation_E = torch.tensor([[1.0, 3.0]], dtype=FLOAT64)
    gate = make_gate(
        torch.tensor([[1.0, 2.0]], dtype=FLOAT64).log(), 1, (deviation_E.exp() - 1).log()
    )
    ctx = context(200)
    routing, _ = gate(torch.ones(200, 1, dtype=FLOAT64), ctx)
    z_TE = token_noise.token_normal(ctx, "gate", torch.arange(2), FLOAT64)
    first_T = z_TE[:, 0] > math.log(2) + 3 * z_TE[:, 1]
    assert 20 < first_T.sum() < 180
    assert (
        routing.token_N.tolist()
        == first_T.nonzero().flatten().tolist() + (~first_T).nonzero().flatten().tolist()
    )


def test_probability_in_top_k() -> None:
    clean_TE, std_TE = (
        torch.tensor([[1.0, 0.0, -1.0]], dtype=FLOAT64),
        torch.tensor([[1.0, 0.5, 2.0]], dtype=FLOAT64),
    )
    score_TE = torch.tensor([[1.5, 0.2, -0.6]], dtype=FLOAT64)  # after noise
    # k = 1. The best without expert 0 is 0.2, without 1 or 2 it is 1.5:
    # Phi((1 - 0.2) / 1) = Phi(0.8), Phi((0 - 1.5) / 0.5) = Phi(-3), Phi((-1 - 1.5) / 2) =
    # Phi(-1.25)
    p_TE = probability_in_top_k(clean_TE, std_TE, torch.tensor([[0]]), score_TE.topk(2).values)
    close(p_TE, [[0.788145, 0.001350, 0.105650]])
    # k = 2. The second best without expert 0 or 1 is -0.6, without 2 it is 0.2:
    # Phi((1 + 0.6) / 1) = Phi(1.6), Phi((0 + 0.6) / 0.5) = Phi(1.2), Phi((-1 - 0.2) / 2) =
    # Phi(-0.6)
    p_TE = probability_in_top_k(clean_TE, std_TE, torch.tensor([[0, 1]]), score_TE.topk(3).values)
    close(p_TE, [[0.945201, 0.884930, 0.274253]])
    # k = 3 of 3: always chosen
    close(
        probability_in_top_k(clean_TE, std_TE, torch.tensor([[0, 1, 2]]), score_TE.topk(3).values),
        [[1, 1, 1]],
    )


def test_tied_scores_are_compared_with_each_other() -> None:
    """Experts 0 and 1 score 2; 0 was chosen. Without 0 the best is 1's score, without 1 it is 0's:
    the gradient of P(x, 0) = Phi(clean 0 - score 1) goes to clean 0 and score 1, where comparing
    scores would find 0 not in the top.
    """
    clean_TE = torch.tensor([[1.0, 1.5, 0.0]], dtype=FLOAT64, requires_grad=True)
    score_TE = clean_TE + torch.tensor([[1.0, 0.5, 0.0]], dtype=FLOAT64)
    p_TE = probability_in_top_k(
        clean_TE,
        torch.ones_like(clean_TE),
        torch.tensor([[0]]),
        score_TE.gather(1, torch.tensor([[0, 1]])),
    )
    (grad_TE,) = torch.autograd.grad(p_TE[0, 0], clean_TE)
    # phi(1 - 2) = 0.241971 to clean 0, and as much with the other sign to score 1
    close(grad_TE, [[0.241971, -0.241971, 0]])


def test_cv_squared() -> None:
    even, one_of_four = [3.0, 3.0, 3.0, 3.0], [8.0, 0.0, 0.0, 0.0]
    rising = [1.0, 2.0, 3.0, 4.0]
    # one of four: mean 2, variance (36 + 4 + 4 + 4) / 4 = 12, 12 / 4 = 3. rising: mean 2.5,
    # variance 1.25, 1.25 / 6.25.
    close(cv_squared(torch.tensor([even, one_of_four, rising, [0.0] * 4])), [0, 3, 0.2, 0])


def test_balance_loss_is_summed_over_groups() -> None:
    gate = NoisyTopK(1, 2, 1, importance_loss_weight=0.5, load_loss_weight=2.0)
    # importance: CV² of (4, 0) is 4 / 4 = 1, of (1, 3) 1 / 4; load: of (1, 1) 0, of (0, 6) 9 / 9 =
    # 1
    importance_GE, load_GE = (
        torch.tensor([[4.0, 0.0], [1.0, 3.0]]),
        torch.tensor([[1.0, 1.0], [0.0, 6.0]]),
    )
    close(gate.balance_loss(importance_GE, load_GE), 0.5 * (1 + 1 / 4) + 2 * (0 + 1))


def test_sums_are_by_balance_group_without_padding() -> None:
    # Samples 4..7 of two tokens each, two samples a group; the second token of sample 5 is padding.
    valid_T = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    ctx = context(8, 2, valid_T=valid_T, first_sample=4, balance_loss_group_size=2)
    ctx = dataclasses.replace(ctx, sample_T=ctx.sample_T + 4)
    x_TE = torch.stack([torch.arange(8.0), torch.full((8,), 1.0)], 1)
    # group 0: tokens 0, 1, 2; group 1: tokens 4, 5, 6, 7
    close(sum_by_group(x_TE, ctx), [[3, 3], [22, 4]])
    x_TE[3] = torch.nan
    close(sum_by_group(x_TE, ctx), [[3, 3], [22, 4]])


def test_route_sorts_by_expert_and_then_by_token() -> None:
    expert_TK = torch.tensor([[2, 0], [0, 1], [2, 1], [0, 2]])
    gate_TK = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]])
    keep_TK = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1]], dtype=torch.bool)
    routing = build_routing(expert_TK, gate_TK, keep_TK, num_experts=4)
    # expert 0: tokens 0, 1, 3; expert 1: token 1 (token 2's is not kept); expert 2: tokens 0, 2, 3;
    # expert 3: none
    assert routing.count_E.tolist() == [3, 1, 3, 0]
    assert routing.token_N.tolist() == [0, 1, 3, 1, 0, 2, 3]
    close(routing.gate_N, [0.2, 0.3, 0.7, 0.4, 0.1, 0.5, 0.8])


@pytest.mark.parametrize(
    ("factor", "kept"),
    [
        # 5 valid tokens, 2 choices, 4 experts: capacity = ceil(factor x 2 x 5 / 4) = ceil(2.5
        # factor).
        # Expert 0 is wanted first by tokens 0, 1, 3, then second by 2 and 5; expert 1 first by 2
        # and 5, second by 0, 1;
        # expert 2 second by 3. Token 4 is padding.
        (0.4, [[1, 0], [0, 0], [1, 0], [0, 1], [0, 0], [0, 0]]),  # 1 place
        (0.8, [[1, 0], [1, 0], [1, 0], [0, 1], [0, 0], [1, 0]]),  # 2 places
        (1.0, [[1, 1], [1, 0], [1, 0], [1, 1], [0, 0], [1, 0]]),  # ceil(2.5) = 3 places
        (1.7, [[1, 1], [1, 1], [1, 1], [1, 1], [0, 0], [1, 1]]),  # ceil(4.25) = 5 places
        (None, [[1, 1], [1, 1], [1, 1], [1, 1], [0, 0], [1, 1]]),
    ],
)
def test_capacity_takes_first_choices_then_earlier_tokens(
    factor: float | None, kept: list[list[int]]
) -> None:
    expert_TK = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 2], [0, 0], [1, 0]])
    ctx = context(6, 6, valid_T=torch.tensor([1, 1, 1, 1, 0, 1], dtype=torch.bool))
    assert capacity_mask(expert_TK, factor, ctx, num_experts=4).int().tolist() == kept


def test_capacity_is_counted_in_each_token_group() -> None:
    # Groups of two samples: tokens 0 to 3 (all for expert 0, one padding) and 4 and 5. With factor
    # 1 and 2 experts the capacities are ceil(3 / 2) = 2 and ceil(2 / 2) = 1.
    expert_TK = torch.tensor([[0], [0], [0], [0], [0], [0]])
    valid_T = torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.bool)
    ctx = context(6, 2, valid_T=valid_T, capacity_group_size=2)
    assert capacity_mask(expert_TK, 1.0, ctx, 2).flatten().int().tolist() == [1, 0, 1, 0, 1, 0]


def test_integer_capacity_is_not_rounded_up() -> None:
    # 1.2 x 50 tokens / 4 experts = 15
    kept_TK = capacity_mask(
        torch.zeros(50, 1, dtype=torch.long), 1.2, context(50, 50), num_experts=4
    )
    assert kept_TK.sum() == 15
    # 1.1 x 100 tokens / 10 experts = 11, although 1.1 x 100 > 110 in binary
    kept_TK = capacity_mask(
        torch.zeros(100, 1, dtype=torch.long), 1.1, context(100, 100), num_experts=10
    )
    assert kept_TK.sum() == 11


def test_dropped_assignments_are_counted() -> None:
    # Every token chooses expert 0 (logit 1 against 0) and then the only other: 4 x 2 assignments,
    # of which a capacity of ceil(0.5 x 2 x 4 / 2) = 2 keeps 2 of each expert.
    gate = make_gate(torch.tensor([[1.0, 0.0]]), 2, noise=False, capacity_factor=0.5)
    routing, told = gate(torch.ones(4, 1), context(4, 4))
    assert routing.count_E.tolist() == [2, 2]
    assert told.dropped == 4
    assert told.load_GE.tolist() == [[4, 4]]  # wanted, not kept


def test_k_larger_than_num_experts_is_rejected() -> None:
    for k in (0, 5):
        with pytest.raises(
            ValueError, match=f"k={k} experts per token: must be 1 to num_experts=4"
        ):
            NoisyTopK(3, 4, k)


# chances against draws


@pytest.mark.parametrize("k", [1, 2, 5])
def test_probability_equals_the_share_over_redraws(k: int) -> None:
    """Eq. 8: only component i's noise is drawn again, all others keep theirs."""
    num_draws, num_experts = 20_000, 6
    clean_TE, std_TE = drawn(4, num_experts, key="clean"), drawn(4, num_experts, key="std").exp()
    score_TE = clean_TE + std_TE * drawn(4, num_experts, key="noise")
    p_TE = probability_in_top_k(
        clean_TE, std_TE, score_TE.topk(k).indices, score_TE.topk(k + 1).values
    )
    for i in range(num_experts):
        again_MT = clean_TE[:, i] + std_TE[:, i] * drawn(num_draws, 4, key=f"again {i}")
        score_MTE = score_TE.repeat(num_draws, 1, 1)
        score_MTE[:, :, i] = again_MT
        share_T = (score_MTE.topk(k).indices == i).any(2).double().mean(0)
        error_T = (p_TE[:, i] * (1 - p_TE[:, i]) / num_draws).sqrt()
        assert ((share_T - p_TE[:, i]).abs() <= 4 * error_T + 1 / num_draws).all()


def test_loads_sum_to_k_per_token_on_average() -> None:
    """P(x, i) is the chance of i given the others' noise, so its mean is the chance, and those sum
    to k.
    """
    num_tokens, k, num_steps = 16, 2, 600
    w_gate_DE, w_noise_DE = drawn(3, 5, key="w_gate"), drawn(3, 5, key="w_noise")
    gate = make_gate(w_gate_DE, k, w_noise_DE)
    x_TD = drawn(num_tokens, 3, key="x")
    load, rows = torch.empty(num_steps, 5, dtype=FLOAT64), torch.empty(num_steps, 5, dtype=FLOAT64)
    for step in range(num_steps):
        routing, told = gate(x_TD, context(num_tokens, step=step))
        load[step], rows[step] = told.load_GE.detach()[0], routing.count_E
    assert (rows.sum(1) == k * num_tokens).all()
    total = load.sum(1)
    assert total.std() > 0.1  # not in every draw
    assert abs(total.mean() - k * num_tokens) < 4 * total.std() / num_steps**0.5
    difference = load - rows  # and for each expert alone it is what the choices are on average
    assert (difference.mean(0).abs() < 4 * difference.std(0) / num_steps**0.5).all()


def test_load_is_even_at_initialization() -> None:
    # Both matrices are zero, so each of 16 experts is among the best 4 of 16 equal draws with
    # chance 1/4:
    # of 4,096 tokens 1,024 +- sqrt(4096 x 1/4 x 3/4) = 27.7
    gate = make_gate(torch.zeros(8, 16), k=4)
    routing, told = gate(torch.randn(4096, 8, generator=prng.generator("x")), context(4096))
    assert (routing.count_E - 1024).abs().max() < 4 * 27.7
    # the soft load spreads no wider: CV² is at most about (27.7 / 1024)² = 0.0007
    assert cv_squared(told.load_GE).item() < 0.0014
    assert cv_squared(told.importance_GE).item() < 0.0014
    assert abs(told.importance_GE.sum() - 4096) < 0.01


# where nothing is routed


def gradients(
    gate: NoisyTopK, x_TD: torch.Tensor, ctx: TokenContext
) -> tuple[Any, list[torch.Tensor]]:
    """Returns the statistics, and the gradients of x and all parameters, of a layer with this
    gate."""
    torch.manual_seed(0)
    layer = MoE(gate, Experts(gate.num_experts, x_TD.shape[1], 4).to(x_TD.dtype))
    for p in layer.experts.parameters():
        torch.nn.init.normal_(p)
    x_TD = x_TD.clone().requires_grad_()
    y_TD, stats = layer(x_TD, ctx)
    (y_TD.square().sum() + stats.balance_loss).backward()
    assert y_TD.isfinite().all()
    assert stats.balance_loss.isfinite()
    return stats, [x_TD.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("k", [1, 2, 6])
def test_experts_without_tokens_give_no_nan(dtype: torch.dtype, noise: bool, k: int) -> None:
    w_gate_DE = drawn(3, 6, key="w_gate").to(dtype)
    w_gate_DE[0, 2:] = -40.0  # experts 0 and 1 take all where k allows
    x_TD = drawn(10, 3, key="x").to(dtype)
    x_TD[:, 0] = 1
    stats, grads = gradients(make_gate(w_gate_DE, k, noise=noise), x_TD, context(10))
    assert k == 6 or stats.load_E[2:].sum() == 0
    assert len(grads) == (5 if noise else 4)  # x, w_gate, w_noise, w1, w2
    assert all(g.isfinite().all() for g in grads)
    assert all((g[2:] == 0).all() for g in grads[-2:]) == (k < 6)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_no_tokens_give_zeros(num_tokens: int, capacity_factor: float | None) -> None:
    """No tokens at all, and only padding."""
    gate = make_gate(drawn(3, 6, key="w_gate"), 2, capacity_factor=capacity_factor)
    ctx = context(num_tokens, valid_T=torch.zeros(num_tokens, dtype=torch.bool))
    stats, grads = gradients(gate, drawn(num_tokens, 3, key="x"), ctx)
    assert stats.balance_loss == 0
    assert stats.load_E.tolist() == [0] * 6
    assert stats.dropped == 0
    assert len(grads) == 5
    assert all((g == 0).all() for g in grads)


def test_padding_changes_nothing() -> None:
    x_TD = drawn(8, 3, key="x")
    gate = make_gate(drawn(3, 6, key="w_gate"), 2, capacity_factor=1.0)
    valid_T = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0], dtype=torch.bool)
    padded = context(8, 4, valid_T=valid_T)
    routing, told = gate(x_TD, padded)
    alone, told_alone = gate(x_TD[valid_T], padded.select(valid_T.nonzero().squeeze(1)))
    assert torch.equal(routing.token_N, valid_T.nonzero().squeeze(1)[alone.token_N])
    assert torch.equal(routing.gate_N, alone.gate_N)
    assert told.dropped == told_alone.dropped
    assert torch.equal(told.load_GE, told_alone.load_GE)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_noise_that_underflows_gives_no_nan(dtype: torch.dtype) -> None:
    # softplus(-1000) is 0 in any precision: the gate decides without noise, and the chance of each
    # expert is 0 or 1
    w_gate_DE, x_TD = drawn(3, 6, key="w_gate").to(dtype), drawn(10, 3, key="x").to(dtype)
    x_TD[:, 0] = 1
    w_noise_DE = torch.zeros(3, 6, dtype=dtype)
    w_noise_DE[0] = -1000
    gate = make_gate(w_gate_DE, 2, w_noise_DE)
    stats, grads = gradients(gate, x_TD, context(10))
    assert all(g.isfinite().all() for g in grads)
    _, told = gate(x_TD, context(10))
    close(told.load_GE[0], stats.load_E.tolist())


def test_empty_balance_group_gives_no_loss_and_no_nan() -> None:
    # Two groups; the second has padding alone, so the loss is that of the first.
    gate = make_gate(drawn(3, 6, key="w_gate"), 2)
    x_TD, valid_T = drawn(8, 3, key="x"), torch.arange(8) < 4
    stats, grads = gradients(gate, x_TD, context(8, valid_T=valid_T, balance_loss_group_size=4))
    only, _ = gradients(gate, x_TD[:4], context(4))
    assert stats.balance_loss > 0
    assert torch.equal(stats.balance_loss, only.balance_loss)
    assert all(g.isfinite().all() for g in grads)


# precision


def test_router_computes_in_float32_or_wider() -> None:
    w_gate_DE, x_TD, ctx = drawn(64, 8, key="w_gate"), drawn(200, 64, key="x"), context(200)
    narrow_x_TD, narrow_w_DE = x_TD.bfloat16(), w_gate_DE.bfloat16()
    narrow, told = make_gate(narrow_w_DE, 2)(narrow_x_TD, ctx)
    wide, _ = make_gate(narrow_w_DE.float(), 2)(narrow_x_TD.float(), ctx)
    assert narrow.gate_N.dtype == torch.float32
    assert told.importance_GE.dtype == told.load_GE.dtype == FLOAT64, (
        "sums over a batch, whose differences count"
    )
    assert torch.equal(narrow.token_N, wide.token_N)
    assert torch.equal(narrow.gate_N, wide.gate_N)
    double, told = make_gate(w_gate_DE, 2)(x_TD, ctx)
    assert double.gate_N.dtype == told.importance_GE.dtype == told.load_GE.dtype == FLOAT64
