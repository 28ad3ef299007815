"""The layout is not part of the result: ZeRO 0 to 3 x world 1, 2, 4 x every ep x accumulation 1, 2."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import deviation
from runs import Run, tiny

from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.spawn import run_distributed

STEPS = 20
Result = dict[str, Any]


@pytest.fixture(scope="module")
def one_rank(small_text: Path) -> Result:
    return run_distributed(train, 1, str(small_text), [(1, 0, 1)])[0][0]


def train(text: str, layouts: list[tuple[int, int, int]], more: Sequence[str] = ()) -> list[Result]:
    """Trains under each (ep, zero, accumulation) and returns norms, losses, weights and this
    rank's bytes."""
    meshes.init_process_group()
    results = []
    for ep, zero, accumulation in layouts:
        sets = [
            f"mesh.ep={ep}",
            f"zero_stage={zero}",
            f"batch.grad_accum_steps={accumulation}",
            f"data.text={text}",
        ]
        run = Run(tiny(*sets, *more)).steps(0, STEPS)
        weights = run.weights()
        keep = weights if run.mesh.is_main else None
        results.append(
            {"norms": run.norms, "losses": run.losses, "weights": keep, "bytes": bytes_of(run)}
        )
    meshes.shutdown()
    return results


def bytes_of(run: Run) -> dict[str, int]:
    """Returns the bytes of this rank's parameters and state by kind."""
    flat = run.engine.flat_masters()
    moments = [run.optimizer.state[p][m] for p in flat for m in ("exp_avg", "exp_avg_sq")]
    parameters = [getattr(p, "ds_tensor", p) for p in run.engine.names.values()]
    experts = run.optimizer.experts.values()
    return {
        "dense optimizer state": sum(t.nbytes for t in moments),
        "dense parameters": sum(t.nbytes for t in parameters),
        "experts": sum(e.p.nbytes for e in experts),
        "expert optimizer state": sum(e.row_eD.nbytes + e.column_eF.nbytes for e in experts),
    }


def every_layout(world: int) -> list[tuple[int, int, int]]:
    """Every (ep, ZeRO stage, accumulation): one micro-batch or two, and with experts spread over
    two ranks both.
    """
    layouts = []
    for ep in (1, 2, 4):
        if world % ep == 0:
            for zero in (0, 1, 2, 3):
                both = world == 2 and ep == 2
                layouts += [(ep, zero, acc) for acc in ((1, 2) if both else (1 + (zero + ep) % 2,))]
    return layouts


@pytest.mark.timeout(420)
@pytest.mark.parametrize(
    ("world", "layouts"),
    [
        pytest.param(1, every_layout(1), id="1"),
        pytest.param(2, every_layout(2), id="2"),
        pytest.param(4, [(1, 3, 1), (2, 1, 2), (4, 2, 1)], id="4-some"),
        pytest.param(4, every_layout(4), id="4-all", marks=pytest.mark.slow),
    ],
)
def test_every_layout_equals_one_rank(
    world: int, layouts: list[tuple[int, int, int]], one_rank: Result, small_text: Path
) -> None:
    by_rank = run_distributed(train, world, str(small_text), layouts, timeout=400)
    assert min(one_rank["norms"]) > 0.3, "clipping at 0.3 is active at every step"
    for i, (ep, zero, accumulation) in enumerate(layouts):
        where = f"world {world}, ep {ep}, ZeRO {zero}, accumulation {accumulation}"
        got = by_rank[0][i]
        assert got["norms"] == pytest.approx(one_rank["norms"], rel=1e-5), where
        assert got["losses"] == pytest.approx(one_rank["losses"], rel=1e-5), where
        assert deviation(got["weights"], one_rank["weights"]) < 1e-5, where
        for result in by_rank:
            check_bytes(result[i]["bytes"], one_rank["bytes"], world, ep, zero, where)
            assert result[i]["norms"] == got["norms"], f"one norm on every rank: {where}"


def check_bytes(
    mine: dict[str, int], whole: dict[str, int], world: int, ep: int, zero: int, where: str
) -> None:
    """Checks exactly 1/ep of the experts and 1/world of their state; 1/world of what ZeRO
    shards, except for padding of a few elements per parameter."""
    assert mine["experts"] == whole["experts"] // ep, where
    assert mine["expert optimizer state"] == whole["expert optimizer state"] // world, where
    state_shards, parameter_shards = world if zero >= 1 else 1, world if zero == 3 else 1
    assert mine["dense optimizer state"] == pytest.approx(
        whole["dense optimizer state"] / state_shards, rel=0.01
    ), where
    assert mine["dense parameters"] == pytest.approx(
        whole["dense parameters"] / parameter_shards, rel=0.01
    ), where


HIERARCHICAL = ["model.moe.num_experts=16", "model.moe.num_groups=4"]


@pytest.mark.timeout(200)
def test_hierarchical_layouts_agree(small_text: Path) -> None:
    reference = run_distributed(train, 1, str(small_text), [(1, 0, 1)], HIERARCHICAL)[0][0]
    layouts = [(1, 3, 1), (2, 1, 2), (4, 3, 1)]
    for got, where in zip(
        run_distributed(train, 4, str(small_text), layouts, HIERARCHICAL)[0], layouts, strict=True
    ):
        assert got["norms"] == pytest.approx(reference["norms"], rel=1e-5), where
        assert deviation(got["weights"], reference["weights"]) < 1e-5, where


@pytest.mark.timeout(200)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bf16_follows_float32(zero: int, small_text: Path) -> None:
    """With bf16 compute and float32 masters of dense and expert weights the first norms are those
    of float32 to a few units of bf16's 2^-8, and twenty steps of 1e-4 add up in the masters, which
    bf16 weights of 0.1 would round away.
    """
    results = run_distributed(train_bf16, 2, str(small_text), zero, timeout=180)
    for result in results:
        assert result["bf16 norms"] == pytest.approx(result["fp32 norms"], rel=0.005)
        assert result["moved"] == pytest.approx([1.0, 1.0], abs=0.01)


def train_bf16(text: str, zero: int) -> dict[str, Any]:
    meshes.init_process_group()
    sets = ["mesh.ep=2", f"zero_stage={zero}", f"data.text={text}", "batch.grad_accum_steps=2"]
    bf16, fp32 = Run(tiny(*sets, "ds_config=bf16")), Run(tiny(*sets))
    ratios = zip(movement(bf16), movement(fp32), strict=True)
    moved = [narrow / wide for narrow, wide in ratios]
    for e in bf16.optimizer.experts.values():
        assert e.p.dtype == torch.bfloat16 and e.master.dtype == torch.float32
        assert torch.equal(e.p, e.master.bfloat16())
    meshes.shutdown()
    return {"bf16 norms": bf16.norms, "fp32 norms": fp32.norms, "moved": moved}


def movement(run: Run) -> list[float]:
    """Returns the distance of each expert stack from its start."""
    start = {name: e.master.clone() for name, e in run.optimizer.experts.items()}
    run.steps(0, STEPS)
    return [(e.master - start[name]).norm().item() for name, e in run.optimizer.experts.items()]
