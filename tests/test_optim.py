"""The factored second moment against hand-worked numbers and a plain form; the schedule; the skipped step."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from runs import Run, tiny

from moe_dist import outside
from moe_dist.config import OptimConfig
from moe_dist.optim import learning_rate
from moe_dist.outside import factored_update, square_of, squares_of
from moe_dist.parallel import mesh as meshes
from moe_dist.parallel.spawn import run_distributed

PLAIN = OptimConfig(lr=1.0, eps=0.0, expert_beta2=0.5)


def state(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Zero weights (e, D, F), rows (e, D), columns (e, F), float64."""
    e, d, f = shape
    return tuple(torch.zeros(s, dtype=torch.float64) for s in ((e, d, f), (e, d), (e, f)))  # type: ignore[return-value]


def test_first_step_of_the_paper_form_by_hand() -> None:
    # g² = [[1, 4], [9, 0]]: row means 2.5, 4.5; column means 5, 2; mean of the rows 3.5
    # after one step the bias-corrected means are these themselves, so v = [[2.5*5, 2.5*2], [4.5*5, 4.5*2]] / 3.5
    w, row, column = state(1, 2, 2)
    g = torch.tensor([[[1.0, -2.0], [3.0, 0.0]]], dtype=torch.float64)
    factored_update(w, g, *squares_of(g), row, column, scale=1.0, lr=1.0, step=1, config=PLAIN)
    v = torch.tensor([[12.5, 5.0], [22.5, 9.0]], dtype=torch.float64) / 3.5
    torch.testing.assert_close(w[0], -g[0] / v.sqrt())
    torch.testing.assert_close(row, torch.tensor([[1.25, 2.25]], dtype=torch.float64))  # (1 - 0.5) x means
    torch.testing.assert_close(column, torch.tensor([[2.5, 1.0]], dtype=torch.float64))


def test_first_step_of_the_diet_form_by_hand() -> None:
    # roots first: sqrt(rows) = 2, 1; sqrt(columns) = 1, 3 with mean 2 -> sqrt(v) = [[1, 3], [0.5, 1.5]]
    # g² with row means 4, 1 and column means 1, 9 does not exist; scale the ones that do:
    # g² = [[2, 6], [0.5, 1.5]] has row means 4, 1 and column means 1.25, 3.75
    # roots 2, 1 and 1.1180, 1.9365 with mean 1.52725 -> sqrt(v) = [[1.4641, 2.5359], [0.7320, 1.2680]]
    w, row, column = state(1, 2, 2)
    g = torch.tensor([[[2.0, 6.0], [0.5, 1.5]]], dtype=torch.float64).sqrt()
    factored_update(w, g, *squares_of(g), row, column, 1.0, 1.0, 1, dataclasses.replace(PLAIN, expert_form="diet"))
    root = torch.tensor([[1.4641, 2.5359], [0.7320, 1.2680]], dtype=torch.float64)
    torch.testing.assert_close(w[0], -g[0] / root, rtol=1e-4, atol=0)


def plain_form(g_list: list[torch.Tensor], config: OptimConfig, lr: float) -> torch.Tensor:
    """The whole second moment kept, then factored: v_ij = r_i c_j / mean(r) of its row and column means."""
    w, mean_square = torch.zeros_like(g_list[0]), torch.zeros_like(g_list[0])
    for t, g in enumerate(g_list, start=1):
        mean_square = config.expert_beta2 * mean_square + (1 - config.expert_beta2) * g**2
        v = mean_square / (1 - config.expert_beta2**t)
        for e in range(len(w)):
            row, column = v[e].mean(1), v[e].mean(0)
            if config.expert_form == "paper":
                root = (torch.outer(row, column) / row.mean()).sqrt()
            else:
                root = torch.outer(row.sqrt(), column.sqrt()) / column.sqrt().mean()
            w[e] -= lr * g[e] / (root + config.eps)
    return w


