"""Measures of tasks: how they are called and written, the same on the terminal, in the result and in the report, and
those that are no means over samples.

Shares are fractions in `metrics.jsonl`, and written in per cent.

Legend: N samples of a split.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricFormat:
    """Attributes:
    name: For people.
    axis: Of its curve.
    is_share: Whether it is a fraction that is written in per cent.
    decimals: Digits after the point; None for what is written like any other number.
    """

    name: str
    axis: str
    is_share: bool = True
    decimals: int | None = 2


METRIC_FORMATS = {
    "perplexity": MetricFormat("perplexity", "perplexity", is_share=False, decimals=None),
    "accuracy": MetricFormat("accuracy", "accuracy (part of all that are right)"),
    "masked_accuracy": MetricFormat(
        "masked words", "accuracy (part of masked words that are right)"
    ),
    "order_accuracy": MetricFormat(
        "order of sentences", "accuracy (part of orders that are right)"
    ),
    "f1": MetricFormat("F1", "F1"),
    "exact": MetricFormat("exact match", "exact matches (part of all answers)"),
    "matthews": MetricFormat(
        "Matthews correlation", "Matthews correlation", is_share=False, decimals=4
    ),
    "pearson": MetricFormat(
        "Pearson correlation", "Pearson correlation", is_share=False, decimals=4
    ),
    "spearman": MetricFormat(
        "Spearman correlation", "Spearman correlation", is_share=False, decimals=4
    ),
}
# the measure that models are compared by is the first of these that a task has
PRIMARY_METRICS = ("matthews", "pearson", "f1", "accuracy", "perplexity")


def format_metric(measure: str, value: float, other: str = ".4g") -> str:
    """Returns a value as text: a share in per cent, a correlation with four decimals, others in the format `other`."""
    known = METRIC_FORMATS.get(measure)
    if not known or known.decimals is None:
        return format(value, other)
    return (
        f"{100 * value:.{known.decimals}f} %" if known.is_share else f"{value:.{known.decimals}f}"
    )


def primary_metric(keys: Iterable[str], split: str) -> str | None:
    """Returns the measure of a split that models are compared by, of the keys of a line of metrics. None where there is
    none."""
    keys = set(keys)
    return next((measure for measure in PRIMARY_METRICS if f"{split}/{measure}" in keys), None)


def perplexity(loss: float) -> float:
    """Returns exp(loss), which is infinite where that overflows, and NaN where the loss is."""
    return math.inf if loss > 700 else math.exp(loss)


def format_perplexity(value: float, loss: float) -> str:
    """Returns a perplexity as text; where it is no number, with the loss that it is of."""
    return f"{value:.2f}" if math.isfinite(value) else f"{value} (loss {loss:.4g} nats)"


_BYTE_UNITS = {1e9: "GB", 1e6: "MB", 1e3: "kB"}


def byte_unit(num_bytes: float) -> tuple[float, str]:
    """Returns the size in bytes and the name of the largest unit that `num_bytes` fills."""
    for size, unit in _BYTE_UNITS.items():
        if num_bytes >= size:
            return size, unit
    return 1.0, "bytes"


def format_bytes(num_bytes: float) -> str:
    """Returns a number of bytes for people, for example "1.50 MB"."""
    size, unit = byte_unit(num_bytes)
    return f"{num_bytes / size:,.2f} {unit}" if size > 1 else f"{num_bytes:.0f} bytes"
