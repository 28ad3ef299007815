"""The optimizer state of experts on one rank: owners, norms, the update within backward."""

import itertools
import math
from typing import Any

import pytest
import torch
from runs import tiny

from moe_dist.config.schema import OptimConfig
from moe_dist.config.validate import check_config
from moe_dist.distributed import batch_layout
from moe_dist.distributed import mesh as meshes
from moe_dist.optim.expert_state import AdamParam, FactoredAdamParam
from moe_dist.optim.optimizer import Optimizer

PREVIOUS = ["optim.clip_norm_source=previous"]
FREE = [*PREVIOUS, "optim.fuse_expert_update_in_backward=true"]


ALONE: Any = meshes.Axis(1, 0, None)  # type: ignore[arg-type]  # says nothing to anyone
ONE_RANK = meshes.Mesh(ALONE, ALONE, ALONE, 1, torch.device("cpu"), None, None)  # type: ignore[arg-type]


# owners


def test_owned_parts_equal_torch_chunk() -> None:
    for number, ranks in itertools.product(range(1, 10), range(1, 6)):
        axis = meshes.Axis(ranks, 0, None)  # type: ignore[arg-type]
        expected = [c.tolist() for c in torch.arange(number).chunk(ranks)]
        parts = [list(range(number))[part] for part in axis.split_ranges(number)]
        assert parts == expected + [[]] * (ranks - len(expected))


def test_clipping_by_the_previous_norm_by_hand() -> None:
    # gradients (3, 4) of norm 5, then (6, 8) of norm 10, clip_norm 2.5: factors 1 (no norm before),
    # then 2.5 / 5.
    # Means at beta1 = 0.5: 0.5 (3, 4), then 0.25 (3, 4) + 0.5 (3, 4). An infinite one is skipped
    # and leaves 10.
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = Optimizer(
        [p],
        {},
        {},
        {},
        OptimConfig(max_grad_norm=2.5, clip_norm_source="previous", beta1=0.5),
        ONE_RANK,
        zero_stage=0,
    )
    for g, mean, norm in (
        ([3, 4], [1.5, 2.0], 5.0),
        ([6, 8], [2.25, 3.0], 10.0),
        ([math.inf, 0], [2.25, 3.0], 10.0),
    ):
        optimizer.start_step(1e-3)
        p.grad = torch.tensor(g).float()
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].tolist() == pytest.approx(mean)
        assert optimizer.previous_norm == pytest.approx(norm)


def test_second_gradient_in_a_step_is_rejected() -> None:
    w, config = (
        torch.nn.Parameter(torch.ones(2, 3, 4)),
        OptimConfig(max_grad_norm=None, fuse_expert_update_in_backward=True),
    )
    optimizer = Optimizer(
        [torch.nn.Parameter(torch.ones(1))], {"w": w}, {}, {}, config, ONE_RANK, zero_stage=0
    )
    optimizer.start_step(1e-3)
    w.sum().backward()
    with pytest.raises(AssertionError, match="a second gradient"):
        w.sum().backward()


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        (
            ["optim.fuse_expert_update_in_backward=true"],
            "optim.clip_norm_source=previous or optim.max_grad_norm=none",
        ),
        (["optim.clip_norm_source=last"], "optim.clip_norm_source='last' is unknown; did you mean"),
        (
            [*FREE, "batch.grad_accum_steps=2"],
            "batch.grad_accum_steps=2 does not fit optim.fuse_expert_update_in_backward",
        ),
    ],
)
def test_incompatible_fused_update_is_rejected(sets: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        config = tiny(*sets)
        check_config(config)
        batch_layout.make_batch_layout(config, 1)


def test_without_clipping_gradients_may_be_freed() -> None:
    check_config(tiny("optim.fuse_expert_update_in_backward=true", "optim.max_grad_norm=none"))


# bytes


def test_factored_state_has_rows_and_columns() -> None:
    """Lists every tensor that exists after a step, other than parameter, master and gradient."""
    p = torch.nn.Parameter(torch.ones(3, 20, 50))
    state = FactoredAdamParam(p, ALONE)
    for step in (1, 2):
        p.grad = torch.ones(3, 20, 50)
        gradient = state.reduce()
        _, statistics = state.square(gradient)
        state.update(gradient, statistics, 1.0, 1e-3, step, tiny().optim)
    held = [
        t
        for t in vars(state).values()
        if isinstance(t, torch.Tensor) and t.data_ptr() != p.data_ptr()
    ]
    assert sum(t.untyped_storage().nbytes() for t in held) == 3 * (20 + 50) * 4


def test_owner_of_no_expert_can_step() -> None:
    none = meshes.Axis(2, 1, None)  # type: ignore[arg-type]
    for kind in (FactoredAdamParam, AdamParam):
        p = torch.nn.Parameter(torch.ones(1, 4, 5))
        state = kind(p, none)
        p.grad = torch.ones(1, 4, 5)
        state.broadcast_from_owners = lambda x: x  # type: ignore[method-assign]
        gradient = state.local_gradient()[state.owned]
        square, statistics = state.square(gradient)
        assert square == 0
        state.update(gradient, statistics, 1.0, 1e-3, 1, tiny().optim)
        assert all(len(t) == 0 for t in state.tensors(1).values()) and torch.equal(
            p, torch.ones(1, 4, 5)
        )
