"""Pictures of a run, drawn from the lines of its metrics file. Every axis names what it shows, and its unit.

A picture is drawn where a line has its keys, and has no panel for what was never there. What is not finite is a gap.

Legend: n lines, E experts.
"""

import re
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
)
from moe_dist.monitoring.step_timer import PARTS

matplotlib.rcParams["text.parse_math"] = False  # a run may be named with a $

_LOAD_TICKS = {0.25: "≤ 0.25", 0.5: "0.5", 1.0: "1.0", 2.0: "2.0", 4.0: "≥ 4.0"}
_MOST = 1e30  # of what is drawn
_COLUMNS, _ROWS = (
    300,
    256,
)  # most of a heat map, near what its pixels can show: more are drawn in groups
_STYLES: dict[str, dict[str, Any]] = {
    "train": dict(color="tab:blue"),
    "valid": dict(color="tab:orange", linewidth=2, markersize=8),
    "test": dict(color="tab:red", linestyle="none", marker="*", markersize=14),
    "mismatched": dict(color="tab:purple", linestyle="none", marker="*", markersize=14),
}
_PERCENTILES = {90: "tab:orange", 50: "black", 10: "tab:blue"}
_OUTSIDE: dict[str, Any] = dict(
    loc="upper left", bbox_to_anchor=(1, 1), frameon=False
)  # a legend beside its lines


def all_plots(lines: list[dict], name: str) -> dict[str, Figure]:
    """Every picture of the run `name`, by file name without ending; `lines` as `metrics.read_metrics` has them."""
    drawn = {
        "loss": _curves(
            lines,
            "loss",
            f"{name}: loss",
            f"loss (nats per {throughput_unit(lines).removesuffix('s')})",
        ),
        **{
            key: _curves(lines, key, f"{name}: {known.name}", known.axis)
            for key, known in METRIC_FORMATS.items()
        },
        **load_maps(lines, name),
        **{f"balance_{_stem(layer)}": _balance(lines, layer, name) for layer in _layers(lines)},
        "norms": _norms(lines, name),
        "step_time": _step_time(lines, name),
        "speed": _speed(lines, name),
        "optimizer": _optimizer(lines, name),
        "traffic": _traffic(lines, name),
        "memory": _memory(lines, name),
    }
    return {stem: figure for stem, figure in drawn.items() if figure}


def overlay_runs(runs: dict[str, list[dict]]) -> dict[str, Figure]:
    """Curves of several runs, their lines by name, on the same axes in a colour for each, by file name."""
    unit = throughput_unit([line for lines in runs.values() for line in lines])
    splits: dict[str, dict[str, Any]] = {
        "train": dict(alpha=0.5),
        "valid": dict(linewidth=2, markersize=8),
    }
    drawn: dict[str, Figure] = {}
    for quantity, (what, ylabel) in {
        "loss": ("loss", "loss (nats)"),
        **{key: (known.name, known.axis) for key, known in METRIC_FORMATS.items()},
    }.items():
        figure, (axes,) = _panels(f"{what}: train thin, valid thick", ylabel)
        for i, (name, lines) in enumerate(runs.items()):
            told = [
                (split, style)
                for split, style in splits.items()
                if _has(lines, f"{split}/{quantity}")
            ]
            for split, style in told:
                label = name if split == told[-1][0] else None
                _plot(axes, lines, f"{split}/{quantity}", color=_color(i), label=label, **style)
        drawn[quantity] = figure
    of_line: dict[str, tuple[str, Callable[[dict], float | None]]] = {
        f"{unit} per second": ("of all ranks", lambda line: line.get(throughput_key(unit))),
        "time of a training step": ("milliseconds", step_milliseconds),
        "largest load of an expert": (
            "/ mean load, worst layer",
            lambda line: _worst(line, LOAD_MAX),
        ),
        "drop rate": ("of assignments, worst layer", lambda line: _worst(line, DROP_RATE)),
    }
    for title, (ylabel, of) in of_line.items():
        figure, (axes,) = _panels(title, ylabel)
        for i, (name, lines) in enumerate(runs.items()):
            of_run = [
                {"step": line["step"], title: value}
                for line in lines
                if (value := of(line)) is not None
            ]
            if of_run:
                _plot(axes, of_run, title, color=_color(i), label=name)
        drawn[title.replace(" ", "_")] = figure
    drawn = {
        stem: figure
        for stem, figure in drawn.items()
        if any(np.any(x.get_ydata()) for x in figure.axes[0].lines)
    }
    for stem, figure in drawn.items():
        (axes,) = figure.axes
        axes.legend()
        if stem in ("loss", *METRIC_FORMATS, "largest_load_of_an_expert"):
            _scale(axes, stem)
        else:
            _from_zero(axes)
        if stem == "drop_rate":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if stem == "time_of_a_training_step":
            _cut_start(axes, np.concatenate([np.asarray(line.get_ydata()) for line in axes.lines]))
    return drawn


