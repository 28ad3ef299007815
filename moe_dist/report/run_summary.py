"""Contents of a run folder (metrics, config, layout) and the figures that a report shows first.

Config fields are read one by one, by their names in `Config`, and text that looks like a token or a
key is hidden. Nothing is read from the environment.

Legend: P ranks.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.config.overrides import dotted_keys, from_json, value_of
from moe_dist.config.redact import redact
from moe_dist.config.run_folder import read, read_json
from moe_dist.monitoring.metric_format import METRIC_FORMATS, format_bytes, format_metric
from moe_dist.monitoring.metric_keys import (
    DEAD_EXPERTS,
    DISPATCH_DIRECTIONS,
    DROP_RATE,
    LINK_KINDS,
    LOAD_MAX,
    MAX_PEAK_BYTES,
    NONFINITE_SOURCE,
    PARTS,
    PEAK_BYTES_BY_RANK,
    SKIPPED_STEPS,
    TFLOPS_PER_DEVICE,
    bytes_sent_series,
    layer_key,
    layers_with,
    throughput_key,
    throughput_unit,
    time_key,
)
from moe_dist.monitoring.metrics_file import FILE_NAME, read_metrics

SPLITS = ("train", "valid", "test", "mismatched")

# fields of layout.json that are integers >= 1
_LAYOUT_COUNTS = (
    "world",
    "nodes",
    "ep",
    "edp",
    "global_batch_size",
    "grad_accum_steps",
    "samples_per_rank",
    "parameters",
)
_REMOVE_LAYOUT = "remove the file; the report will have no layout"
_HEX = re.compile(r"\b[0-9a-fA-F]{32,}\b")  # may be a key, also as part of a path

Rows = Iterator[tuple[str, str]]  # (name, value) for people


@dataclass(frozen=True)
class RunSummary:
    """The contents of a run folder.

    Attributes:
        name: Name for people.
        lines: Its metrics, as `metrics_file.read_metrics` returns them.
        config: Values of the config by dotted key; empty if the config cannot be read.
        layout: The report of `training.model_stats.describe_layout`; empty if there is none.
    """

    name: str
    lines: list[dict]
    config: dict[str, Any]
    layout: dict[str, Any]

    def last(self, key: str) -> Any:
        """Returns the newest value for a key; None if no line has it."""
        for line in reversed(self.lines):
            if key in line:
                return line[key]
        return None

    def median(self, key: str) -> float | None:
        """Returns the median of a key's finite values; None if there are none."""
        values = np.array([line[key] for line in self.lines if key in line], dtype=float)
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None

    def layers(self, statistic: str) -> list[float]:
        """Returns the newest value for each MoE layer that has the statistic."""
        layers = layers_with(self.lines, statistic)
        return [self.last(layer_key(layer, statistic)) for layer in layers]


def read_run(folder: Path, name: str | None = None) -> RunSummary:
    """Reads a run folder.

    Args:
        folder: The run folder.
        name: Name to show; None for the folder's name.

    Returns:
        The folder's contents.

    Raises:
        ValueError: The run has no metrics yet, or its metrics or its layout are damaged.
    """
    lines = read_metrics(folder)
    if not lines:
        raise ValueError(
            f"metrics file {folder / FILE_NAME} is empty: wait until the run has logged a step"
        )
    return RunSummary(
        name=_printable(name) if name else name_of(folder),
        lines=lines,
        config=_read_config(folder / "config.json"),
        layout=_read_layout(folder / "layout.json"),
    )


def name_of(folder: Path) -> str:
    """Returns a run folder's name as valid Unicode text."""
    return _printable(folder.resolve().name)


def _printable(value: str) -> str:
    """Replaces surrogates (from file names that are not UTF-8) by question marks."""
    return value.encode("utf-8", "replace").decode()


