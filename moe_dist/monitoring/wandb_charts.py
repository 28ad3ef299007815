"""Custom charts of a run for wandb; works offline and needs no package except wandb.

wandb gives each key a panel, in a section named by the text before its first slash: train, valid,
test, throughput, time, memory, moe, comm, report. Keys that are easier to read together
(`metric_keys.WANDB_HIDDEN`) have no panel; section "charts" shows them as several lines on the same
axes. The charts contain the whole run so far, and are replaced whenever plots are drawn.
"""

from typing import Any

import numpy as np

from moe_dist.monitoring.metric_keys import (
    LOAD_MAX,
    LOAD_PERCENTILES,
    PARTS,
    TOKENS_PER_EXPERT,
    bytes_sent_series,
    layer_key,
    layers_with,
    load_percentile,
    time_key,
    timed_lines,
)

_MAX_POINTS = 500  # per series, because wandb uploads the whole table of a chart


def charts(lines: list[dict]) -> dict[str, Any]:
    """Builds the custom charts of a run.

    Args:
        lines: Lines of its metrics file, as `metrics_file.read_metrics` returns them.

    Returns:
        wandb charts by key; without charts for which no line has numbers.
    """
    candidates = {
        "charts/step_time": _chart("milliseconds of a training step by part", *_times(lines)),
        "charts/bytes_by_link": _chart("bytes sent per step by all ranks", *_bytes_by_link(lines)),
    }
    for layer in layers_with(lines, TOKENS_PER_EXPERT):
        title = f"load of an expert / mean load, layer {layer}"
        candidates[f"charts/load_{layer}"] = _chart(title, *_loads(lines, layer))
    return {key: chart for key, chart in candidates.items() if chart is not None}


def _times(lines: list[dict]) -> tuple[list[dict], dict[str, Any]]:
    """Returns the lines that have all parts of a step, and their milliseconds by part."""
    timed = timed_lines(lines)
    return timed, {part: _column(timed, time_key(part)) for part in PARTS}


def _bytes_by_link(lines: list[dict]) -> tuple[list[dict], dict[str, Any]]:
    """Returns the lines that have bytes, and the bytes by direction and link, over all places."""
    lines_with_bytes, sent = bytes_sent_series(lines)
    series: dict[str, np.ndarray] = {}
    for (direction, link, _), bytes_n in sent.items():
        label = f"{direction}, {link}"
        series[label] = series.get(label, 0) + bytes_n
    return lines_with_bytes, {label: bytes_n for label, bytes_n in series.items() if bytes_n.any()}


def _loads(lines: list[dict], layer: str) -> tuple[list[dict], dict[str, Any]]:
    """Returns the lines that have the loads of a layer, and their maximum and percentiles."""
    keys = {"max": layer_key(layer, LOAD_MAX)}
    for percent in reversed(LOAD_PERCENTILES):
        keys[f"p{percent}"] = layer_key(layer, load_percentile(percent))
    complete = [line for line in lines if all(key in line for key in keys.values())]
    return complete, {name: _column(complete, key) for name, key in keys.items()}


def _column(lines: list[dict], key: str) -> list[float]:
    return [line[key] for line in lines]


def _chart(title: str, lines: list[dict], series: dict[str, Any]) -> Any:
    """Returns a line chart of at most _MAX_POINTS per series; None if there is nothing to draw."""
    import wandb

    if not lines or not series:
        return None
    stride = -(-len(lines) // _MAX_POINTS)
    steps = _column(lines[::stride], "step")
    ys = [list(map(float, values[::stride])) for values in series.values()]
    return wandb.plot.line_series(
        steps,
        ys,
        keys=list(series),
        title=title,
        xname="training step",
    )
