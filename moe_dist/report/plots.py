"""Plots of runs, drawn from their metrics.

A plot is drawn if some line has its keys, and it has no panel for keys that no line has. Numbers
that are not finite are gaps. Every axis has a label with its unit.

Legend: n lines, E experts, P ranks.
"""

import itertools
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

from moe_dist.monitoring.metric_format import METRIC_FORMATS, byte_unit, format_metric
from moe_dist.monitoring.metric_keys import (
    DEAD_EXPERTS,
    DROP_RATE,
    GRAD_NORM,
    IMPORTANCE_CV,
    LEARNING_RATE,
    LOAD_CV,
    LOAD_MAX,
    NORMS_PREFIX,
    PARTS,
    PEAK_BYTES_BY_RANK,
    SKIPPED_STEPS,
    TFLOPS_PER_DEVICE,
    TOKENS_PER_EXPERT,
    bytes_sent_series,
    layer_key,
    layers_with,
    load_percentile,
    step_milliseconds,
    throughput_key,
    throughput_unit,
    time_key,
    timed_lines,
)

matplotlib.rcParams["text.parse_math"] = False  # a run name may contain a $

_LOAD_TICKS = {0.25: "≤ 0.25", 0.5: "0.5", 1.0: "1.0", 2.0: "2.0", 4.0: "≥ 4.0"}
_MAX_VALUE = 1e30  # a larger number is not drawn
# heat map cells, about as many as it has pixels; more are drawn in groups
_MAX_COLUMNS = 300
_MAX_ROWS = 256
_SPLIT_STYLES: dict[str, dict[str, Any]] = {
    "train": dict(color="tab:blue"),
    "valid": dict(color="tab:orange", linewidth=2, markersize=8),
    "test": dict(color="tab:red", linestyle="none", marker="*", markersize=14),
    "mismatched": dict(color="tab:purple", linestyle="none", marker="*", markersize=14),
}
_OVERLAY_STYLES: dict[str, dict[str, Any]] = {
    "train": dict(alpha=0.5),
    "valid": dict(linewidth=2, markersize=8),
}
_PERCENTILE_COLORS = {90: "tab:orange", 50: "black", 10: "tab:blue"}
_SIGNED_METRICS = ("matthews", "pearson", "spearman")
_OUTSIDE: dict[str, Any] = dict(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)  # a legend


def all_plots(lines: list[dict], name: str) -> dict[str, Figure]:
    """Draws every plot of a run.

    Args:
        lines: Its metrics, as `metrics_file.read_metrics` returns them.
        name: Run name for the titles.

    Returns:
        Figures by file name without suffix.
    """
    unit = throughput_unit(lines).removesuffix("s")
    figures: dict[str, Figure | None] = {
        "loss": _curves(lines, "loss", f"{name}: loss", f"loss (nats per {unit})")
    }
    for metric, known in METRIC_FORMATS.items():
        figures[metric] = _curves(lines, metric, f"{name}: {known.name}", known.axis)
    figures |= load_maps(lines, name)
    for layer in layers_with(lines, TOKENS_PER_EXPERT):
        figures[f"balance_{_stem(layer)}"] = _balance(lines, layer, name)
    figures |= {
        "norms": _norms(lines, name),
        "step_time": _step_time(lines, name),
        "speed": _speed(lines, name),
        "optimizer": _optimizer(lines, name),
        "traffic": _traffic(lines, name),
        "memory": _memory(lines, name),
    }
    return {stem: figure for stem, figure in figures.items() if figure}


def load_maps(lines: list[dict], name: str) -> dict[str, Figure]:
    """Draws a heat map for each MoE layer: each expert's load over time.

    Args:
        lines: Metrics, as `metrics_file.read_metrics` returns them.
        name: Run name for the titles.

    Returns:
        Figures by file name without suffix.
    """
    figures = {}
    for layer in layers_with(lines, TOKENS_PER_EXPERT):
        figures[f"load_{_stem(layer)}"] = _load_map(lines, layer, name)
    return figures


