"""Names and number formats of task metrics, the same on the terminal, in results and in the report.

Accuracies and similar metrics are fractions in `metrics.jsonl`; text for people shows per cent.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricFormat:
    """How a metric is named and written.

    Attributes:
        name: Name for people.
        axis: Label for the y axis.
        is_share: True for a fraction, which is written in per cent.
        decimals: Digits after the point; None for the caller's default format.
    """

    name: str
    axis: str
    is_share: bool = True
    decimals: int | None = 2


METRIC_FORMATS = {
    "perplexity": MetricFormat("perplexity", "perplexity", is_share=False, decimals=None),
    "accuracy": MetricFormat("accuracy", "accuracy (fraction correct)"),
    "masked_accuracy": MetricFormat("masked words", "accuracy (fraction of masked words correct)"),
    "order_accuracy": MetricFormat("order of sentences", "accuracy (fraction of orders correct)"),
    "f1": MetricFormat("F1", "F1"),
    "exact": MetricFormat("exact match", "exact matches (fraction of answers)"),
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
# models are compared by the first of these metrics that their task has
PRIMARY_METRICS = ("matthews", "pearson", "f1", "accuracy", "perplexity")

_BYTE_UNITS = {1e9: "GB", 1e6: "MB", 1e3: "kB"}
_MAX_EXPONENT = 700  # exp overflows float64 from 709.8 on


def format_metric(metric: str, value: float, default: str = ".4g") -> str:
    """Formats the value of a metric: a share in per cent, a correlation with four decimals.

    Args:
        metric: Name of the metric, such as "accuracy", without its split.
        value: The value as in `metrics.jsonl`.
        default: Format specification for all other metrics.

    Returns:
        The value as text, for example "40.62 %".
    """
    known = METRIC_FORMATS.get(metric)
    if known is None or known.decimals is None:
        return format(value, default)
    if known.is_share:
        return f"{100 * value:.{known.decimals}f} %"
    return f"{value:.{known.decimals}f}"


def primary_metric(keys: Iterable[str], split: str) -> str | None:
    """Selects the metric by which models are compared.

    Args:
        keys: Keys in a line of metrics.
        split: "train", "valid", "test" or "mismatched".

    Returns:
        The first of PRIMARY_METRICS that the line has for the split; None if there is none.
    """
    keys = set(keys)
    for metric in PRIMARY_METRICS:
        if f"{split}/{metric}" in keys:
            return metric
    return None


def perplexity(loss: float) -> float:
    """Returns exp(loss): infinity if that overflows, NaN if the loss is NaN."""
    return math.inf if loss > _MAX_EXPONENT else math.exp(loss)


def format_perplexity(value: float, loss: float) -> str:
    """Returns a perplexity as text; if it is not finite, the text also contains the loss (nats)."""
    return f"{value:.2f}" if math.isfinite(value) else f"{value} (loss {loss:.4g} nats)"


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
