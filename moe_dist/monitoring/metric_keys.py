"""Names of metrics that several parts of the trainer share."""

import re

import numpy as np

from moe_dist.monitoring.step_timer import PARTS

LINK_KINDS = ("inside a node", "between nodes")  # over which bytes go
_MOST_BYTES = 1e30  # of one direction in a step; a number above it is damage


_BYTES_KEY = re.compile(r"exchange/(.+)/(.+)_bytes")


def step_milliseconds(line: dict) -> float | None:
    """Of all parts together; None where the line does not tell them."""
    keys = [f"time/{part}_ms" for part in PARTS]
    return sum(line[key] for key in keys) if all(key in line for key in keys) else None


def bytes_sent_series(
    lines: list[dict],
) -> tuple[list[dict], dict[tuple[str, str, str], np.ndarray]]:
    """The lines that tell of bytes sent, and by (direction, link, place) those of a step of each of them, over all
    ranks."""
    keys = {key: match for line in lines for key in line if (match := _BYTES_KEY.fullmatch(key))}
    having = [line for line in lines if not keys.keys().isdisjoint(line)]
    sent: dict[tuple[str, str, str], np.ndarray] = {}
    for key, match in keys.items():
        direction, far, _ = match[2].partition("_between_nodes")
        label = (direction.replace(":grad", " (backward)"), LINK_KINDS[bool(far)], match[1])
        values = np.array([line.get(key, 0.0) for line in having], dtype=float)
        values = np.where(np.abs(values) < _MOST_BYTES, values, 0.0)
        sent[label] = sent.get(label, 0) + values
    return having, sent
