"""The plots of a run: which exist, their axes, and that they show the numbers of the file."""

import json
import math
import pathlib
import re
import threading
import time
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_dist.monitoring.metric_keys import PARTS
from moe_dist.monitoring.metrics_file import read_metrics
from moe_dist.report import __main__ as report_command
from moe_dist.report import files as report_files
from moe_dist.report import plots


def layer(name: str, load: list[float]) -> dict[str, Any]:
    """Returns a layer's metrics, with a different number for each key."""
    percentiles = {f"moe/{name}/load_p{p}_over_mean": p / 50 for p in (10, 50, 90)}
    counts = {f"moe/{name}/dead_experts": load.count(0), f"moe/{name}/drop_rate": 0.025}
    ratios = {
        f"moe/{name}/importance_cv": 0.3,
        f"moe/{name}/load_cv": 0.4,
        f"moe/{name}/load_max_over_mean": 1.9,
    }
    return (
        percentiles
        | counts
        | ratios
        | {f"moe/{name}/tokens_per_expert": load, f"moe/{name}/importance_per_expert": load}
    )


def train_line(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "train/loss": 9 / step,
        "train/perplexity": math.exp(9 / step),
        "throughput/tokens_per_sec": 9000.0 + step,
        "throughput/tflops_per_device": 0.04 / step,
        "train/lr": 1e-3 * step,
        "train/grad_norm": 5.0 / step,
        "train/skipped_steps": 0,
    }


def write(run: pathlib.Path, lines: list[dict]) -> pathlib.Path:
    """Writes `lines` as a metrics file, with bare NaN and Infinity for such values."""
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def a_run(layers: dict[str, list[float]], **more: float) -> list[dict]:
    lines = []
    for step in range(1, 11):
        told = [layer(name, load) for name, load in layers.items()]
        lines.append(train_line(step) | {k: v for each in told for k, v in each.items()} | more)
        if step % 5 == 0:
            lines.append(
                {"step": step, "valid/loss": 10 / step, "valid/perplexity": math.exp(10 / step)}
            )
    return lines


def drawn(tmp_path: pathlib.Path, lines: list[dict]) -> dict[str, Figure]:
    return plots.all_plots(read_metrics(write(tmp_path, lines)), "tiny")


def line_of(axes: Axes, label: str | None = None) -> np.ndarray:
    """Returns the steps and values [2, n] of the curve with this label, or of the only one."""
    (line,) = [line for line in axes.lines if label is None or line.get_label() == label]
    return np.array(line.get_data())


def share(path: pathlib.Path, red: float, green: float, blue: float) -> float:
    """Returns the share of a picture's pixels with about this color."""
    pixel = matplotlib.image.imread(path)
    return float((abs(pixel[..., :3] - [red, green, blue]).max(axis=-1) < 0.1).mean())


def test_report_draws_every_plot(tmp_path):
    paths = report_files.write_report(
        write(tmp_path, a_run({"1": [1, 1, 1, 1], "blocks.2/moe": [4, 0, 0, 0]}))
    )
    assert {path.parent for path in paths} == {tmp_path / "report"}
    found = {path.name: path for path in paths}
    assert list(found) == [
        "loss.png",
        "perplexity.png",
        "load_1.png",
        "load_blocks.2_moe.png",
        "balance_1.png",
        "balance_blocks.2_moe.png",
        "speed.png",
        "optimizer.png",
    ]
    assert sorted((tmp_path / "report").iterdir()) == sorted(paths)
    for name in ("loss.png", "perplexity.png"):
        assert share(found[name], 0.12, 0.47, 0.71) > 1e-3  # train
        assert share(found[name], 1.0, 0.5, 0.05) > 1e-3  # valid
    balanced, unbalanced = found["load_1.png"], found["load_blocks.2_moe.png"]
    assert share(balanced, 0.02, 0.19, 0.38) < 0.05
    assert share(unbalanced, 0.02, 0.19, 0.38) > 0.4  # three of four experts get nothing
    assert share(unbalanced, 0.4, 0.0, 0.12) > 0.1  # one gets four times the mean
    assert [path.name for path in report_files.write_report(tmp_path, only_loads=True)] == list(
        found
    )[2:4]


