"""Hierarchical experts on one rank: Eqs. 12 to 14 by hand, balance losses, empty groups."""

import dataclasses

import pytest
import torch
from hierarchical_cases import (
    CASES,
    PER_GROUP,
    reference,
    whole_layer,
)
from reference import relu_experts
from reference_hierarchical import Gates, hierarchical_moe, load_h
from uneven_batch import (
    DIM,
    HIDDEN,
    LENGTHS,
    NEVER,
    NUM_SAMPLES,
    Case,
    batch,
    context,
)
from uneven_batch import NUM_EXPERTS as NUM_GROUPS

from moe_dist.moe.gating.noisy_topk import NoisyTopK
from moe_dist.moe.hierarchical import ExpertGroups, GroupStats, HierarchicalMoE
from moe_dist.moe.routing import GateStats, Routing

pytestmark = pytest.mark.timeout(300)


# in one process


@pytest.mark.parametrize("case", CASES)
def test_importance_sums_to_the_number_of_valid_tokens(case: str) -> None:
    _, stats = whole_layer(CASES[case])(batch()["x"], context(0, NUM_SAMPLES, CASES[case]))
    assert stats.importance_E.sum().item() == pytest.approx(sum(LENGTHS), abs=1e-12)
    assert stats.load_E.sum() == CASES[case].k ** 2 * sum(LENGTHS)


@pytest.mark.parametrize("case", ["k1", "k2", "balance_groups"])
def test_load_loss_has_a_gradient_for_the_primary_gate(case: str) -> None:
    """Eq. 14 has the factor Load_prim because the load of a group's experts alone has no
    derivative by the primary gate."""
    moe = whole_layer(CASES[case], importance_loss_weight=0.0)
    moe(batch()["x"], context(0, NUM_SAMPLES, CASES[case]))[1].balance_loss.backward()
    for p in (
        *moe.gate.parameters(),
        *moe.experts.w_gate.parameters(),
        *moe.experts.w_noise.parameters(),
    ):
        assert p.grad.abs().max() > 1e-3
    assert all(p.grad is None for p in moe.experts.experts.parameters())


@pytest.mark.parametrize("case", CASES)
def test_empty_groups_give_no_nan(case: str) -> None:
    moe, x_TD = whole_layer(CASES[case]), batch()["x"].clone().requires_grad_()
    y_TD, stats = moe(x_TD, context(0, NUM_SAMPLES, CASES[case]))
    assert all(stats.load_E.view(NUM_GROUPS, PER_GROUP)[i].sum() == 0 for i in NEVER)
    (y_TD.square().sum() + stats.balance_loss).backward()
    for p in (x_TD, *moe.parameters()):
        assert p.grad is None or p.grad.isfinite().all()
    for i in NEVER:
        assert not moe.experts.w_gate.w_gDb.grad[i].any()


def test_hierarchical_layer_without_any_token() -> None:
    case = CASES["balance_groups"]
    moe, x_TD = whole_layer(case), batch()["x"].clone().requires_grad_()
    ctx = dataclasses.replace(
        context(0, NUM_SAMPLES, case), valid_T=torch.zeros(len(x_TD), dtype=torch.bool)
    )
    y_TD, stats = moe(x_TD, ctx)
    (y_TD.sum() + stats.balance_loss).backward()
    assert stats.balance_loss == 0 and not y_TD.any()
    assert not any(p.grad.any() for p in moe.parameters())


def test_eq_14_by_hand() -> None:
    """Two groups of two experts, two balance groups; the load loss alone, of weight 1.

    Balance group 1: Load_prim = (3, 1), |X^(1)| = 4, |X^(2)| = 2, Load_1 = (3, 1), Load_2 = (1, 1).
      Load_H = (3·3/4, 3·1/4, 1·1/2, 1·1/2) = (2.25, 0.75, 0.5, 0.5), mean 1,
      CV² = (1.25² + 0.25² + 0.5² + 0.5²) / 4 = 2.125 / 4 = 0.53125.
      dCV²/dLoad_H = (Load_H - 1) / 2 - CV² / 2 = (0.359375, -0.390625, -0.515625, -0.515625), so
      dCV²/dLoad_prim = (0.359375·3/4 - 0.390625·1/4, -2·0.515625·1/2) = (0.171875, -0.515625).
    Balance group 2: Load_prim = (2, 0.5), but no token chose group 2: |X| = (2, 0), Load_1 = (1,
      1).
      Load_H = (2·1/2, 2·1/2, 0, 0) = (1, 1, 0, 0), mean 0.5, CV² = 4·0.5² / 4 / 0.5² = 1.
      dCV²/dLoad_H of the first two = 2 (1 - 0.5) - 1 = 0, and an empty group takes no derivative.
    """
    load_prim = torch.tensor([[3.0, 1.0], [2.0, 0.5]], requires_grad=True)
    load_i = torch.tensor([[3.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]], requires_grad=True)
    rows = torch.tensor([[4.0, 2.0], [2.0, 0.0]])
    count_E = torch.tensor([5, 1, 1, 1])
    moe = HierarchicalMoE(
        NoisyTopK(1, 2, 1, importance_loss_weight=0.0, load_loss_weight=1.0),
        ExpertGroups(2, 2, 1, 1, 1, noise=True),
    )
    stats = moe.stats(
        Routing(torch.zeros(8, dtype=torch.int64), torch.ones(8), torch.tensor([6, 2])),
        GateStats(torch.ones(2, 2), load_prim, torch.tensor(0)),
        GroupStats(torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), load_i, rows, count_E),
    )
    assert stats.balance_loss.item() == pytest.approx(0.53125 + 1)
    stats.balance_loss.backward()
    assert load_prim.grad.tolist() == [pytest.approx([0.171875, -0.515625]), pytest.approx([0, 0])]
    assert load_i.grad.isfinite().all()
    assert stats.importance_E.tolist() == [6, 8, 10, 12]
    assert torch.equal(stats.load_E, count_E)
    for group, load_h_E in enumerate([[2.25, 0.75, 0.5, 0.5], [1, 1, 0, 0]]):
        assert [
            v.item()
            for v in load_h(list(load_prim[group]), list(load_i[group]), rows[group].tolist())
        ] == load_h_E


