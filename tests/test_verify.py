"""The certificate: it is given where the layout is no part of the result, and refused for every planted fault."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist import keyed, optim, outside, verify
from moe_dist.config import Config, override
from moe_dist.configs import get
from moe_dist.context import Context
from moe_dist.data.text import Lanes
from moe_dist.parallel import collectives
from moe_dist.parallel.spawn import run_distributed
from moe_dist.replay import Choices
from moe_dist.verify import REFERENCE, Layout, run_layouts

# the demo, its widths, batch and vocabulary divided so that 1, 2, 3 and 4 ranks can have it
SMALL = [
    "data.vocabulary_size=300", "model.dim=64", "model.moe.hidden=32", "model.moe.num_experts=48", "batch.samples=24",
    "batch.timesteps=8", "batch.samples_per_balance_group=6", "optim.warmup_steps=5", "optim.clip_norm=0.1",
    "model.moe.k=6",
]  # fmt: skip
HIERARCHICAL = ["model.moe.num_groups=12", "model.moe.k=3"]


def small(text: Path, *sets: str) -> Config:
    return override(get("lstm_moe_demo"), [*SMALL, f"data.text={text}", *sets])


# lr 8e-3 is the demo's own
@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    ("sets", "layouts"),
    [
        ([], [(1, 1, 3, 2), (2, 2, 0, 1), (2, 1, 2, 2), (3, 3, 1, 1), (4, 2, 3, 2), (4, 4, 2, 1)]),
        (["optim.lr=1e-2", *HIERARCHICAL], [(1, 1, 1, 2), (2, 2, 3, 2), (3, 1, 0, 2), (3, 3, 2, 1), (4, 2, 1, 1)]),
    ],
)
def test_the_demo_is_certified_and_the_run_is_live(
    sets: list[str], layouts: list[tuple[int, int, int, int]], small_text: Path
) -> None:
    told = verify.verify(small(small_text, *sets), [Layout(*place) for place in layouts], steps=20, replay=True)
    live = told["live"]
    assert live["routing changed"] >= 0.2 and live["steps clipped"] >= 15
    assert live["noise"] and live["dropout"] > 0
    assert [tuple(t[k] for k in ("world", "ep", "zero", "accumulation")) for t in told["layouts"]] == layouts
    for t in told["layouts"]:
        assert max(t["loss"], t["norm"], t["weights"]) < 1e-5, t
        assert t["widest_gap"] <= verify.GAP, t
        assert t["idle"] >= (t["world"] > 1), f"a rank of two or more sent no row in a step: {t}"


WHOLE = "batch.samples_per_balance_group=24"  # a group of which each rank has a part
FAULTS: dict[str, Callable[[], None]] = {}


def fault(plant: Callable[[], None]) -> Callable[[], None]:
    FAULTS[plant.__name__] = plant
    return plant


@fault
def expert_gradients_divided_by_the_expert_data_group() -> None:
    """Two ranks at ep 2: by 1 instead of 2."""
    honest = outside.Factored.square

    def square(self: outside.Factored) -> torch.Tensor:
        self.gradient().mul_(2)
        return honest(self)

    outside.Factored.square = square  # type: ignore[method-assign]


@fault
def a_norm_that_counts_replicas_twice() -> None:
    """As if dense parameters were sharded where every rank holds them whole."""
    honest = optim.Optimizer.step

    def step(self: optim.Optimizer, closure: Any = None) -> None:
        self.zero = 1
        honest(self)

    optim.Optimizer.step = step  # type: ignore[method-assign]


@fault
def local_balance() -> None:
    collectives.Sums.everyone = lambda self, x: x  # type: ignore[method-assign]


@fault
def noise_by_rank() -> None:
    honest = keyed.normal

    def normal(ctx: Context, *rest: Any) -> torch.Tensor:
        return honest(dataclasses.replace(ctx, seed=ctx.seed + torch.distributed.get_rank()), *rest)

    keyed.normal = normal


@fault
def a_sampler_that_depends_on_the_world() -> None:
    honest = Lanes.window

    def window(self: Lanes, start: int, *rest: Any) -> Any:
        return honest(self, start + torch.distributed.get_world_size() - 1, *rest)

    Lanes.window = window  # type: ignore[method-assign]


@fault
def statistics_from_the_wrong_group() -> None:
    honest = outside.Factored.square

    def square(self: outside.Factored) -> torch.Tensor:
        told = honest(self)
        torch.distributed.all_reduce(self.row_square_eD)  # with the other rank's, of other experts
        return told

    outside.Factored.square = square  # type: ignore[method-assign]


def run_faulty(fault: str | None, config: Config, layout: Layout, reference: Path) -> list[dict[str, Any]]:
    if fault:
        FAULTS[fault]()
    return run_layouts(config, [layout], 6, reference, True)


@pytest.fixture(scope="module")
def reference(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "reference.pt"
    run_distributed(run_faulty, 1, None, small(small_text, WHOLE), REFERENCE, path)
    return path


@pytest.mark.timeout(100)
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_planted_fault_is_reported(fault: str | None, small_text: Path, reference: Path) -> None:
    (told,), _ = run_distributed(
        run_faulty, 2, fault, small(small_text, WHOLE), Layout(2, 2, 0, 1), reference, timeout=90
    )
    off = max(told["loss"], told["norm"], told["weights"])
    assert (off > 1e-4 or told["widest_gap"] > verify.GAP) if fault else off < 1e-5, json.dumps(told)


def test_a_flip_within_rounding_is_counted_and_the_recorded_ranking_wins() -> None:
    word_T = torch.arange(3)
    ctx = Context(word_T, word_T * 0, word_T >= 0, 0, 0, True, 0, 3, 3, 1)
    recorder = Choices()
    recorder.pick(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 1.0 + 4e-6, 0.0]]), 1, torch.arange(3), ctx)
    replayer = Choices(recorder.recorded)
    # word 2 ranks experts 0 and 1 the other way, 4e-6 of its largest score apart; words lie elsewhere on this layout
    after = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0 + 4e-6, 1.0, 0.0]])
    order = torch.tensor([2, 0, 1])
    top, column = replayer.pick(after[order], 1, torch.arange(3), ctx.rows(order))
    assert column.tolist() == [[1, 0], [2, 1], [0, 1]]
    torch.testing.assert_close(top[0], torch.tensor([1.0, 1.0 + 4e-6]), rtol=0, atol=0)
    assert replayer.flips == 1 and 3e-6 < replayer.widest_gap < 5e-6
    # word 0 ranks them 3, 2, 1 where 1, 2, 3 is recorded: its first is 2 / 3 of the largest score off
    replayer.pick(torch.tensor([[3.0, 2.0, 1.0]]), 1, torch.arange(3), ctx.rows(torch.tensor([0])))
    assert replayer.flips == 2 and replayer.widest_gap == pytest.approx(2 / 3)


def test_command_line(small_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sets = [part for s in [*SMALL, f"data.text={small_text}", "steps=7"] for part in ("--set", s)]
    file = tmp_path / "told.json"
    assert (
        verify.main(["lstm_moe_demo", *sets, "--worlds", "1", "5", "--zero", "1", "--steps", "3", "--json", str(file)])
        == 0
    )
    said = capfd.readouterr().out
    assert "2 of 2 layouts within 1e-05 of one rank" in said
    assert "not a layout of this config: 5 ranks, ep 1, accumulation 1: batch.samples=24 is not a multiple" in said
    told = json.loads(file.read_text())
    assert [(t["world"], t["ep"], t["zero"], t["accumulation"]) for t in told["layouts"]] == [
        (1, 1, 1, 1),
        (1, 1, 1, 2),
    ]
    assert {"loss", "norm", "weights", "flips"} <= told["layouts"][0].keys()
    tight = ["--worlds", "1", "--zero", "3", "--steps", "3", "--tolerance", "1e-12"]
    assert verify.main(["lstm_moe_demo", *sets, *tight]) == 1
    with pytest.raises(SystemExit) as end:
        verify.main(["lstm_moe_demo", "--set", "model.moe.k=65"])
    assert end.value.code == 2 and "k=65" in capfd.readouterr().err
