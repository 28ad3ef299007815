"""The factored second moment against hand-worked numbers and a plain form; weight decay; LAMB."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from moe_dist.config.schema import OptimConfig
from moe_dist.data.images.torchvision_import import import_torchvision
from moe_dist.distributed.mesh import Axis
from moe_dist.optim import factored_adam
from moe_dist.optim.expert_state import AdamParam, sum_of_squares
from moe_dist.optim.factored_adam import factored_update, row_and_column_squares
from moe_dist.optim.optimizer import EXPERT_OPTIMIZERS

PLAIN = OptimConfig(lr=1.0, eps=0.0, expert_beta2=0.5)


def state(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Zero weights (e, D, F), rows (e, D), columns (e, F), float64."""
    e, d, f = shape
    return tuple(torch.zeros(s, dtype=torch.float64) for s in ((e, d, f), (e, d), (e, f)))  # type: ignore[return-value]


def test_first_step_of_the_paper_form_by_hand() -> None:
    # g² = [[1, 4], [9, 0]]: row means 2.5, 4.5; column means 5, 2; mean of the rows 3.5
    # after one step the bias-corrected means are these themselves, so v = [[2.5*5, 2.5*2], [4.5*5,
    # 4.5*2]] / 3.5
    w, row, column = state(1, 2, 2)
    g = torch.tensor([[[1.0, -2.0], [3.0, 0.0]]], dtype=torch.float64)
    factored_update(
        w, g, *row_and_column_squares(g), row, column, scale=1.0, lr=1.0, step=1, config=PLAIN
    )
    v = torch.tensor([[12.5, 5.0], [22.5, 9.0]], dtype=torch.float64) / 3.5
    torch.testing.assert_close(w[0], -g[0] / v.sqrt())
    torch.testing.assert_close(
        row, torch.tensor([[1.25, 2.25]], dtype=torch.float64)
    )  # (1 - 0.5) x means
    torch.testing.assert_close(column, torch.tensor([[2.5, 1.0]], dtype=torch.float64))


def test_first_step_of_the_t2t_form_by_hand() -> None:
    # roots first: sqrt(rows) = 2, 1; sqrt(columns) = 1, 3 with mean 2 -> sqrt(v) = [[1, 3], [0.5,
    # 1.5]] g² with row means 4, 1 and column means 1, 9 does not exist; scale the ones that do:
    # g² = [[2, 6], [0.5, 1.5]] has row means 4, 1 and column means 1.25, 3.75
    # roots 2, 1 and 1.1180, 1.9365 with mean 1.52725 -> sqrt(v) = [[1.4641, 2.5359], [0.7320,
    # 1.2680]]
    w, row, column = state(1, 2, 2)
    g = torch.tensor([[[2.0, 6.0], [0.5, 1.5]]], dtype=torch.float64).sqrt()
    factored_update(
        w,
        g,
        *row_and_column_squares(g),
        row,
        column,
        1.0,
        1.0,
        1,
        dataclasses.replace(PLAIN, expert_optimizer="factored_adam_t2t"),
    )
    root = torch.tensor([[1.4641, 2.5359], [0.7320, 1.2680]], dtype=torch.float64)
    torch.testing.assert_close(w[0], -g[0] / root, rtol=1e-4, atol=0)


def plain_form(g_list: list[torch.Tensor], config: OptimConfig, lr: float) -> torch.Tensor:
    """Keeps the whole second moment, then factors it: v_ij = r_i c_j / mean(r) of its row and
    column means."""
    w, mean_square = torch.zeros_like(g_list[0]), torch.zeros_like(g_list[0])
    for t, g in enumerate(g_list, start=1):
        mean_square = config.expert_beta2 * mean_square + (1 - config.expert_beta2) * g**2
        v = mean_square / (1 - config.expert_beta2**t)
        for e in range(len(w)):
            row, column = v[e].mean(1), v[e].mean(0)
            if config.expert_optimizer == "factored_adam":
                root = (torch.outer(row, column) / row.mean()).sqrt()
            else:
                root = torch.outer(row.sqrt(), column.sqrt()) / column.sqrt().mean()
            w[e] -= lr * g[e] / (root + config.eps)
    return w