def test_run_gets_the_plots_it_has_numbers_for(tmp_path):
    dense = {"loss", "perplexity", "speed", "optimizer"}
    sent = {"comm/middle/dispatch/intra_node_bytes": 2e6}
    assert drawn(tmp_path, a_run({})).keys() == dense
    assert drawn(tmp_path, a_run({"1": [1, 1]})).keys() == dense | {"load_1", "balance_1"}
    assert drawn(tmp_path, a_run({"1": [1, 1]}, **sent)).keys() == dense | {
        "load_1",
        "balance_1",
        "traffic",
    }
    assert (
        drawn(tmp_path, a_run({}, **{"comm/middle/dispatch/intra_node_bytes": 0.0})).keys() == dense
    )
    assert drawn(tmp_path, [{"step": 1, "moe/1/tokens_per_expert": [0.0, 0.0]}]).keys() == {
        "load_1"
    }
    assert drawn(tmp_path, [{"step": 1, "test/loss": 4.0}]).keys() == {"loss"}
    assert drawn(tmp_path, [{"step": 1, "else": 4.0}]) == {}


def test_axes_have_labels_and_units(tmp_path):
    lines = a_run(
        {"1": [2, 0, 1, 1]},
        **{"comm/middle/dispatch/intra_node_bytes": 2e6, "train/skipped_steps": 1},
    )
    found = drawn(tmp_path, lines)
    assert {
        stem: [axes.get_ylabel().replace("\n", " ") for axes in figure.axes]
        for stem, figure in found.items()
    } == {
        "loss": ["loss (nats per token)"],
        "perplexity": ["perplexity (log scale)"],
        "load_1": ["expert", "load relative to the mean (1.0 = balanced)"],
        "balance_1": [
            "CV over experts (std / mean)",
            "load of an expert (/ mean load)",
            "dead experts (of 4)",
            "drop rate (of assignments)",
        ],
        "speed": ["tokens per second (all ranks)", "TFLOPS per device (10¹² operations / s)"],
        "optimizer": ["learning rate", "gradient norm (before clipping)", "skipped steps (so far)"],
        "traffic": ["sent by all ranks (MB per step)"],
    }
    for stem, figure in found.items():
        lowest = figure.axes[0 if stem == "load_1" else -1]
        assert lowest.get_xlabel() == "training step"
        assert figure.axes[0].get_title().startswith("tiny: ")


def test_image_run_has_its_own_plots(tmp_path):
    lines = [
        {
            "step": step,
            "train/loss": 1.0,
            "train/accuracy": 0.5 + step / 100,
            "throughput/images_per_sec": 90.0,
        }
        for step in range(1, 5)
    ]
    lines.append(
        {
            "step": 4,
            "valid/loss": 2.0,
            "valid/accuracy": 0.5,
            "norms/ffn.gain": 3e-4,
            "norms/ffn.bias": 0.0,
        }
    )
    found = drawn(tmp_path, lines)
    assert {
        stem: figure.axes[0].get_ylabel().replace("\n", " ") for stem, figure in found.items()
    } == {
        "loss": "loss (nats per image)",
        "accuracy": "accuracy (fraction correct)",
        "norms": "divergence y over blocks",
        "speed": "images per second (all ranks)",
    }
    np.testing.assert_array_equal(line_of(found["norms"].axes[0], "ffn norm, gain"), [[4], [3e-4]])
    (accuracy,) = found["accuracy"].axes
    np.testing.assert_allclose(
        line_of(accuracy, "train (last 54.00 %)")[1], [0.51, 0.52, 0.53, 0.54]
    )


