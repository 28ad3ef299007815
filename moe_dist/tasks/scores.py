"""Scores of a split that are no means over samples.

Legend: N samples of a split.
"""

import math

import numpy as np


def matthews(
    true_positive: float, false_positive: float, false_negative: float, true_negative: float
) -> float:
    """Returns the correlation of predicted and true class, of two (Matthews 1975); 0 where one of them is constant."""
    predicted = (true_positive + false_positive) * (true_negative + false_negative)
    actual = (true_positive + false_negative) * (true_negative + false_positive)
    if not predicted or not actual:
        return 0.0
    return (true_positive * true_negative - false_positive * false_negative) / math.sqrt(
        predicted * actual
    )


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