@pytest.mark.parametrize("form", ["factored_adam", "factored_adam_t2t"])
def test_many_steps_equal_the_plain_form(form: str) -> None:
    config = OptimConfig(eps=1e-3, expert_beta2=0.9, expert_optimizer=form)
    generator = torch.Generator().manual_seed(0)
    g_list = [torch.randn(3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(6)]
    w, row, column = state(3, 5, 4)
    for t, g in enumerate(g_list, start=1):
        factored_update(
            w,
            g / 7,
            *row_and_column_squares(g / 7),
            row,
            column,
            scale=7.0,
            lr=0.1,
            step=t,
            config=config,
        )
    torch.testing.assert_close(w, plain_form(g_list, config, 0.1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_compiled_steps_equal_the_plain_form(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five experts of 150 rows: column sums have three parts."""
    monkeypatch.setattr(factored_adam, "MIN_COMPILED_ELEMENTS", 1)
    monkeypatch.setattr(factored_adam, "MIN_THREAD_ELEMENTS", 1)
    config = OptimConfig(eps=1e-3, expert_beta2=0.9)
    generator = torch.Generator().manual_seed(0)
    g_list = [torch.randn(5, 150, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for sums, dim in zip(row_and_column_squares(g_list[0]), (2, 1), strict=True):
        torch.testing.assert_close(sums, g_list[0].square().sum(dim))
    w, row, column = state(5, 150, 4)
    for t, g in enumerate(g_list, start=1):
        factored_update(
            w, g, *row_and_column_squares(g), row, column, scale=1.0, lr=0.1, step=t, config=config
        )
    torch.testing.assert_close(w, plain_form(g_list, config, 0.1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 400, 2**26], ids=["one expert", "two experts", "all"])
def test_eager_steps_equal_compiled_steps(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same float32 numbers; 5 experts of 12 x 16."""
    monkeypatch.setitem(factored_adam.EAGER_CHUNK_ELEMENTS, "cpu", at_once)
    generator = torch.Generator().manual_seed(0)
    g, w = (torch.randn(5, 12, 16, generator=generator) for _ in range(2))
    config = OptimConfig(eps=1e-3, weight_decay=0.1)
    told = []
    for worth in (2**20, 1):
        monkeypatch.setattr(factored_adam, "MIN_COMPILED_ELEMENTS", worth)
        moved, row, column = w.clone(), torch.zeros(5, 12), torch.zeros(5, 16)
        sums = row_and_column_squares(g)
        factored_update(moved, g, *sums, row, column, 0.5, 0.1, 3, config)
        told.append((*sums, moved, row, column))
    torch.testing.assert_close(*told)
    assert not torch.equal(told[0][2], w)


@pytest.mark.parametrize("columns", [7, 2**13], ids=["eager", "compiled"])
def test_graph_of_earlier_weights_is_rejected(columns: int) -> None:
    w = nn.Parameter(torch.ones(1, 2, columns))
    loss = (w * w).sum()
    loss.backward(retain_graph=True)
    assert w.grad is not None
    row, column = torch.zeros(1, 2), torch.zeros(1, columns)
    factored_update(
        w.detach(), w.grad, *row_and_column_squares(w.grad), row, column, 1.0, 0.1, 1, PLAIN
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("worth", [2**20, 1], ids=["eager", "compiled"])
def test_nonfinite_gradient_is_detected(worth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It appears in the sums from which the norm is computed."""
    monkeypatch.setattr(factored_adam, "MIN_COMPILED_ELEMENTS", worth)
    for value in (math.nan, math.inf, 1e30):
        g = torch.ones(2, 5, 70)
        g[1, 3, 66] = value
        row, column = row_and_column_squares(g)
        assert (~row.isfinite()).nonzero().tolist() == [[1, 3]]
        assert (~column.isfinite()).nonzero().tolist() == [[1, 66]]


def test_rank_one_is_exact_and_row_means_are_kept() -> None:
    """If g² = a b^T the factored v is g² itself, and each weight moves by lr against the sign
    of its gradient."""
    w, row, column = state(1, 3, 2)
    g = torch.outer(torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, -1.0])).double()[None]
    factored_update(w, g, *row_and_column_squares(g), row, column, 1.0, 0.1, 1, PLAIN)
    torch.testing.assert_close(w, -0.1 * g.sign())


def test_t2t_steps_are_smaller() -> None:
    """sqrt(mean c) >= mean(sqrt c), so tensor2tensor's denominator is the larger one."""
    g = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = {}
    for form in ("factored_adam", "factored_adam_t2t"):
        w, row, column = state(1, 6, 5)
        factored_update(
            w,
            g,
            *row_and_column_squares(g),
            row,
            column,
            1.0,
            1.0,
            1,
            dataclasses.replace(PLAIN, expert_optimizer=form),
        )
        moved[form] = w.abs()
    assert (moved["factored_adam_t2t"] < moved["factored_adam"]).all()


@pytest.mark.parametrize("form", ["factored_adam", "factored_adam_t2t"])
def test_no_gradient_gives_no_update(form: str) -> None:
    """A dead row, a dead column and an expert without a token: with g = 0 and v = 0 the update is
    0, not NaN.
    """
    config = dataclasses.replace(PLAIN, expert_optimizer=form, eps=1e-30)
    w, row, column = state(2, 3, 3)
    g = torch.zeros(2, 3, 3, dtype=torch.float64)
    g[0, 1, 1] = 2.0
    factored_update(w, g, *row_and_column_squares(g), row, column, 1.0, 0.1, 1, config)
    assert w.isfinite().all() and row.isfinite().all()
    assert w.count_nonzero() == 1 and w[0, 1, 1] < 0


def test_norm_of_many_elements_equals_float64() -> None:
    """Three million elements: a float32 sum is off in the fifth digit."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator) for n in (2**21, 2**20 + 3)]
    expected = sum(t.double().square().sum().item() for t in tensors)
    assert sum_of_squares(tensors, torch.device("cpu")).item() == pytest.approx(expected, rel=1e-8)
    g_eDF = tensors[0].view(2, 128, 8192)
    for sums in row_and_column_squares(g_eDF):
        assert sums.double().sum().item() == pytest.approx(
            g_eDF.double().square().sum().item(), rel=1e-6
        )


@pytest.mark.parametrize("form", ["factored_adam", "factored_adam_t2t", "adam"])
def test_weight_decay_is_decoupled(form: str) -> None:
    """w (1 - lr x decay), then the step without decay; for a matrix, not for a vector."""
    # 0.01 x 0.1 of 2 and of 4
    for shape, decayed in (((1, 2, 1), [0.002, 0.004]), ((1, 1, 2), [0.0, 0.0])):
        less = less_by_decay(
            torch.tensor([2.0, 4.0]).view(shape), torch.tensor([0.5, -1.0]).view(shape), form
        )
        torch.testing.assert_close(less.flatten(), torch.tensor(decayed), rtol=0, atol=1e-6)


def less_by_decay(w: torch.Tensor, g: torch.Tensor, form: str) -> torch.Tensor:
    """Returns the difference of an expert stack after a step without decay and after one with
    decay."""
    after = {}
    for decay in (0.0, 0.1):
        state = EXPERT_OPTIMIZERS[form](nn.Parameter(w.clone()), Axis(1, 0, None))  # type: ignore[arg-type]
        state.p.grad = g.clone()
        gradient = state.reduce()
        _, statistics = state.square(gradient)
        config = OptimConfig(weight_decay=decay, expert_optimizer=form)
        state.update(gradient, statistics, 1.0, 0.01, 1, config)
        after[decay] = state.p.detach().clone()
    return after[0.0] - after[0.1]


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 1, 5)])
def test_expert_trust_ratios_equal_lamb(shape: tuple[int, ...]) -> None:
    """timm sees each expert as a tensor of its own; biases (matrices of one row) have Adam's
    step without ratio and decay."""
    import_torchvision()
    from timm.optim import Lamb

    generator = torch.Generator().manual_seed(0)
    w = torch.randn(*shape, generator=generator)
    state = AdamParam(nn.Parameter(w.clone()), Axis(1, 0, None))  # type: ignore[arg-type]
    theirs = [nn.Parameter(expert.clone()) for expert in w]
    options: dict[str, Any] = dict(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    lamb = shape[1] > 1
    optimizer = (
        Lamb(theirs, **options, max_grad_norm=None) if lamb else torch.optim.Adam(theirs, lr=0.1)
    )
    config = OptimConfig(weight_decay=0.1, lamb=True)
    for step in range(1, 5):
        g = torch.randn(*shape, generator=generator)
        state.p.grad = 2 * g
        gradient = state.reduce()
        _, statistics = state.square(gradient)
        state.update(gradient, statistics, 0.5, 0.1, step, config)
        for p, expert in zip(theirs, g, strict=True):
            p.grad = expert.clone()
        optimizer.step()
    torch.testing.assert_close(
        state.p.detach(), torch.stack([p.detach() for p in theirs]), rtol=1e-5, atol=1e-6
    )
