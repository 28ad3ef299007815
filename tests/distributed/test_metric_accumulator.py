"""Logged metrics are those of the training steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Run, tiny

from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.spawn import run_distributed
from moe_dist.monitoring.metric_keys import PARTS
from moe_dist.training import metric_accumulator as meters
from moe_dist.training.metric_accumulator import MetricAccumulator
from moe_dist.training.step import train_step


@pytest.mark.timeout(120)
def test_logged_losses_add_up(small_text: Path) -> None:
    """Loss per word + balance loss is the step's loss, over 2 ranks, 2 micro-batches and 4 balance
    groups.
    """
    for total, line in run_distributed(one_line, 2, str(small_text), timeout=100):
        assert line["train/loss"] + line["train/balance_loss"] == pytest.approx(total, rel=1e-6)
        assert line["train/balance_loss"] > 1e-4
        # 8 samples of 6 words, 2 experts each
        assert sum(line["moe/middle/tokens_per_expert"]) == 8 * 6 * 2
        # on average half of the rows go to the other rank: 48 of 96 rows of 16 float32, there and
        # back, twice
        for direction in ("dispatch", "combine", "combine_backward"):
            assert line[f"comm/middle/{direction}/intra_node_bytes"] == pytest.approx(
                48 * 16 * 4, rel=0.4
            )
        assert (
            line["comm/middle/counts/intra_node_bytes"] == 2 * 2 * 4 * 8
        )  # 2 micro-batches, 2 ranks, 4 counts of 8 bytes
        # each part of the step takes some time, and each of two ranks more than 100 MB for Python
        # and torch alone
        assert all(line[f"time/{part}_ms"] > 0 for part in PARTS)
        assert (
            len(line["memory/peak_bytes_by_rank"]) == 2
            and min(line["memory/peak_bytes_by_rank"]) > 1e8
        )
        assert line["memory/max_peak_bytes"] == max(line["memory/peak_bytes_by_rank"])
        assert sum(line["moe/middle/importance_per_expert"]) == pytest.approx(8 * 6, rel=1e-6)


STEPS = 3


@pytest.mark.timeout(120)
def test_balance_is_measured_per_step_and_averaged(small_text: Path) -> None:
    """On 2 ranks, with 1 and 2 micro-batches, summed over ranks once a line and after every step."""
    ranks = run_distributed(of_steps, 2, str(small_text), timeout=100)
    lines = []
    for i in range(2):
        line = ranks[0][i][0]
        lines.append(
            pytest.approx({key: line[f"moe/middle/{key}"] for key in meters.RATIOS}, rel=1e-5)
        )
        assert ranks[1][i][0] == line
        load_SE, importance_SE = ranks[0][i][1] + ranks[1][i][1]
        assert load_SE.sum(1).tolist() == [8 * 6 * 2] * STEPS
        share_SE = load_SE / load_SE.mean(1, keepdims=True)
        assert lines[-1] == {
            "importance_cv": np.mean(importance_SE.std(1) / importance_SE.mean(1)),
            "load_cv": np.mean(share_SE.std(1)),
            "load_max_over_mean": np.mean(share_SE.max(1)),
            **{
                f"load_p{p}_over_mean": np.mean(np.percentile(share_SE, p, axis=1))
                for p in (10, 50, 90)
            },
        }
        load_E = load_SE.sum(0)
        assert load_E.std() / load_E.mean() < 0.9 * line["moe/middle/load_cv"], (
            "of sums it would be another"
        )
        assert line["moe/middle/tokens_per_expert"] == load_E.tolist()
        assert line["moe/middle/dead_experts"] == (load_E == 0).sum()
    assert lines[0] == lines[1].expected


def of_steps(text: str) -> list[tuple[dict, np.ndarray]]:
    """Returns for each accumulation a line of three steps, and this rank's loads and
    importances of each (2, S, E)."""
    meshes.init_process_group()
    told = []
    for accumulation in (1, 2):
        run = Run(tiny(f"batch.grad_accum_steps={accumulation}", "mesh.ep=2", f"data.text={text}"))
        meter, used_2SE = (
            MetricAccumulator(run.mesh, run.task),
            torch.zeros(2, STEPS, 8, dtype=torch.float64),
        )
        meters.MAX_PENDING = 0 if accumulation == 2 else 2**23
        for step in range(1, STEPS + 1):
            with meter.step():
                for _, sums, stats in train_step(run.training, step):
                    meter.add(sums, stats)
                    used_2SE[0, step - 1] += stats["middle"].load_E
                    used_2SE[1, step - 1] += stats["middle"].importance_E
        told.append(
            (
                {
                    key: value
                    for key, value in meter.reduce_and_reset().items()
                    if key.startswith("moe/")
                },
                used_2SE.numpy(),
            )
        )
    meshes.shutdown()
    return told


def one_line(text: str) -> tuple[float, dict]:
    meshes.init_process_group()
    sets = [
        "mesh.ep=2",
        "mesh.dispatcher=all_to_all",
        "batch.grad_accum_steps=2",
        "batch.balance_loss_group_size=2",
        f"data.text={text}",
    ]
    run = Run(tiny(*sets))
    meter = MetricAccumulator(run.mesh, run.task)
    batches = list(run.task.batches(0))
    words = run.task.loss_denominator(batches)
    balance = 0.0
    run.optimizer.start_step(1e-4)
    with meter.step():
        for batch in batches:
            loss, sums, stats = run.task.loss(run.engine, batch, words)
            run.engine.backward(loss)
            meter.add(sums, stats)
            balance += loss.item() - sums["nll"].item() / words.item()
    line = meter.reduce_and_reset()
    total = line["train/loss"] + balance  # every rank has the balance loss whole
    assert isinstance(total, float)
    meshes.shutdown()
    return total, line