def _color(i: int) -> Any:
    return colormaps["tab10"](i % 10)


def _worst(line: dict, what: str) -> float | None:
    return max(
        (value for key, value in line.items() if re.fullmatch(layer_key(".+", what), key)),
        default=None,
    )


def _cut_start(axes: Axes, values: np.ndarray) -> None:
    """Leaves room for twice the median: the first steps compile, and may take ten times as long as the others."""
    top = 2 * float(np.nanmedian(values)) if np.isfinite(values).any() else 0.0
    if 0 < top < axes.get_ylim()[1]:
        axes.set_ylim(-0.05 * top, top)


def load_maps(lines: list[dict], name: str) -> dict[str, Figure]:
    """A heat map for each MoE layer: the load of each expert over time."""
    return {f"load_{_stem(layer)}": _load_map(lines, layer, name) for layer in _layers(lines)}


def _layers(lines: list[dict]) -> list[str]:
    return layers_with(lines, TOKENS_PER_EXPERT)


def _stem(layer: str) -> str:
    return layer.replace("/", "_")


def _series(lines: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps, of shape [n], and values, of shape [n] or [n, E], of the lines that have `key`; NaN for what
    is infinite or too large for an axis."""
    having = [line for line in lines if key in line]
    values = np.array([line[key] for line in having], dtype=float)
    return np.array([line["step"] for line in having]), np.where(
        np.abs(values) < _MOST, values, np.nan
    )


def _edges(ends: np.ndarray) -> np.ndarray:
    """From the last step of each span (n) its edges (n + 1): a span begins where the one before it ends."""
    return np.concatenate([[2 * ends[0] - ends[1] if len(ends) > 1 else ends[0] - 1], ends])


def _panels(title: str, *ylabels: str) -> tuple[Figure, list[Axes]]:
    """Axes one below the other, over one axis of steps."""
    figure = Figure(figsize=(9, max(5, 2.2 * len(ylabels))), dpi=120, layout="constrained")
    panels = list(figure.subplots(len(ylabels), sharex=True, squeeze=False)[:, 0])
    for axes, ylabel in zip(panels, ylabels, strict=True):
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
    panels[0].set_title(title)
    panels[-1].set_xlabel("training step")
    panels[-1].xaxis.set_major_locator(_integers())
    figure.align_ylabels()
    return figure, panels


def _integers() -> MaxNLocator:
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def _plot(axes: Axes, lines: list[dict], key: str, **style: Any) -> None:
    steps, values = _series(lines, key)
    marks: dict[str, Any] = dict(
        marker=".", markersize=7 if len(steps) <= 50 else 2
    )  # one between gaps has no line
    axes.plot(steps, values, **dict(linewidth=1) | marks | style)


def _has(lines: list[dict], key: str) -> bool:
    return any(key in line for line in lines)


def _from_zero(axes: Axes, least_top: float = 0.0) -> None:
    """From a little below 0, where a line of zeros can be seen, to the largest value or `least_top`."""
    top = max(axes.get_ylim()[1], least_top)
    axes.set_ylim(-0.05 * top, 1.05 * top)


def _count_from_zero(axes: Axes) -> None:
    _from_zero(axes, least_top=1)
    axes.yaxis.set_major_locator(_integers())


def _scale(axes: Axes, quantity: str) -> None:
    """Per cent for a share; a log scale where it helps, for what is never below zero."""
    if quantity in METRIC_FORMATS and METRIC_FORMATS[quantity].is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif quantity not in ("matthews", "pearson", "spearman"):
        _log_where_it_helps(axes)


def _log_where_it_helps(axes: Axes) -> None:
    """A log scale for values that span more than a factor of ten; over less it would have hardly a tick."""
    values = np.concatenate([np.asarray(line.get_ydata()) for line in axes.lines])
    positive = values[values > 0]
    span = positive.max() / positive.min() if len(positive) else 1
    if span > 10:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 1000 else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_ylabel(f"{axes.get_ylabel()}\n(log scale)")


def _curves(lines: list[dict], quantity: str, title: str, ylabel: str) -> Figure | None:
    """`quantity` of the train, valid and test lines; the legend names the last values."""
    figure, (axes,) = _panels(title, ylabel)
    for split, style in _STYLES.items():
        if _has(lines, key := f"{split}/{quantity}"):
            last = format_metric(quantity, _series(lines, key)[1][-1])
            _plot(axes, lines, key, label=f"{split} (last {last})", **style)
    if not axes.lines:
        return None
    axes.legend()
    _scale(axes, quantity)
    return figure


def _load_map(lines: list[dict], layer: str, name: str) -> Figure:
    """The load of each expert relative to the mean over experts. Columns are sums over steps; rows are experts, or
    where they are too many the busiest of each block of neighbours: near the mean everywhere only if all experts are.
    """
    steps, loads = _series(lines, layer_key(layer, TOKENS_PER_EXPERT))
    num_experts = loads.shape[1]
    spans = np.array_split(np.arange(len(steps)), min(len(steps), _COLUMNS))
    loads = np.stack([loads[span].sum(axis=0) for span in spans], axis=1)  # (E, columns)
    relative = loads / np.maximum(loads.mean(axis=0), 1e-9)
    block = -(-num_experts // _ROWS)
    blocks = np.arange(0, num_experts, block)

    figure, (axes,) = _panels(
        f"{name}: load of MoE layer {layer}",
        "expert" if block == 1 else f"expert (a row: the busiest of {block})",
    )
    axes.grid(False)
    axes.yaxis.set_major_locator(_integers())
    low, high = min(_LOAD_TICKS), max(_LOAD_TICKS)
    mesh = axes.pcolormesh(
        _edges(steps[[span[-1] for span in spans]]),
        np.append(blocks, num_experts) - 0.5,
        np.maximum.reduceat(relative, blocks).clip(low, high),
        norm=LogNorm(low, high),
        cmap="RdBu_r",
    )
    bar = figure.colorbar(mesh, label="load relative to the mean (1.0 = balanced)")
    bar.set_ticks(list(_LOAD_TICKS), labels=list(_LOAD_TICKS.values()), minor=False)
    bar.minorticks_off()
    return figure


def _balance(lines: list[dict], layer: str, name: str) -> Figure | None:
    """How evenly the experts of a layer are used."""
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
    _plot(
        cv,
        lines,
        layer_key(layer, IMPORTANCE_CV),
        color="tab:green",
        linewidth=4,
        alpha=0.4,
        label="importance",
    )
    _plot(cv, lines, layer_key(layer, LOAD_CV), color="tab:blue", label="load")
    _plot(load, lines, layer_key(layer, LOAD_MAX), color="tab:red", label="largest")
    for percent, color in _PERCENTILES.items():
        _plot(
            load,
            lines,
            layer_key(layer, load_percentile(percent)),
            color=color,
            label=f"{percent}th percentile",
        )
    steps, low = _series(lines, layer_key(layer, load_percentile(10)))
    load.fill_between(
        steps,
        low,
        _series(lines, layer_key(layer, load_percentile(90)))[1],
        color="gray",
        alpha=0.2,
    )
    _plot(dead, lines, layer_key(layer, DEAD_EXPERTS), color="tab:purple")
    _plot(dropped, lines, layer_key(layer, DROP_RATE), color="tab:brown")
    for axes in (cv, load):
        axes.legend(**_OUTSIDE)
    _from_zero(cv)
    _log_where_it_helps(load)
    _count_from_zero(dead)
    _from_zero(dropped, least_top=0.01)
    dropped.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _norms(lines: list[dict], name: str) -> Figure | None:
    """How far the LayerNorms of blocks have gone apart."""
    keys = sorted({key for line in lines for key in line if key.startswith(NORMS_PREFIX)})
    if not keys:
        return None
    figure, (axes,) = _panels(f"{name}: LayerNorms of blocks", "divergence y over blocks")
    for key in keys:
        _plot(axes, lines, key, label=key.removeprefix(NORMS_PREFIX).replace(".", " norm, "))
    axes.legend(**_OUTSIDE)
    _from_zero(axes)
    return figure


def _speed(lines: list[dict], name: str) -> Figure | None:
    unit = throughput_unit(lines)
    if not _has(lines, throughput_key(unit)):
        return None
    figure, (speed, flops) = _panels(
        f"{name}: speed of training steps",
        f"{unit} per second\n(all ranks)",
        "TFLOPS per device\n(10¹² operations / s)",
    )
    _plot(speed, lines, throughput_key(unit), color="tab:blue")
    _plot(flops, lines, TFLOPS_PER_DEVICE, color="tab:green")
    speed.yaxis.set_major_formatter("{x:,.0f}")
    for axes in (speed, flops):
        _from_zero(axes)
    return figure


def _optimizer(lines: list[dict], name: str) -> Figure | None:
    if not _has(lines, LEARNING_RATE):
        return None
    skipped = (
        ["skipped steps\n(so far)"] if any(line.get(SKIPPED_STEPS, 0) > 0 for line in lines) else []
    )
    figure, (lr, norm, *rest) = _panels(
        f"{name}: optimizer", "learning rate", "gradient norm\n(before clipping)", *skipped
    )
    _plot(lr, lines, LEARNING_RATE, color="tab:blue")
    lr.yaxis.set_major_formatter("{x:g}")
    _from_zero(lr)
    _plot(norm, lines, GRAD_NORM, color="tab:red")
    _log_where_it_helps(norm)
    for axes in rest:
        _plot(axes, lines, SKIPPED_STEPS, color="tab:purple")
        _count_from_zero(axes)
    return figure


def _traffic(lines: list[dict], name: str) -> Figure | None:
    """Bytes sent to other ranks, stacked by direction, by link where there are several, and by place likewise: the use
    of a layer, or a matrix of the vocabulary."""
    having, sent = bytes_sent_series(lines)
    if not any(values.any() for values in sent.values()):
        return None
    stacks: list[dict[str, np.ndarray]] = [{}, {}, {}]
    for labels, values in sent.items():
        for stack, label in zip(stacks, labels, strict=True):
            stack[label] = stack.get(label, 0) + values
    stacks = stacks[:1] + [stack for stack in stacks[1:] if len(stack) > 1]
    size, unit = byte_unit(np.sum(list(sent.values()), axis=0).max())
    figure, panels = _panels(
        f"{name}: sent to other ranks", *[f"sent by all ranks\n({unit} per step)"] * len(stacks)
    )
    edges = _edges(np.array([line["step"] for line in having]))
    for axes, stack in zip(panels, stacks, strict=True):
        _stack(axes, edges, {label: values / size for label, values in stack.items()})
    return figure


def _step_time(lines: list[dict], name: str) -> Figure | None:
    """Milliseconds of a step by part (`clock`)."""
    having = [line for line in lines if step_milliseconds(line) is not None]
    if not having:
        return None
    keys = [time_key(part) for part in PARTS]
    figure, (axes,) = _panels(
        f"{name}: time of a training step by part", "milliseconds per step\n(mean of the ranks)"
    )
    times = {key: np.nan_to_num(_series(having, key)[1]) for key in keys}
    _stack(
        axes,
        _edges(np.array([line["step"] for line in having])),
        dict(zip(PARTS, times.values(), strict=True)),
    )
    _cut_start(axes, sum(times.values(), np.zeros(len(having))))
    return figure


def _memory(lines: list[dict], name: str) -> Figure | None:
    """The most that each rank has held."""
    peaks = [
        (line["step"], line[PEAK_BYTES_BY_RANK]) for line in lines if PEAK_BYTES_BY_RANK in line
    ]
    if not peaks:
        return None
    size, unit = byte_unit(max(float(peak_P.max()) for _, peak_P in peaks))
    figure, (axes,) = _panels(f"{name}: memory of a rank", f"most held so far\n({unit})")
    for label, color in (
        ("largest", "tab:red"),
        ("smallest", "tab:blue"),
    ):  # ranks may be others after a resumption
        held = [
            {"step": step, label: (max if label == "largest" else min)(peak_P) / size}
            for step, peak_P in peaks
        ]
        _plot(axes, held, label, color=color, label=f"{label} rank")
    axes.legend(**_OUTSIDE)
    _from_zero(axes)
    return figure


def _stack(axes: Axes, edges: np.ndarray, values: dict[str, np.ndarray]) -> None:
    """Areas on top of each other, and their legend in the same order."""
    base = np.zeros(len(edges) - 1)
    for i, (label, height) in enumerate(values.items()):
        color = colormaps["viridis"](i / max(1, len(values) - 1))
        axes.stairs(base + height, edges, baseline=base, fill=True, color=color, label=label)
        base = base + height
    axes.legend(reverse=True, **_OUTSIDE)
    _from_zero(axes)
