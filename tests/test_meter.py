"""What is logged is what was trained on."""

from pathlib import Path

import pytest
from runs import Run, tiny

from moe_dist.clock import PARTS
from moe_dist.meter import Meter
from moe_dist.parallel import mesh as meshes
from moe_dist.parallel.spawn import run_distributed


@pytest.mark.timeout(120)
def test_a_line_adds_up_to_the_loss(small_text: Path) -> None:
    """Loss per word + balance loss is the step's loss, over 2 ranks, 2 micro-batches and 4 balance groups."""
    for total, line in run_distributed(one_line, 2, str(small_text), timeout=100):
        assert line["train/loss"] + line["train/balance_loss"] == pytest.approx(total, rel=1e-6)
        assert line["train/balance_loss"] > 1e-4
        # 8 samples of 6 words, 2 experts each
        assert sum(line["moe/middle/load"]) == 8 * 6 * 2
        # on average half of the rows go to the other rank: 48 of 96 rows of 16 float32, there and back, twice
        for direction in ("dispatch", "combine", "combine:grad"):
            assert line[f"exchange/site2/{direction}_bytes"] == pytest.approx(48 * 16 * 4, rel=0.4)
        assert line["exchange/site2/counts_bytes"] == 2 * 2 * 4 * 8  # 2 micro-batches, 2 ranks, 4 counts of 8 bytes
        # each part of the step takes some time, and each of two ranks more than 100 MB for Python and torch alone
        assert all(line[f"time/{part}_ms"] > 0 for part in PARTS)
        assert len(line["memory/peak_bytes"]) == 2 and min(line["memory/peak_bytes"]) > 1e8
        assert line["memory/largest_peak_bytes"] == max(line["memory/peak_bytes"])
        assert sum(line["moe/middle/importance"]) == pytest.approx(8 * 6, rel=1e-6)


def test_a_sum_goes_from_each_rank_to_the_next() -> None:
    """Of four ranks on two nodes the second sends to the third, on the other node, and the last to the first."""
    for rank, ending in enumerate(("", "_between_nodes", "", "_between_nodes")):
        axis = meshes.Axis(4, rank, None, (0, 0, 1, 1))  # type: ignore[arg-type]
        axis.count_ring(("experts", "gradients"), 100)
        axis.count_ring(("experts", "gradients"), 20)
        assert dict(axis.sent) == {("experts", f"gradients{ending}"): 120}


def one_line(text: str) -> tuple[float, dict]:
    meshes.join()
    sets = [
        "mesh.ep=2",
        "mesh.exchange=ragged",
        "batch.accumulation=2",
        "batch.samples_per_balance_group=2",
        f"data.text={text}",
    ]
    run = Run(tiny(*sets))
    meter = Meter(run.mesh, run.task)
    batches = list(run.task.batches(0))
    words = run.task.total(batches)
    balance = 0.0
    run.optimizer.begin(1e-4)
    with meter.step():
        for batch in batches:
            loss, sums, stats = run.task.loss(run.engine, batch, words)
            run.engine.backward(loss)
            meter.add(sums, stats)
            balance += loss.item() - sums["nll"].item() / words.item()
    line = meter.read()
    total = line["train/loss"] + balance  # every rank has the balance loss whole
    assert isinstance(total, float)
    meshes.stop()
    return total, line