def _read_config(path: Path) -> dict[str, Any]:
    """Returns the config fields without secrets; empty for a file that is not a config.

    A report can be drawn without the config, and an unknown file must not be shown.
    """
    try:
        config = from_json(read(path).decode())
    except (OSError, ValueError, RecursionError):
        return {}
    fields = {}
    for key in dotted_keys(config):
        value = value_of(config, key)
        fields[key] = _without_secrets(value) if isinstance(value, str) else value
    return fields


def _without_secrets(value: str) -> str:
    return _HEX.sub("(hidden)", redact(_printable(value), "(hidden)"))


def _read_layout(path: Path) -> dict[str, Any]:
    """Returns the checked contents of layout.json; empty if there is no such file."""
    if not path.exists():
        return {}
    layout = read_json(path)
    if not isinstance(layout, dict):
        raise ValueError(f"{path} is not a layout: {layout!r:.80}; {_REMOVE_LAYOUT}")
    minimums = dict.fromkeys(_LAYOUT_COUNTS, 1) | {"zero_stage": 0}
    if "num_experts" in layout:
        minimums |= {"num_experts": 1, "experts_per_token": 1}
    for key, minimum in minimums.items():
        value = layout.get(key)
        if not _is_count(value, minimum):
            reason = f"{key}={value!r:.80} is not an integer >= {minimum}"
            raise ValueError(f"{path}: {reason}; {_REMOVE_LAYOUT}")
    is_valid = (
        layout["ep"] * layout["edp"] == layout["world"]
        and layout.get("dtype") in ("fp32", "bf16")
        and _is_per_rank(layout.get("per_rank"))
    )
    if not is_valid:
        raise ValueError(f"{path} is not the layout of a run; {_REMOVE_LAYOUT}")
    return layout


def _is_per_rank(per_rank: Any) -> bool:
    """Returns whether a value has a rank's parameters and memory."""
    if not isinstance(per_rank, dict) or not isinstance(per_rank.get("memory_bytes"), dict):
        return False
    sizes = per_rank["memory_bytes"]
    if not all(kind.isprintable() for kind in sizes):
        return False
    return all(_is_count(size, 0) for size in (per_rank.get("parameters"), *sizes.values()))


def _is_count(value: Any, minimum: int) -> bool:
    return type(value) is int and minimum <= value < 2**63


def headline_rows(run: RunSummary) -> Rows:
    """Yields a run's most important figures as (name, value)."""
    layout = run.layout
    steps = run.config.get("steps")
    yield "steps", f"{run.lines[-1]['step']}" + (f" of {steps}" if steps else "")
    yield from _metric_rows(run)
    if layout:
        yield "ranks", describe_ranks(layout)
        yield "ZeRO stage, precision", f"{layout.get('zero_stage')}, {layout.get('dtype')}"
        yield "parameters", f"{layout.get('parameters', 0):,}"
    if "num_experts" in layout:
        yield "experts", f"{layout['num_experts']:,}, {layout['experts_per_token']} for each token"
    yield from _cost_rows(run)
    yield from _balance_rows(run)
    skipped = run.last(SKIPPED_STEPS)
    if skipped:
        source = run.last(NONFINITE_SOURCE)
        yield "skipped steps", f"{skipped:.0f}" + (f" (last: {source})" if source else "")


def _metric_rows(run: RunSummary) -> Rows:
    """Yields the last loss and metrics per split."""
    for split in SPLITS:
        for metric in ("loss", *METRIC_FORMATS):
            value = run.last(f"{split}/{metric}")
            if value is not None:
                yield f"{split} {metric.replace('_', ' ')}, last", format_metric(metric, value)


