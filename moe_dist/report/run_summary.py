"""What run folders tell: their metrics, config and layout, and the numbers that a reader asks for first.

What a run's config holds is read field by field, by the names that `Config` has, and what looks like a token or a key
is hidden; nothing is read from the environment.

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
from moe_dist.monitoring.step_timer import PARTS

# whole numbers of a layout.json, from 1
_COUNTS = (
    "world",
    "nodes",
    "ep",
    "edp",
    "global_batch_size",
    "grad_accum_steps",
    "samples_per_rank",
    "parameters",
)
_HEX = re.compile(r"\b[0-9a-fA-F]{32,}\b")  # may be a key, or name a folder


@dataclass(frozen=True)
class RunSummary:
    """What a run folder tells."""

    name: str
    lines: list[dict]  # of its metrics
    config: dict[str, Any]  # by dotted key; empty where it cannot be read
    layout: dict[str, Any]  # as `summary.describe` has it; empty in older runs

    def last(self, key: str) -> Any:
        """The newest value, None where there is none."""
        return next((line[key] for line in reversed(self.lines) if key in line), None)

    def median(self, key: str) -> float | None:
        """Of the finite ones."""
        values = np.array([line[key] for line in self.lines if key in line], dtype=float)
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None

    def layers(self, what: str) -> list[float]:
        """The newest `what` of each MoE layer."""
        return [self.last(layer_key(layer, what)) for layer in layers_with(self.lines, what)]


def read_run(folder: Path, name: str | None = None) -> RunSummary:
    """Reads what a run folder has of a run.

    Args:
        folder: The run folder.
        name: A name to use instead of the folder's.

    Raises:
        ValueError: The folder has no metrics yet, or its metrics or its layout are damaged.
    """
    lines = read_metrics(folder)
    if not lines:
        raise ValueError(
            f"metrics file {folder / FILE_NAME} is empty: wait until the run has logged a step"
        )
    return RunSummary(
        _text(name) if name else name_of(folder),
        lines,
        _config(folder / "config.json"),
        _layout(folder / "layout.json"),
    )


def name_of(folder: Path) -> str:
    """Returns the name of a run folder as text that can be written: a name on disk may hold bytes that are no text."""
    return _text(folder.resolve().name)


def _text(value: str) -> str:
    return value.encode("utf-8", "replace").decode()


def _config(path: Path) -> dict[str, Any]:
    """Returns the fields of a config without secrets. Empty for a file that is no config of this version, which the
    report can do without, and of which nothing is shown."""
    try:
        config = from_json(read(path).decode())
    except (OSError, ValueError, RecursionError):
        return {}
    fields = {key: value_of(config, key) for key in dotted_keys(config)}
    return {
        key: _shown(value) if isinstance(value, str) else value for key, value in fields.items()
    }


def _shown(value: str) -> str:
    """Returns the text without keys, as text that can be written."""
    return _HEX.sub("(hidden)", redact(_text(value), "(hidden)"))


def _layout(path: Path) -> dict[str, Any]:
    """Returns what `summary.describe` wrote. Empty where there is no such file, as in runs of older versions.

    Raises:
        ValueError: The file is damaged.
    """
    if not path.exists():
        return {}
    layout = read_json(path)
    if not isinstance(layout, dict):
        raise ValueError(
            f"{path}: {layout!r:.80} is no layout; remove it, and the report does without"
        )
    expected = dict.fromkeys(_COUNTS, 1) | {"zero_stage": 0}
    if "num_experts" in layout:
        expected |= {"num_experts": 1, "experts_per_token": 1}
    for key, least in expected.items():
        if not _is_count(layout.get(key), least):
            told = f"{key}={layout.get(key)!r:.80} is no whole number from {least}"
            raise ValueError(f"{path}: {told}; remove the file, and the report does without")
    per_rank: Any = layout.get("per_rank")
    sizes: Any = per_rank.get("memory_bytes") if isinstance(per_rank, dict) else None
    whole = isinstance(sizes, dict) and all(kind.isprintable() for kind in sizes)
    whole = whole and all(
        _is_count(size, 0) for size in (per_rank.get("parameters"), *sizes.values())
    )
    whole = whole and layout["ep"] * layout["edp"] == layout["world"]
    if not whole or layout.get("dtype") not in ("fp32", "bf16"):
        raise ValueError(f"{path} is no layout of a run; remove it, and the report does without")
    return layout


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**63


def headline_rows(run: RunSummary) -> Iterator[tuple[str, str]]:
    """What it comes to: names and numbers for people, as have the three below."""
    layout = run.layout
    steps = run.config.get("steps")
    yield "steps", f"{run.lines[-1]['step']}" + (f" of {steps}" if steps else "")
    for split in ("train", "valid", "test", "mismatched"):
        for what in ("loss", *METRIC_FORMATS):
            if (value := run.last(f"{split}/{what}")) is not None:
                yield f"{split} {what.replace('_', ' ')}, last", format_metric(what, value)
    if layout:
        yield "ranks", describe_ranks(layout)
        yield "ZeRO stage, precision", f"{layout.get('zero_stage')}, {layout.get('dtype')}"
        yield "parameters", f"{layout.get('parameters', 0):,}"
    if "num_experts" in layout:
        yield "experts", f"{layout['num_experts']:,}, {layout['experts_per_token']} for each token"
    unit = throughput_unit(run.lines)
    if (speed := run.median(throughput_key(unit))) is not None:
        yield f"{unit} per second, median", f"{speed:,.0f}"
    if (flops := run.median(TFLOPS_PER_DEVICE)) is not None:
        yield "TFLOPS per device, median", f"{flops:.3g}"
    if parts := _medians(run):
        yield "milliseconds per step, median", f"{sum(parts.values()):,.1f}"
    by_link = _by_link(run)
    if by_link:
        yield "sent per step by all ranks", format_bytes(sum(by_link.values()))
    if (peak := run.last(MAX_PEAK_BYTES)) is not None:
        yield "memory of the largest rank", format_bytes(peak)
    if loads := run.layers(LOAD_MAX):
        yield "largest load over the mean, last", f"{max(loads):.3g}"
        yield "dead experts, last", f"{sum(run.layers(DEAD_EXPERTS)):.0f}"
        yield "drop rate, last", f"{100 * max(run.layers(DROP_RATE)):.2f} %"
    if skipped := run.last(SKIPPED_STEPS):
        where = run.last(NONFINITE_SOURCE)
        yield "skipped steps", f"{skipped:.0f}" + (f" (last: {where})" if where else "")


def describe_ranks(layout: dict[str, Any]) -> str:
    """How many, where, and on which axes."""
    nodes = layout.get("nodes", 1)
    of = f"edp {layout.get('edp')} x ep {layout.get('ep')}"
    return f"{layout.get('world')} on {nodes} node{'s' if nodes != 1 else ''}: {of}"


def _medians(run: RunSummary) -> dict[str, float]:
    """Milliseconds a step by part."""
    return {part: value for part in PARTS if (value := run.median(time_key(part))) is not None}


def step_time_rows(run: RunSummary) -> Iterator[tuple[str, str]]:
    """Of the parts of a step."""
    parts = _medians(run)
    total = sum(parts.values())
    for part, value in parts.items():
        yield f"{part}, median", f"{value:,.2f} ms  ({100 * value / max(total, 1e-9):.1f} %)"


def _by_link(run: RunSummary) -> dict[str, float]:
    """Bytes a step of all ranks, the mean of the lines."""
    totals = dict.fromkeys(LINK_KINDS, 0.0)
    _, sent = bytes_sent_series(run.lines)
    for (_, link, _), values in sent.items():
        totals[link] += float(values.mean())
    return totals if sent else {}


def traffic_rows(run: RunSummary) -> Iterator[tuple[str, str]]:
    """Bytes of a step, by link, and by direction and link."""
    for link, total in _by_link(run).items():
        yield f"{link}, per step", format_bytes(total)
    totals: defaultdict[str, float] = defaultdict(float)
    _, sent = bytes_sent_series(run.lines)
    for (direction, link, place), values in sent.items():
        what = direction if direction in DISPATCH_DIRECTIONS else f"{place}: {direction}"
        totals[f"{what}, {link}"] += float(values.mean())
    yield from ((what, format_bytes(total)) for what, total in totals.items() if total)


def memory_rows(run: RunSummary) -> Iterator[tuple[str, str]]:
    """Of a rank."""
    peak_P = run.last(PEAK_BYTES_BY_RANK)
    if peak_P is not None:
        yield "measured, largest rank", format_bytes(float(max(peak_P)))
        yield "measured, smallest rank", format_bytes(float(min(peak_P)))
    estimate = run.layout.get("per_rank", {}).get("memory_bytes", {})
    if estimate:
        yield "estimated", format_bytes(sum(estimate.values()))
    for kind, num_bytes in estimate.items():
        yield f"estimated: {kind}", format_bytes(num_bytes)
