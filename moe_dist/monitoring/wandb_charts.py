"""The layout of a run's panels in wandb, as code; needs nothing but wandb itself, and works offline.

wandb gives each key a panel, in a section named by what is before its first slash: train, valid, test, time (of a step
by part), memory, moe (load histograms and balance), comm (bytes sent), report (pictures, and the page of the run). What reads
better together is hidden there (`metrics.HIDDEN`) and drawn in section "charts", several series on the same axes, of
the whole run so far, whenever pictures are drawn.
"""

from typing import Any

import numpy as np

from moe_dist.monitoring.metric_keys import (
    TOKENS_PER_EXPERT,
    bytes_sent_series,
    layer_key,
    layers_with,
    step_milliseconds,
    time_key,
)
from moe_dist.monitoring.step_timer import PARTS

_POINTS = 500  # most of a series: a chart's table is uploaded whole
_LOAD = ("max", "p90", "p50", "p10")


def charts(lines: list[dict]) -> dict[str, Any]:
    """wandb's custom charts by key; `lines` as `metrics.read_metrics` has them."""
    drawn = {
        "charts/step_time": _chart("milliseconds of a training step by part", *_times(lines)),
        "charts/bytes_by_link": _chart("bytes sent per step by all ranks", *_links(lines)),
    }
    for layer in layers_with(lines, TOKENS_PER_EXPERT):
        keys = {what: layer_key(layer, f"load_{what}_over_mean") for what in _LOAD}
        having = [line for line in lines if all(key in line for key in keys.values())]
        series = {what: [line[key] for line in having] for what, key in keys.items()}
        drawn[f"charts/load_{layer}"] = _chart(
            f"load of an expert / mean load, layer {layer}", having, series
        )
    return {key: chart for key, chart in drawn.items() if chart is not None}


def _times(lines: list[dict]) -> tuple[list[dict], dict[str, Any]]:
    having = [line for line in lines if step_milliseconds(line) is not None]
    return having, {part: [line[time_key(part)] for line in having] for part in PARTS}


def _links(lines: list[dict]) -> tuple[list[dict], dict[str, Any]]:
    """By direction and link."""
    having, sent = bytes_sent_series(lines)
    series: dict[str, np.ndarray] = {}
    for (direction, link, _), values in sent.items():
        series[f"{direction}, {link}"] = series.get(f"{direction}, {link}", 0) + values
    return having, {label: values for label, values in series.items() if values.any()}


def _chart(title: str, having: list[dict], series: dict[str, Any]) -> Any:
    """Lines of `series` over the steps of `having`, every so many of them; None where there is none."""
    import wandb

    if not having or not series:
        return None
    every = slice(None, None, -(-len(having) // _POINTS))
    steps = [line["step"] for line in having][every]
    values = [[float(value) for value in each[every]] for each in series.values()]
    return wandb.plot.line_series(
        steps, values, keys=list(series), title=title, xname="training step"
    )