def test_curves_show_the_numbers_of_the_file(tmp_path):
    lines = a_run({"1": [2, 0, 1, 1]}, **{"train/skipped_steps": 3})
    found = drawn(tmp_path, lines)
    cv, load, dead, dropped = found["balance_1"].axes
    lr, norm, skipped = found["optimizer"].axes
    (loss,), (perplexity,), (words, tflops) = (
        found[stem].axes for stem in ("loss", "perplexity", "speed")
    )
    shown = {
        "train/loss": line_of(loss, "train (last 0.9)"),
        "valid/loss": line_of(loss, "valid (last 1)"),
        "train/perplexity": line_of(perplexity, "train (last 2.46)"),
        "moe/1/importance_cv": line_of(cv, "importance"),
        "moe/1/load_cv": line_of(cv, "load"),
        "moe/1/load_max_over_mean": line_of(load, "largest"),
        **{f"moe/1/load_p{p}_over_mean": line_of(load, f"{p}th percentile") for p in (10, 50, 90)},
        "moe/1/dead_experts": line_of(dead),
        "moe/1/drop_rate": line_of(dropped),
        "throughput/tokens_per_sec": line_of(words),
        "throughput/tflops_per_device": line_of(tflops),
        "train/lr": line_of(lr),
        "train/grad_norm": line_of(norm),
        "train/skipped_steps": line_of(skipped),
    }
    for key, data in shown.items():
        having = [line for line in lines if key in line]
        np.testing.assert_array_equal(
            data, [[line["step"] for line in having], [line[key] for line in having]]
        )
    for axes in (
        dead,
        dropped,
        words,
        skipped,
    ):  # a line of zeros is seen, and so is the top of the curve
        assert axes.get_ylim()[0] < 0 and axes.get_ylim()[1] > max(axes.lines[0].get_ydata())


def test_scale_is_logarithmic_for_a_wide_range(tmp_path):
    wide, narrow = (
        [train_line(1) | {"train/grad_norm": norm} for norm in pair]
        for pair in ((0.1, 5.0), (1.0, 5.0))
    )
    for lines, scale in ((wide, "log"), (narrow, "linear")):
        axes = drawn(tmp_path, lines)["optimizer"].axes[1]
        assert axes.get_yscale() == scale and ("(log scale)" in axes.get_ylabel()) == (
            scale == "log"
        )


def test_bytes_are_stacked_by_direction_and_by_place(tmp_path):
    sent = {"moe0/dispatch": 3e3, "moe0/dispatch_backward": 2e3, "moe1/dispatch": 1e3}
    lines = [
        {"step": step} | {f"comm/{k}/intra_node_bytes": n * step for k, n in sent.items()}
        for step in (10, 20)
    ]
    figure = drawn(tmp_path, lines)["traffic"]
    tops = [{patch.get_label(): patch.get_data() for patch in axes.patches} for axes in figure.axes]
    assert [list(each) for each in tops] == [
        ["dispatch", "dispatch (backward)"],
        ["moe0", "moe1"],
    ]
    for each, lowest in zip(tops, ([40, 80], [50, 100]), strict=True):  # kB
        first, second = each.values()
        np.testing.assert_array_equal(first.edges, [0, 10, 20])
        np.testing.assert_allclose(
            [first.values, second.values, second.baseline], [lowest, [60, 120], lowest]
        )
    assert {axes.get_ylabel() for axes in figure.axes} == {"sent by all ranks\n(kB per step)"}


def test_load_map_of_few_experts_has_one_row_each(tmp_path):
    pair = [4.0, 0.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0]
    lines = [{"step": step, "moe/1/tokens_per_expert": pair[step % 2]} for step in range(1, 601)]
    axes = drawn(tmp_path, lines)["load_1"].axes[0]
    shown = np.asarray(axes.collections[0].get_array())
    np.testing.assert_allclose(
        shown, np.repeat([[3.0], [1.0], [0.25], [0.25]], 300, axis=1)
    )  # 300 sums of 2 lines
    assert axes.get_xlim() == (0, 600) and axes.get_ylim() == (-0.5, 3.5)


