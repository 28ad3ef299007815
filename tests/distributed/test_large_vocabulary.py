"""The sampled softmax on any layout; rows that no token touches stay unchanged."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Run, tiny

from moe_dist.config.overrides import override
from moe_dist.config.papers import get
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.labels import TrafficKey
from moe_dist.distributed.spawn import run_distributed

SAMPLED = ["model.softmax_samples=20", "model.dropout=0.2"]
STEPS = 10


def train(text: str, layouts: list[tuple[int, int, int]], sets: list[str]) -> list[dict[str, Any]]:
    meshes.init_process_group()
    results = []
    for ep, zero, accumulation in layouts:
        more = [
            f"mesh.ep={ep}",
            f"zero_stage={zero}",
            f"batch.grad_accum_steps={accumulation}",
            f"data.text={text}",
            *sets,
        ]
        run = Run(tiny(*SAMPLED, *more)).steps(0, STEPS)
        weights = run.weights()
        results.append({"norms": run.norms, "losses": run.losses, "weights": weights})
    meshes.shutdown()
    return results


@pytest.mark.timeout(200)
def test_sampled_softmax_agrees_on_every_layout(small_text: Path) -> None:
    reference = run_distributed(train, 1, str(small_text), [(1, 0, 1)], [])[0][0]
    assert min(reference["norms"]) > 0.3, "clipping at 0.3 is active at every step"
    for world, layouts in (
        (1, [(1, 1, 2)]),
        (2, [(1, 3, 1), (2, 1, 2)]),
        (4, [(2, 1, 2), (4, 3, 1)]),
    ):
        told = run_distributed(train, world, str(small_text), layouts, [])
        for rank in told:
            for got, layout in zip(rank, layouts, strict=True):
                where = f"world {world}, ep, ZeRO, accumulation {layout}"
                assert got["norms"] == pytest.approx(reference["norms"], rel=1e-5), where
                assert got["losses"] == pytest.approx(reference["losses"], rel=1e-5), where
                for name, w in reference["weights"].items():
                    assert (got["weights"][name] - w).norm() <= 1e-5 * w.norm(), f"{name}: {where}"


@pytest.mark.timeout(200)
def test_bf16_rows_follow_their_masters_and_resume(small_text: Path, tmp_path: Path) -> None:
    for told in run_distributed(train_narrow, 2, str(small_text), tmp_path):
        assert told["norms"] == pytest.approx(told["wide norms"], rel=0.01)
        assert told["rounded"] and told["waited"] and told["same"]


def train_narrow(text: str, folder: Path) -> dict[str, Any]:
    meshes.init_process_group()
    sets = [
        *SAMPLED,
        "mesh.ep=2",
        "batch.grad_accum_steps=2",
        f"data.text={text}",
        "model.softmax_samples=5",
    ]
    config = tiny(*sets, "ds_config=bf16")
    run, wide = Run(config), Run(tiny(*sets))
    start = run.optimizer.row_tables["softmax"].named["softmax.w_VD"].master.clone()
    run.steps(0, 2)
    run.save(folder, 2)
    run.steps(2, 3), wide.steps(0, 3)
    again = Run(config)
    again.load(folder)
    again.steps(2, 3)
    table = run.optimizer.row_tables["softmax"]
    master = table.named["softmax.w_VD"]
    untouched = table.updates_V == 0
    expected, got = (
        run.optimizer.row_tables["softmax"].tensors(),
        again.optimizer.row_tables["softmax"].tensors(),
    )
    meshes.shutdown()
    return {
        "norms": run.norms,
        "wide norms": wide.norms,
        "rounded": master.p.dtype == torch.bfloat16
        and torch.equal(master.p, master.master.bfloat16()),
        "waited": 0 < untouched.sum() < 300
        and torch.equal(master.master[untouched], start[untouched]),
        "same": again.losses == run.losses[2:]
        and all(torch.equal(expected[k], got[k]) for k in expected),
    }


WORDS, WIDTH = 793_471, 512


@pytest.mark.slow  # fast: test_bf16_rows_follow_their_masters_and_resume, test_row_sparse_adam.py
@pytest.mark.timeout(280)
def test_step_at_793471_words_updates_touched_rows_alone(tmp_path: Path) -> None:
    """Two ranks, width 512. A rank sends n bytes in a ring all-reduce of n bytes on two ranks.
    Each module sends a byte per word and then n rows of 512 (softmax: and a bias) in float32."""
    text = tmp_path / "words.txt"
    text.write_text(
        "\n".join(" ".join(f"w{i}" for i in range(j, j + 50)) for j in range(0, 900_000, 50))
    )
    ranks = run_distributed(one_large_step, 2, str(text), timeout=260)
    for told in ranks:
        assert told["embedding"] == WORDS + told["inputs"] * WIDTH * 4
        assert told["softmax"] == WORDS + told["outputs"] * (WIDTH + 1) * 4
        assert told["inputs"] <= 8 * 5 and 1000 < told["outputs"] <= 4096 + 8 * 5
        assert told["changed"] == told["outputs"]
    gigabytes = sum(told["peak bytes"] for told in ranks) / 1e9
    # two matrices of 1.6 GB on each rank; Adam's moments take memory where rows were touched
    assert 6 < gigabytes < 24, f"{gigabytes:.1f} GB"


def one_large_step(text: str) -> dict[str, int]:
    meshes.init_process_group()
    sets = [
        "mesh.ep=2",
        f"data.text={text}",
        "batch.global_batch_size=8",
        "batch.seq_len=5",
        "model.softmax_samples=4096",
    ]
    run = Run(override(get("moe_4"), [*sets, "optim.warmup_steps=1"]))
    table = run.optimizer.row_tables["softmax"]
    weights = table.named["softmax.w_VD"].master
    before = weights.sum(1)
    run.steps(0, 1)
    told = {
        "embedding": run.mesh.bytes_sent[TrafficKey("embedding", "rows", False)],
        "softmax": run.mesh.bytes_sent[TrafficKey("softmax", "rows", False)],
        "inputs": int(run.optimizer.row_tables["embedding"].updates_V.sum()),
        "outputs": int(table.updates_V.sum()),
        "changed": int((weights.sum(1) != before).sum()),
        "peak bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    meshes.shutdown()
    return told