@pytest.mark.parametrize("form", ["paper", "diet"])
def test_many_steps_equal_the_plain_form(form: str) -> None:
    config = OptimConfig(eps=1e-3, expert_beta2=0.9, expert_form=form)
    generator = torch.Generator().manual_seed(0)
    g_list = [torch.randn(3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(6)]
    w, row, column = state(3, 5, 4)
    for t, g in enumerate(g_list, start=1):
        factored_update(w, g / 7, *squares_of(g / 7), row, column, scale=7.0, lr=0.1, step=t, config=config)
    torch.testing.assert_close(w, plain_form(g_list, config, 0.1), rtol=1e-10, atol=1e-12)


# numbers in a piece, of four experts of 6 x 4
@pytest.mark.parametrize(
    ("most", "num", "experts", "rows"), [(1, 24, 1, 1), (15, 8, 1, 3), (24, 4, 1, 6), (70, 2, 2, 6), (2**20, 1, 4, 6)]
)
def test_pieces_are_no_part_of_the_result(
    most: int, num: int, experts: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = OptimConfig(eps=1e-3, expert_beta2=0.9)
    generator = torch.Generator().manual_seed(0)
    g_list = [torch.randn(4, 6, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    monkeypatch.setitem(outside.ELEMENTS_PER_PIECE, "cpu", most)
    assert outside.pieces(g_list[0]) == (num, experts, rows)
    for sums, dim in zip(squares_of(g_list[0]), (2, 1), strict=True):
        torch.testing.assert_close(sums, g_list[0].square().sum(dim))
    w, row, column = state(4, 6, 4)
    for t, g in enumerate(g_list, start=1):
        factored_update(w, g, *squares_of(g), row, column, scale=1.0, lr=0.1, step=t, config=config)
    torch.testing.assert_close(w, plain_form(g_list, config, 0.1), rtol=1e-10, atol=1e-12)


def test_rank_one_is_exact_and_row_means_are_kept() -> None:
    """Where g² = a b^T the factored v is g² itself, and each weight moves by lr against its gradient's sign."""
    w, row, column = state(1, 3, 2)
    g = torch.outer(torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, -1.0])).double()[None]
    factored_update(w, g, *squares_of(g), row, column, 1.0, 0.1, 1, PLAIN)
    torch.testing.assert_close(w, -0.1 * g.sign())


def test_diet_steps_are_smaller() -> None:
    """sqrt(mean c) >= mean(sqrt c), so tensor2tensor's denominator is the larger one."""
    g = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = {}
    for form in ("paper", "diet"):
        w, row, column = state(1, 6, 5)
        factored_update(w, g, *squares_of(g), row, column, 1.0, 1.0, 1, dataclasses.replace(PLAIN, expert_form=form))
        moved[form] = w.abs()
    assert (moved["diet"] < moved["paper"]).all()


@pytest.mark.parametrize("form", ["paper", "diet"])
def test_no_gradient_gives_no_update(form: str) -> None:
    """A dead row, a dead column and an expert without a token: with g = 0 and v = 0 the update is 0, not NaN."""
    config = dataclasses.replace(PLAIN, expert_form=form, eps=1e-30)
    w, row, column = state(2, 3, 3)
    g = torch.zeros(2, 3, 3, dtype=torch.float64)
    g[0, 1, 1] = 2.0
    factored_update(w, g, *squares_of(g), row, column, 1.0, 0.1, 1, config)
    assert w.isfinite().all() and row.isfinite().all()
    assert w.count_nonzero() == 1 and w[0, 1, 1] < 0


def test_the_norm_of_many_elements_is_that_of_float64() -> None:
    """Three million elements: all in float32 it would be off in the fifth digit."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator) for n in (2**21, 2**20 + 3)]
    expected = sum(t.double().square().sum().item() for t in tensors)
    assert square_of(tensors, torch.device("cpu")).item() == pytest.approx(expected, rel=1e-8)
    g_eDF = tensors[0].view(2, 128, 8192)
    for sums in squares_of(g_eDF):
        assert sums.double().sum().item() == pytest.approx(g_eDF.double().square().sum().item(), rel=1e-6)


def test_schedule() -> None:
    # warm-up of 4 steps to 8, then 8 sqrt(4 / step): step 16 -> 4
    config = OptimConfig(lr=8.0, warmup_steps=4)
    assert [learning_rate(config, s, 16) for s in (1, 2, 4, 16)] == [2.0, 4.0, 8.0, 4.0]


@pytest.mark.timeout(120)
def test_a_norm_that_is_not_finite_changes_nothing(small_text: Path) -> None:
    for rank in run_distributed(poison, 2, str(small_text), timeout=100):
        assert rank == {(zero, place): True for zero in (0, 1, 2, 3) for place in ("expert", "dense")}


def poison(text: str) -> dict[tuple[int, str], bool]:
    """A gradient on rank 1 is set to infinity before the third step's update; whether the others were left alone."""
    meshes.join()
    kept = {}
    for zero in (0, 1, 2, 3):
        for place in ("expert", "dense"):
            run = Run(tiny("mesh.ep=2", f"zero={zero}", f"data.text={text}")).steps(0, 2)
            before, norm = run.weights(), run.norms[-1]
            hooked = (
                next(iter(run.model.experts.values())) if place == "expert" else run.engine.names["lstm1.weight_hh_l0"]
            )
            handle = hooked.register_hook(lambda g: g * math.inf) if run.mesh.dp.index == 1 else None
            run.steps(2, 3)
            if handle:
                handle.remove()
            after = run.weights()
            untouched = all(torch.equal(before[k], after[k]) for k in before) and not math.isfinite(run.norms[-1])
            run.steps(3, 4)  # and it goes on
            kept[zero, place] = untouched and math.isfinite(norm) and math.isfinite(run.norms[-1])
    meshes.stop()
    return kept