def overlay_runs(runs: dict[str, list[dict]]) -> dict[str, Figure]:
    """Draws several runs on the same axes, with a color for each run.

    Args:
        runs: Metrics by run name.

    Returns:
        Figures by file name without suffix; only those that show a number other than 0.
    """
    figures = {"loss": _overlay_metric(runs, "loss", "loss", "loss (nats)")}
    for metric, known in METRIC_FORMATS.items():
        figures[metric] = _overlay_metric(runs, metric, known.name, known.axis)
    unit = throughput_unit(list(itertools.chain(*runs.values())))
    overlays: dict[str, tuple[str, Callable[[dict], float | None]]] = {
        f"{unit} per second": ("of all ranks", lambda line: line.get(throughput_key(unit))),
        "time of a training step": ("milliseconds", step_milliseconds),
        "largest load of an expert": (
            "/ mean load, worst layer",
            lambda line: _worst_layer(line, LOAD_MAX),
        ),
        "drop rate": ("of assignments, worst layer", lambda line: _worst_layer(line, DROP_RATE)),
    }
    for title, (ylabel, value_of) in overlays.items():
        figures[title.replace(" ", "_")] = _overlay_value(runs, title, ylabel, value_of)
    drawn = {stem: figure for stem, figure in figures.items() if _shows_numbers(figure)}
    for stem, figure in drawn.items():
        _finish_overlay(stem, figure)
    return drawn


def _overlay_metric(runs: dict[str, list[dict]], metric: str, title: str, ylabel: str) -> Figure:
    """Draws a metric's train and valid curves; a run has one legend entry."""
    figure, (axes,) = _panels(f"{title}: train thin, valid thick", ylabel)
    for i, (name, lines) in enumerate(runs.items()):
        splits = [split for split in _OVERLAY_STYLES if _has(lines, f"{split}/{metric}")]
        for split in splits:
            label = name if split == splits[-1] else None
            style = _OVERLAY_STYLES[split]
            _plot(axes, lines, f"{split}/{metric}", color=_color(i), label=label, **style)
    return figure


def _overlay_value(
    runs: dict[str, list[dict]],
    title: str,
    ylabel: str,
    value_of: Callable[[dict], float | None],
) -> Figure:
    """Draws a value computed from each line of each run; a line without it is left out."""
    figure, (axes,) = _panels(title, ylabel)
    for i, (name, lines) in enumerate(runs.items()):
        points = []
        for line in lines:
            value = value_of(line)
            if value is not None:
                points.append({"step": line["step"], title: value})
        if points:
            _plot(axes, points, title, color=_color(i), label=name)
    return figure


def _shows_numbers(figure: Figure) -> bool:
    """Returns whether some curve has a number other than 0 (NaN counts as one)."""
    return any(np.any(curve.get_ydata()) for curve in figure.axes[0].lines)


def _finish_overlay(stem: str, figure: Figure) -> None:
    """Adds the legend and the scale."""
    (axes,) = figure.axes
    axes.legend()
    if stem in ("loss", *METRIC_FORMATS, "largest_load_of_an_expert"):
        _scale(axes, stem)
    else:
        _from_zero(axes)
    if stem == "drop_rate":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if stem == "time_of_a_training_step":
        _cut_first_steps(axes, _y_values(axes))


def _color(i: int) -> Any:
    return colormaps["tab10"](i % 10)


def _worst_layer(line: dict, statistic: str) -> float | None:
    """Returns the maximum of a statistic over the MoE layers; None if there is none."""
    layers = layers_with([line], statistic)
    return max((line[layer_key(layer, statistic)] for layer in layers), default=None)


def _stem(layer: str) -> str:
    """Returns a layer's name as part of a file name."""
    return layer.replace("/", "_")


def _lines_with(lines: list[dict], key: str) -> list[dict]:
    return [line for line in lines if key in line]


def _has(lines: list[dict], key: str) -> bool:
    return any(key in line for line in lines)


def _steps(lines: list[dict]) -> np.ndarray:
    return np.array([line["step"] for line in lines])


