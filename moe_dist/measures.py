"""Measures of tasks: how they are called and written, the same on the terminal, in the result and in the report, and
those that are no means over samples.

Shares are fractions in `metrics.jsonl`, and written in per cent.

Legend: N samples of a split.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measure:
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


MEASURES = {
    "perplexity": Measure("perplexity", "perplexity", is_share=False, decimals=None),
    "accuracy": Measure("accuracy", "accuracy (part of all that are right)"),
    "masked_accuracy": Measure("masked words", "accuracy (part of masked words that are right)"),
    "order_accuracy": Measure("order of sentences", "accuracy (part of orders that are right)"),
    "f1": Measure("F1", "F1"),
    "exact": Measure("exact match", "exact matches (part of all answers)"),
    "matthews": Measure("Matthews correlation", "Matthews correlation", is_share=False, decimals=4),
    "pearson": Measure("Pearson correlation", "Pearson correlation", is_share=False, decimals=4),
    "spearman": Measure("Spearman correlation", "Spearman correlation", is_share=False, decimals=4),
}
# the measure that models are compared by is the first of these that a task has
HEADLINES = ("matthews", "pearson", "f1", "accuracy", "perplexity")


def written(measure: str, value: float, other: str = ".4g") -> str:
    """Returns a value as text: a share in per cent, a correlation with four decimals, others in the format `other`."""
    known = MEASURES.get(measure)
    if not known or known.decimals is None:
        return format(value, other)
    return f"{100 * value:.{known.decimals}f} %" if known.is_share else f"{value:.{known.decimals}f}"


def headline(keys: Iterable[str], split: str) -> str | None:
    """Returns the measure of a split that models are compared by, of the keys of a line of metrics. None where there is
    none."""
    keys = set(keys)
    return next((measure for measure in HEADLINES if f"{split}/{measure}" in keys), None)


def matthews(true_positive: float, false_positive: float, false_negative: float, true_negative: float) -> float:
    """Returns the correlation of predicted and true class, of two (Matthews 1975); 0 where one of them is constant."""
    predicted = (true_positive + false_positive) * (true_negative + false_negative)
    actual = (true_positive + false_negative) * (true_negative + false_positive)
    if not predicted or not actual:
        return 0.0
    return (true_positive * true_negative - false_positive * false_negative) / math.sqrt(predicted * actual)


def f1(true_positive: float, false_positive: float, false_negative: float) -> float:
    """Returns the harmonic mean of precision and recall of the positive class; 0 where nothing is or is said to be."""
    wrong = false_positive + false_negative
    return 2 * true_positive / (2 * true_positive + wrong) if true_positive or wrong else 0.0


def pearson(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Returns the linear correlation; 0 where one of the two is constant."""
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    scale = math.sqrt((x_N**2).sum() * (y_N**2).sum())
    return float((x_N * y_N).sum() / scale) if scale else 0.0


def spearman(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Returns the linear correlation of ranks; equal values have the mean of their ranks."""
    return pearson(_ranks(x_N), _ranks(y_N))


def _ranks(x_N: np.ndarray) -> np.ndarray:
    _, place_N, count = np.unique(x_N, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place_N]