def _cost_rows(run: RunSummary) -> Rows:
    """Yields throughput, time, traffic and memory."""
    unit = throughput_unit(run.lines)
    throughput = run.median(throughput_key(unit))
    if throughput is not None:
        yield f"{unit} per second, median", f"{throughput:,.0f}"
    tflops = run.median(TFLOPS_PER_DEVICE)
    if tflops is not None:
        yield "TFLOPS per device, median", f"{tflops:.3g}"
    part_ms = _median_ms(run)
    if part_ms:
        yield "milliseconds per step, median", f"{sum(part_ms.values()):,.1f}"
    bytes_by_link = _bytes_by_link(run)
    if bytes_by_link:
        yield "sent per step by all ranks", format_bytes(sum(bytes_by_link.values()))
    peak_bytes = run.last(MAX_PEAK_BYTES)
    if peak_bytes is not None:
        yield "memory of the largest rank", format_bytes(peak_bytes)


def _balance_rows(run: RunSummary) -> Rows:
    """Yields the load balance of the worst MoE layer."""
    max_loads = run.layers(LOAD_MAX)
    if max_loads:
        yield "largest load over the mean, last", f"{max(max_loads):.3g}"
        yield "dead experts, last", f"{sum(run.layers(DEAD_EXPERTS)):.0f}"
        yield "drop rate, last", f"{100 * max(run.layers(DROP_RATE)):.2f} %"


def describe_ranks(layout: dict[str, Any]) -> str:
    """Returns a text with the numbers of ranks, nodes, and ranks per axis."""
    nodes = layout.get("nodes", 1)
    axes = f"edp {layout.get('edp')} x ep {layout.get('ep')}"
    return f"{layout.get('world')} on {nodes} node{'s' if nodes != 1 else ''}: {axes}"


def _median_ms(run: RunSummary) -> dict[str, float]:
    """Returns the median milliseconds per step for each measured part."""
    medians = {}
    for part in PARTS:
        median = run.median(time_key(part))
        if median is not None:
            medians[part] = median
    return medians


def step_time_rows(run: RunSummary) -> Rows:
    """Yields the milliseconds that each part of a step takes."""
    part_ms = _median_ms(run)
    total_ms = sum(part_ms.values())
    for part, milliseconds in part_ms.items():
        percent = 100 * milliseconds / max(total_ms, 1e-9)
        yield f"{part}, median", f"{milliseconds:,.2f} ms  ({percent:.1f} %)"


def _bytes_by_link(run: RunSummary) -> dict[str, float]:
    """Returns the bytes sent per step by all ranks for each kind of link, mean over the lines."""
    totals = dict.fromkeys(LINK_KINDS, 0.0)
    _, sent = bytes_sent_series(run.lines)
    for (_, link, _), bytes_n in sent.items():
        totals[link] += float(bytes_n.mean())
    return totals if sent else {}


def traffic_rows(run: RunSummary) -> Rows:
    """Yields the bytes sent per step by link, and by direction and link.

    The MoE layers are summed; parameters are listed by their place.
    """
    for link, total in _bytes_by_link(run).items():
        yield f"{link}, per step", format_bytes(total)
    totals: defaultdict[str, float] = defaultdict(float)
    _, sent = bytes_sent_series(run.lines)
    for (direction, link, place), bytes_n in sent.items():
        is_layer = direction in DISPATCH_DIRECTIONS
        source = direction if is_layer else f"{place}: {direction}"
        totals[f"{source}, {link}"] += float(bytes_n.mean())
    for name, total in totals.items():
        if total:
            yield name, format_bytes(total)


def memory_rows(run: RunSummary) -> Rows:
    """Yields a rank's measured peak memory and its estimated memory."""
    peak_P = run.last(PEAK_BYTES_BY_RANK)
    if peak_P is not None:
        yield "measured, largest rank", format_bytes(float(max(peak_P)))
        yield "measured, smallest rank", format_bytes(float(min(peak_P)))
    estimate = run.layout.get("per_rank", {}).get("memory_bytes", {})
    if estimate:
        yield "estimated", format_bytes(sum(estimate.values()))
    for kind, num_bytes in estimate.items():
        yield f"estimated: {kind}", format_bytes(num_bytes)
