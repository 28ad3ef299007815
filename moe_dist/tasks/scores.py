"""Scores for a split that are no means over samples.

Legend: N samples in a split.
"""

import math

import numpy as np


def matthews(
    true_positive: float, false_positive: float, false_negative: float, true_negative: float
) -> float:
    """Returns the correlation between predicted and true class (Matthews 1975).

    Args:
        true_positive: Positive samples predicted as positive.
        false_positive: Negative samples predicted as positive.
        false_negative: Positive samples predicted as negative.
        true_negative: Negative samples predicted as negative.

    Returns:
        A number from -1 to 1; 0 if predictions or classes are constant.
    """
    predicted = (true_positive + false_positive) * (true_negative + false_negative)
    actual = (true_positive + false_negative) * (true_negative + false_positive)
    if not predicted or not actual:
        return 0.0
    difference = true_positive * true_negative - false_positive * false_negative
    return difference / math.sqrt(predicted * actual)


def f1(true_positive: float, false_positive: float, false_negative: float) -> float:
    """Returns the harmonic mean of precision and recall for the positive class.

    Args:
        true_positive: Positive samples predicted as positive.
        false_positive: Negative samples predicted as positive.
        false_negative: Positive samples predicted as negative.

    Returns:
        A number from 0 to 1; 0 if no sample is positive or predicted as positive.
    """
    wrong = false_positive + false_negative
    return 2 * true_positive / (2 * true_positive + wrong) if true_positive or wrong else 0.0


def pearson(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Returns the linear correlation; 0 if one of the two is constant."""
    x_N = x_N - x_N.mean()
    y_N = y_N - y_N.mean()
    scale = math.sqrt((x_N**2).sum() * (y_N**2).sum())
    return float((x_N * y_N).sum() / scale) if scale else 0.0


def spearman(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Returns the linear correlation of ranks; equal values share their mean rank."""
    return pearson(_ranks(x_N), _ranks(y_N))


def _ranks(x_N: np.ndarray) -> np.ndarray:
    """Returns each value's rank, from 1."""
    _, place_N, count = np.unique(x_N, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place_N]