def _series(lines: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps, [n], and values, [n] or [n, E], from the lines that have `key`.

    Values that are infinite or too large for an axis become NaN.
    """
    lines = _lines_with(lines, key)
    values = np.array([line[key] for line in lines], dtype=float)
    return _steps(lines), np.where(np.abs(values) < _MAX_VALUE, values, np.nan)


def _edges(steps_n: np.ndarray) -> np.ndarray:
    """Returns the n + 1 edges for n spans of steps, given by their last steps.

    A span begins at the end of the previous one; the first is as long as the second.
    """
    start = 2 * steps_n[0] - steps_n[1] if len(steps_n) > 1 else steps_n[0] - 1
    return np.concatenate([[start], steps_n])


def _panels(title: str, *ylabels: str) -> tuple[Figure, list[Axes]]:
    """Returns a figure with one panel below the other, over a common axis of steps."""
    figure = Figure(figsize=(9, max(5, 2.2 * len(ylabels))), dpi=120, layout="constrained")
    panels = list(figure.subplots(len(ylabels), sharex=True, squeeze=False)[:, 0])
    for axes, ylabel in zip(panels, ylabels, strict=True):
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
    panels[0].set_title(title)
    panels[-1].set_xlabel("training step")
    panels[-1].xaxis.set_major_locator(_integer_ticks())
    figure.align_ylabels()
    return figure, panels


def _integer_ticks() -> MaxNLocator:
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def _plot(axes: Axes, lines: list[dict], key: str, **style: Any) -> None:
    """Adds a curve for `key`. Each point has a mark, because a point between gaps has no line."""
    steps_n, values_n = _series(lines, key)
    markersize = 7 if len(steps_n) <= 50 else 2
    defaults: dict[str, Any] = dict(linewidth=1, marker=".", markersize=markersize)
    axes.plot(steps_n, values_n, **(defaults | style))


def _y_values(axes: Axes) -> np.ndarray:
    return np.concatenate([np.asarray(curve.get_ydata()) for curve in axes.lines])


def _from_zero(axes: Axes, min_top: float = 0.0) -> None:
    """Lets the y axis begin a little below 0, so that a curve of zeros is visible.

    Its top is a little above the largest value and `min_top`.
    """
    top = max(axes.get_ylim()[1], min_top)
    axes.set_ylim(-0.05 * top, 1.05 * top)


def _count_from_zero(axes: Axes) -> None:
    """Scales the y axis for integers from 0."""
    _from_zero(axes, min_top=1)
    axes.yaxis.set_major_locator(_integer_ticks())


def _cut_first_steps(axes: Axes, values: np.ndarray) -> None:
    """Limits the y axis to twice the median.

    The first steps compile, and may take ten times as long as the others.
    """
    top = 2 * float(np.nanmedian(values)) if np.isfinite(values).any() else 0.0
    if 0 < top < axes.get_ylim()[1]:
        axes.set_ylim(-0.05 * top, top)


def _scale(axes: Axes, metric: str) -> None:
    """Sets per cent for a fraction, and perhaps a log scale for a metric that is never negative."""
    if metric in METRIC_FORMATS and METRIC_FORMATS[metric].is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif metric not in _SIGNED_METRICS:
        _log_if_wide(axes)


def _log_if_wide(axes: Axes) -> None:
    """Sets a log scale if the values span more than a factor of 10; less would have few ticks."""
    values = _y_values(axes)
    positive = values[values > 0]
    span = positive.max() / positive.min() if len(positive) else 1
    if span > 10:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 1000 else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_ylabel(f"{axes.get_ylabel()}\n(log scale)")


def _curves(lines: list[dict], metric: str, title: str, ylabel: str) -> Figure | None:
    """Draws a metric of all splits; the legend contains the last values."""
    figure, (axes,) = _panels(title, ylabel)
    for split, style in _SPLIT_STYLES.items():
        key = f"{split}/{metric}"
        if _has(lines, key):
            _, values_n = _series(lines, key)
            label = f"{split} (last {format_metric(metric, values_n[-1])})"
            _plot(axes, lines, key, label=label, **style)
    if not axes.lines:
        return None
    axes.legend()
    _scale(axes, metric)
    return figure


def _load_map(lines: list[dict], layer: str, name: str) -> Figure:
    """Draws each expert's load, divided by the mean over experts.

    A column sums a span of steps. A row is an expert; if there are too many, it is the
    busiest expert in a block of neighbors, which is near 1.0 only if no expert is overloaded.
    """
    steps_n, load_nE = _series(lines, layer_key(layer, TOKENS_PER_EXPERT))
    num_experts = load_nE.shape[1]
    spans = np.array_split(np.arange(len(steps_n)), min(len(steps_n), _MAX_COLUMNS))
    load_EC = np.stack([load_nE[span].sum(axis=0) for span in spans], axis=1)  # C columns
    relative_EC = load_EC / np.maximum(load_EC.mean(axis=0), 1e-9)
    block_size = -(-num_experts // _MAX_ROWS)
    block_starts = np.arange(0, num_experts, block_size)
    last_steps = steps_n[[span[-1] for span in spans]]

    ylabel = "expert" if block_size == 1 else f"expert (a row: the busiest of {block_size})"
    figure, (axes,) = _panels(f"{name}: load of MoE layer {layer}", ylabel)
    axes.grid(False)
    axes.yaxis.set_major_locator(_integer_ticks())
    low = min(_LOAD_TICKS)
    high = max(_LOAD_TICKS)
    cells = axes.pcolormesh(
        _edges(last_steps),
        np.append(block_starts, num_experts) - 0.5,
        np.maximum.reduceat(relative_EC, block_starts).clip(low, high),
        norm=LogNorm(low, high),
        cmap="RdBu_r",
    )
    bar = figure.colorbar(cells, label="load relative to the mean (1.0 = balanced)")
    bar.set_ticks(list(_LOAD_TICKS), labels=list(_LOAD_TICKS.values()), minor=False)
    bar.minorticks_off()
    return figure


def _balance(lines: list[dict], layer: str, name: str) -> Figure | None:
    """Draws how evenly a layer uses its experts."""
    if not _has(lines, layer_key(layer, LOAD_CV)):
        return None
    num_experts = _series(lines, layer_key(layer, TOKENS_PER_EXPERT))[1].shape[1]
    figure, (cv, load, dead, dropped) = _panels(
        f"{name}: balance of MoE layer {layer}",
        "CV over experts\n(std / mean)",
        "load of an expert\n(/ mean load)",
        f"dead experts\n(of {num_experts})",
        "drop rate\n(of assignments)",
    )
    wide: dict[str, Any] = dict(color="tab:green", linewidth=4, alpha=0.4)
    _plot(cv, lines, layer_key(layer, IMPORTANCE_CV), label="importance", **wide)
    _plot(cv, lines, layer_key(layer, LOAD_CV), label="load", color="tab:blue")
    _plot(load, lines, layer_key(layer, LOAD_MAX), label="largest", color="tab:red")
    for percent, color in _PERCENTILE_COLORS.items():
        key = layer_key(layer, load_percentile(percent))
        _plot(load, lines, key, label=f"{percent}th percentile", color=color)
    steps_n, low_n = _series(lines, layer_key(layer, load_percentile(10)))
    _, high_n = _series(lines, layer_key(layer, load_percentile(90)))
    load.fill_between(steps_n, low_n, high_n, color="gray", alpha=0.2)
    _plot(dead, lines, layer_key(layer, DEAD_EXPERTS), color="tab:purple")
    _plot(dropped, lines, layer_key(layer, DROP_RATE), color="tab:brown")
    cv.legend(**_OUTSIDE)
    load.legend(**_OUTSIDE)
    _from_zero(cv)
    _log_if_wide(load)
    _count_from_zero(dead)
    _from_zero(dropped, min_top=0.01)
    dropped.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _norms(lines: list[dict], name: str) -> Figure | None:
    """Draws the divergence between the LayerNorms of blocks."""
    keys = {key for key in itertools.chain(*lines) if key.startswith(NORMS_PREFIX)}
    if not keys:
        return None
    figure, (axes,) = _panels(f"{name}: LayerNorms of blocks", "divergence y over blocks")
    for key in sorted(keys):
        _plot(axes, lines, key, label=key.removeprefix(NORMS_PREFIX).replace(".", " norm, "))
    axes.legend(**_OUTSIDE)
    _from_zero(axes)
    return figure


def _speed(lines: list[dict], name: str) -> Figure | None:
    """Draws throughput and TFLOPS."""
    unit = throughput_unit(lines)
    if not _has(lines, throughput_key(unit)):
        return None
    figure, (speed, tflops) = _panels(
        f"{name}: speed of training steps",
        f"{unit} per second\n(all ranks)",
        "TFLOPS per device\n(10¹² operations / s)",
    )
    _plot(speed, lines, throughput_key(unit), color="tab:blue")
    _plot(tflops, lines, TFLOPS_PER_DEVICE, color="tab:green")
    speed.yaxis.set_major_formatter("{x:,.0f}")
    _from_zero(speed)
    _from_zero(tflops)
    return figure


def _optimizer(lines: list[dict], name: str) -> Figure | None:
    """Draws learning rate and gradient norm, and skipped steps if there are any."""
    if not _has(lines, LEARNING_RATE):
        return None
    ylabels = ["learning rate", "gradient norm\n(before clipping)"]
    has_skipped = any(line.get(SKIPPED_STEPS, 0) > 0 for line in lines)
    if has_skipped:
        ylabels.append("skipped steps\n(so far)")
    figure, panels = _panels(f"{name}: optimizer", *ylabels)
    lr = panels[0]
    norm = panels[1]
    _plot(lr, lines, LEARNING_RATE, color="tab:blue")
    lr.yaxis.set_major_formatter("{x:g}")
    _from_zero(lr)
    _plot(norm, lines, GRAD_NORM, color="tab:red")
    _log_if_wide(norm)
    if has_skipped:
        _plot(panels[2], lines, SKIPPED_STEPS, color="tab:purple")
        _count_from_zero(panels[2])
    return figure


def _traffic(lines: list[dict], name: str) -> Figure | None:
    """Draws the bytes sent to other ranks, stacked by direction.

    If there are several links or several places (layers, groups of parameters), they are stacked in
    panels below.
    """
    lines, sent = bytes_sent_series(lines)
    if not any(bytes_n.any() for bytes_n in sent.values()):
        return None
    by_direction: dict[str, np.ndarray] = {}
    by_link: dict[str, np.ndarray] = {}
    by_place: dict[str, np.ndarray] = {}
    for (direction, link, place), bytes_n in sent.items():
        by_direction[direction] = by_direction.get(direction, 0) + bytes_n
        by_link[link] = by_link.get(link, 0) + bytes_n
        by_place[place] = by_place.get(place, 0) + bytes_n
    stacks = [by_direction]
    if len(by_link) > 1:
        stacks.append(by_link)
    if len(by_place) > 1:
        stacks.append(by_place)
    size, unit = byte_unit(np.sum(list(sent.values()), axis=0).max())
    ylabels = [f"sent by all ranks\n({unit} per step)"] * len(stacks)
    figure, panels = _panels(f"{name}: sent to other ranks", *ylabels)
    for axes, stack in zip(panels, stacks, strict=True):
        _stack(axes, _edges(_steps(lines)), stack, size)
    return figure


def _step_time(lines: list[dict], name: str) -> Figure | None:
    """Draws the milliseconds per step, stacked by part."""
    lines = timed_lines(lines)
    if not lines:
        return None
    title = f"{name}: time of a training step by part"
    figure, (axes,) = _panels(title, "milliseconds per step\n(mean of the ranks)")
    part_ms: dict[str, np.ndarray] = {}
    for part in PARTS:
        _, ms_n = _series(lines, time_key(part))
        part_ms[part] = np.nan_to_num(ms_n)
    _stack(axes, _edges(_steps(lines)), part_ms)
    _cut_first_steps(axes, sum(part_ms.values(), np.zeros(len(lines))))
    return figure


def _memory(lines: list[dict], name: str) -> Figure | None:
    """Draws the peak memory on the largest and on the smallest rank."""
    lines = _lines_with(lines, PEAK_BYTES_BY_RANK)
    if not lines:
        return None
    size, unit = byte_unit(max(float(line[PEAK_BYTES_BY_RANK].max()) for line in lines))
    figure, (axes,) = _panels(f"{name}: memory of a rank", f"peak memory so far\n({unit})")
    # a resumed run may have other ranks, so a curve may mix ranks
    for label, select, color in (("largest", max, "tab:red"), ("smallest", min, "tab:blue")):
        points = []
        for line in lines:
            points.append({"step": line["step"], label: select(line[PEAK_BYTES_BY_RANK]) / size})
        _plot(axes, points, label, color=color, label=f"{label} rank")
    axes.legend(**_OUTSIDE)
    _from_zero(axes)
    return figure


def _stack(
    axes: Axes, edges: np.ndarray, values: dict[str, np.ndarray], unit_size: float = 1.0
) -> None:
    """Draws areas on top of each other, and a legend in the same order."""
    base = np.zeros(len(edges) - 1)
    for i, (label, value_n) in enumerate(values.items()):
        color = colormaps["viridis"](i / max(1, len(values) - 1))
        height = value_n / unit_size
        axes.stairs(base + height, edges, baseline=base, fill=True, color=color, label=label)
        base = base + height
    axes.legend(reverse=True, **_OUTSIDE)
    _from_zero(axes)
