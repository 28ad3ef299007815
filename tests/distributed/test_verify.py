"""The certificate: issued if the layout does not change the result, and refused for every planted
fault."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.config.overrides import override
from moe_dist.config.papers import get
from moe_dist.config.schema import Config
from moe_dist.data.text.lanes import Lanes
from moe_dist.distributed import collectives
from moe_dist.distributed.spawn import run_distributed
from moe_dist.nn import token_noise
from moe_dist.nn.token_context import TokenContext
from moe_dist.optim import expert_state
from moe_dist.optim import optimizer as optimizer_module
from moe_dist.verify import __main__ as verify_command
from moe_dist.verify import certificate, choice_replay
from moe_dist.verify.certificate import REFERENCE, ParallelConfig, run_layouts

# the demo, its widths, batch and vocabulary divided so that 1, 2, 3 and 4 ranks can have it
SMALL = [
    "data.vocabulary_size=300",
    "model.dim=64",
    "model.moe.expert_hidden_dim=32",
    "model.moe.num_experts=48",
    "batch.global_batch_size=24",
    "batch.seq_len=8",
    "batch.balance_loss_group_size=6",
    "optim.warmup_steps=5",
    "optim.max_grad_norm=0.1",
    "model.moe.k=6",
]
HIERARCHICAL = ["model.moe.num_groups=6", "model.moe.k=3"]


def small(text: Path, *sets: str) -> Config:
    return override(get("lstm_moe_demo"), [*SMALL, f"data.text={text}", *sets])


# lr 8e-3 is the demo's own
@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    ("sets", "layouts"),
    [
        ([], [(1, 1, 3, 2), (2, 2, 0, 1), (3, 3, 1, 1), (4, 4, 3, 2)]),
        (["optim.lr=1e-2", "model.moe.recompute=true"], [(2, 1, 2, 2), (2, 2, 3, 1)]),
        (HIERARCHICAL, [(1, 1, 1, 2), (3, 1, 0, 2), (3, 3, 2, 1)]),
        (["optim.lr=1e-2", *HIERARCHICAL], [(4, 1, 0, 1), (4, 2, 3, 2)]),
    ],
    ids=["flat", "flat-1e-2", "hierarchical", "hierarchical-1e-2"],
)
def test_demo_is_certified_on_a_live_run(
    sets: list[str], layouts: list[tuple[int, int, int, int]], small_text: Path
) -> None:
    told = certificate.verify(
        small(small_text, *sets),
        [ParallelConfig(*place) for place in layouts],
        steps=20,
        replay=True,
    )
    live = told.reference
    assert live.routing_changed >= 0.2 and live.steps_clipped >= 15
    assert live.noise and live.dropout > 0
    assert [(t.world, t.ep, t.zero_stage, t.grad_accum_steps) for t in told.layouts] == layouts
    for t in told.layouts:
        assert max(t.loss, t.norm, t.weights) < 1e-5, t
        assert t.widest_gap <= certificate.MAX_ROUNDING_GAP, t
        assert t.idle >= (t.world > 1), f"a rank of two or more sent no row in a step: {t}"


WHOLE = "batch.balance_loss_group_size=24"  # a group of which each rank has a part
FAULTS: dict[str, Callable[[], None]] = {}


def fault(plant: Callable[[], None]) -> Callable[[], None]:
    FAULTS[plant.__name__] = plant
    return plant


@fault
def expert_gradients_divided_by_the_expert_data_group() -> None:
    """Two ranks at ep 2 divide by 1 instead of 2."""
    honest = expert_state.FactoredAdamParam.square

    def square(self: expert_state.FactoredAdamParam, gradient: torch.Tensor) -> Any:
        return honest(self, gradient.mul_(2))

    expert_state.FactoredAdamParam.square = square  # type: ignore[method-assign]


@fault
def a_norm_that_counts_replicas_twice() -> None:
    """Treats dense parameters as sharded although every rank holds them whole."""
    honest = optimizer_module.Optimizer.step

    def step(self: optimizer_module.Optimizer, closure: Any = None) -> None:
        self.zero_stage = 1
        honest(self)

    optimizer_module.Optimizer.step = step  # type: ignore[method-assign]


@fault
def local_balance() -> None:
    collectives.StatReducer.over_data = lambda self, x: x  # type: ignore[method-assign]


@fault
def noise_by_rank() -> None:
    honest = token_noise.token_normal

    def normal(ctx: TokenContext, *rest: Any) -> torch.Tensor:
        return honest(dataclasses.replace(ctx, seed=ctx.seed + torch.distributed.get_rank()), *rest)

    token_noise.token_normal = normal


@fault
def a_sampler_that_depends_on_the_world() -> None:
    honest = Lanes.window

    def window(self: Lanes, start: int, *rest: Any) -> Any:
        return honest(self, start + torch.distributed.get_world_size() - 1, *rest)

    Lanes.window = window  # type: ignore[method-assign]


@fault
def statistics_from_the_wrong_group() -> None:
    honest = expert_state.FactoredAdamParam.square

    def square(self: expert_state.FactoredAdamParam, gradient: torch.Tensor) -> Any:
        total, statistics = honest(self, gradient)
        torch.distributed.all_reduce(statistics[0])  # with the other rank's, of other experts
        return total, statistics

    expert_state.FactoredAdamParam.square = square  # type: ignore[method-assign]


@fault
def a_rank_that_would_choose_other_experts() -> None:
    """Only the gap shows the fault on the second of two ranks, because the recorded choice wins."""
    honest = choice_replay.top_k_plus_one

    def highest(score_TE: torch.Tensor, *rest: Any) -> Any:
        return honest(-score_TE if torch.distributed.get_rank() == 1 else score_TE, *rest)

    choice_replay.top_k_plus_one = highest


def run_faulty(
    fault: str | None, config: Config, layout: ParallelConfig, reference: Path
) -> list[Any]:
    if fault:
        FAULTS[fault]()
    return run_layouts(config, [layout], 6, reference, True, ())


@pytest.fixture(scope="module")
def reference(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "reference.pt"
    run_distributed(run_faulty, 1, None, small(small_text, WHOLE), REFERENCE, path)
    return path


@pytest.mark.timeout(100)
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_fault_is_reported(fault: str | None, small_text: Path, reference: Path) -> None:
    (told,), _ = run_distributed(
        run_faulty,
        2,
        fault,
        small(small_text, WHOLE),
        ParallelConfig(2, 2, 0, 1),
        reference,
        timeout=90,
    )
    off = max(told.loss, told.norm, told.weights)
    assert (
        (off > 1e-4 or told.widest_gap > certificate.MAX_ROUNDING_GAP) if fault else off < 1e-5
    ), told


def test_verify_from_the_command_line(
    small_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sets = [part for s in [*SMALL, f"data.text={small_text}", "steps=7"] for part in ("--set", s)]
    file = tmp_path / "told.json"
    assert (
        verify_command.main(
            [
                "lstm_moe_demo",
                *sets,
                "--worlds",
                "1",
                "5",
                "--zero",
                "1",
                "--steps",
                "3",
                "--json",
                str(file),
            ]
        )
        == 0
    )
    said = capfd.readouterr().out
    assert "2 of 2 layouts within 1e-05 of one rank" in said
    assert (
        "not a layout of this config: 5 ranks, ep 1, accumulation 1: batch.global_batch_size=24 is "
        "not a multiple" in said
    )
    told = json.loads(file.read_text())
    assert [
        (t["world"], t["ep"], t["zero_stage"], t["grad_accum_steps"]) for t in told["layouts"]
    ] == [
        (1, 1, 1, 1),
        (1, 1, 1, 2),
    ]
    assert {"loss", "norm", "weights", "flips", "signs"} <= told["layouts"][0].keys()
    tight = ["--worlds", "1", "--zero", "3", "--steps", "3", "--tolerance", "1e-12"]
    assert verify_command.main(["lstm_moe_demo", *sets, *tight]) == 1
    with pytest.raises(SystemExit) as end:
        verify_command.main(["lstm_moe_demo", "--set", "model.moe.k=65"])
    assert end.value.code == 2 and "k=65" in capfd.readouterr().err