def test_load_map_of_many_experts_shows_the_busiest_per_block(tmp_path):
    load = np.ones(1001)
    load[[5, 999]] = 3.0
    load[996:999] = 0.0
    figure = drawn(tmp_path, [{"step": 1, "moe/1/tokens_per_expert": load.tolist()}])["load_1"]
    axes = figure.axes[0]
    assert axes.get_ylabel() == "expert (a row: the busiest of 4)" and axes.get_ylim() == (
        -0.5,
        1000.5,
    )
    shown = np.asarray(axes.collections[0].get_array())[:, 0]
    assert shown.shape == (251,)  # the last row is expert 1000 alone
    expected = np.ones(251)
    expected[[1, 249]] = 3.0
    np.testing.assert_allclose(shown, expected / load.mean(), rtol=1e-5)
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size < 100_000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("number", [None, -math.inf, 0])
def test_single_line_and_nonfinite_numbers_are_drawn(tmp_path, number):
    whole = (
        train_line(1)
        | layer("1", [1.0, 3.0])
        | {"comm/middle/counts/intra_node_bytes": 8.0, "memory/peak_bytes_by_rank": [1e9, 2e9]}
    )
    whole |= {f"time/{part}_ms": 1.0 for part in PARTS}
    spoilt = {
        key: [number, 3.0] if isinstance(value, list) else number for key, value in whole.items()
    } | {"step": 1}
    for lines in ([spoilt], [whole, spoilt | {"step": 2}, whole | {"step": 3}]):
        found = {path.stem: path for path in report_files.write_report(write(tmp_path, lines))}
        assert {
            "loss",
            "perplexity",
            "load_1",
            "balance_1",
            "speed",
            "step_time",
            "optimizer",
            "memory",
        } <= found.keys()
        assert all(matplotlib.image.imread(path).std() > 0 for path in found.values())
    gap = drawn(tmp_path, lines)["loss"].axes[0].lines[0].get_ydata()
    np.testing.assert_array_equal(gap, [9.0, 0.0 if number == 0 else math.nan, 9.0])


def test_report_without_metrics_prints_one_line(tmp_path, monkeypatch, capfd):
    with pytest.raises(ValueError, match="no metrics file"):
        report_files.write_report(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(report_files.sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        report_command.main()
    (error,) = capfd.readouterr().err.splitlines()
    assert end.value.code == 2 and re.match(r"error: metrics file .*metrics\.jsonl is empty", error)


def test_any_run_name_can_be_drawn(tmp_path):
    run = write(tmp_path / r"lr$\alfa$", [train_line(1), train_line(2)])
    assert report_files.write_report(run)


def test_failing_report_does_not_fail_a_finished_run(tmp_path, capfd):
    (tmp_path / "metrics.jsonl").write_text("spoilt\n")
    report_files.try_to_write_all(tmp_path)
    (warning,) = capfd.readouterr().err.splitlines()
    assert (
        warning.startswith(f"warning: {tmp_path}/report.html and its plots cannot be written")
        and "line 1" in warning
    )


def test_two_threads_never_draw_at_once(tmp_path, monkeypatch):
    """matplotlib is not thread-safe; and a picture read while it is drawn again must be
    complete."""
    at_work, most = [], []

    def all_pictures(lines: list[dict], name: str) -> dict[str, Figure]:
        at_work.append(name)
        most.append(len(at_work))
        time.sleep(0.05)
        at_work.remove(name)
        figure = Figure(figsize=(1, 1))
        figure.subplots().plot([1, 2])
        return {"loss": figure}

    monkeypatch.setattr(plots, "all_plots", all_pictures)
    runs = [write(tmp_path / name, [train_line(1)]) for name in ("a", "b")]
    threads = [
        threading.Thread(target=report_files.write_all, args=(run,)) for run in (*runs, runs[0])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6 and matplotlib.image.imread(runs[0] / "report" / "loss.png").size


def test_drawn_files_are_returned_and_none_after_an_error(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(plots, "all_plots", lambda lines, name: {})
    run = write(tmp_path / "run", [train_line(1)])
    assert report_files.try_to_write_all(run) == [run / "report.html"]
    assert report_files.try_to_write_all(tmp_path / "nowhere") == []
    assert "cannot be written" in capfd.readouterr().err