def test_eqs_12_and_13_by_hand() -> None:
    """Two groups of two experts, all chosen; x = 1, and expert (i, j) gives (10, 20; 30, 40).

    Primary logits (ln 3, 0): G_prim = (3/4, 1/4). Secondary (ln 2, 0; 0, 0): G_1 = (2/3, 1/3), G_2
    = (1/2, 1/2).
    y = 3/4·2/3·10 + 3/4·1/3·20 + 1/4·1/2·30 + 1/4·1/2·40 = 5 + 5 + 3.75 + 5 = 18.75.
    Importance_H of four such tokens: 4·(1/2, 1/4, 1/8, 1/8) = (2, 1, 0.5, 0.5), mean 1,
    CV² = (1 + 0 + 0.25 + 0.25) / 4 = 0.375. Load_H = 4·4/4 each, CV² = 0.
    """
    ctx = context(0, 1, Case(train=False))  # four valid tokens
    moe = HierarchicalMoE(
        NoisyTopK(1, 2, 2, importance_loss_weight=1.0, load_loss_weight=1.0),
        ExpertGroups(2, 2, 1, 1, 2, noise=True),
    ).double()
    with torch.no_grad():
        for p in moe.parameters():
            p.zero_()
        moe.gate.w_gate.w_DE.copy_(torch.tensor([[3.0, 1.0]]).log())
        moe.experts.w_gate.w_gDb.copy_(torch.tensor([[[2.0, 1.0]], [[1.0, 1.0]]]).log())
        moe.experts.experts.w1_eDF.fill_(1.0)
        moe.experts.experts.w2_eFD.copy_(torch.tensor([10.0, 20, 30, 40]).view(4, 1, 1))
    x_TD = torch.ones(4, 1, dtype=torch.float64)
    y_TD, stats = moe(x_TD, ctx)
    gates = Gates(
        moe.gate.w_gate.w_DE,
        moe.gate.w_noise.w_DE,
        moe.experts.w_gate.w_gDb,
        moe.experts.w_noise.w_gDb,
        2,
        None,
        None,
        [True] * 4,
        [0] * 4,
        1,
        importance_loss_weight=1.0,
        load_loss_weight=1.0,
    )
    slow = hierarchical_moe(
        x_TD, gates, relu_experts(moe.experts.experts.w1_eDF, moe.experts.experts.w2_eFD)
    )
    for y, importance_E, loss in (
        (y_TD, stats.importance_E, stats.balance_loss),
        (slow.y_TD, slow.importance_GE[0], slow.balance_loss),
    ):
        assert y.flatten().tolist() == pytest.approx(
            [18.75] * 4, rel=1e-7
        )  # logits are float32 logarithms
        assert importance_E.tolist() == pytest.approx([2, 1, 0.5, 0.5], rel=1e-7)
        assert loss.item() == pytest.approx(0.375, rel=1e-6)


@pytest.mark.parametrize("k", [0, 3])
def test_k_larger_than_a_group_is_rejected(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} experts per group: must be 1 to 2"):
        ExpertGroups(4, 2, DIM, HIDDEN, k, noise=True)


def test_hierarchical_cases_have_their_properties() -> None:
    valid = sum(LENGTHS)  # 18
    results = {name: reference(case)[0] for name, case in CASES.items()}
    for name, result in results.items():
        rows_ab = torch.tensor(result.rows_E).view(NUM_GROUPS, PER_GROUP)
        assert rows_ab.sum() == CASES[name].k ** 2 * valid
        assert not rows_ab[list(NEVER)].any()
        assert not result.load_GE.view(-1, NUM_GROUPS, PER_GROUP)[:, list(NEVER)].any()
    assert all(
        results["whole_group"].rows_E[i * PER_GROUP] > 0
        for i in range(NUM_GROUPS)
        if i not in NEVER
    )
    # without noise Eq. 14 counts: Load_prim(X)_i = |X^(i)|
    assert results["evaluation"].load_GE[0].tolist() == pytest.approx(results["evaluation"].rows_E)
    by_group = results["balance_groups"].importance_GE.sum(1)
    assert by_group.tolist() == pytest.approx([6, 0, 5, 7])  # valid tokens of each
    one_token_a = results["k1_balance_groups"].load_GE[4].view(NUM_GROUPS, PER_GROUP).sum(1)
    assert (one_token_a == 0).sum() == NUM_GROUPS - 1, "groups empty in a balance group alone"
