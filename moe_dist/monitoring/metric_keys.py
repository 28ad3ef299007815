"""Names of the metrics in `metrics.jsonl` and in wandb, and functions that build and parse them.

    SPLIT/MEASURE                  metric of the task, such as `train/loss` or `valid/perplexity`
    train/...                      balance loss, learning rate, gradient norm, skipped steps, and
                                   the layer in which a step became NaN or infinite
    throughput/UNIT_per_sec        tokens, images or texts per second, summed over all ranks
    throughput/tflops_per_device   TFLOPS
    time/PART_ms                   milliseconds per step, for each part in `PARTS`
    memory/peak_bytes_by_rank      list, one entry per rank
    memory/max_peak_bytes          maximum of that list
    moe/LAYER/STATISTIC            load balance of an MoE layer, see `training.metric_accumulator`
    comm/PLACE/DIRECTION/LINK      bytes sent per step by all ranks; PLACE and DIRECTION are those
                                   of `distributed.labels`, LINK is `intra_node_bytes` or
                                   `inter_node_bytes`
    norms/...                      divergence between the LayerNorms of blocks

Legend: n lines.
"""

import re

import numpy as np

# parts of a training step (`monitoring.step_timer` says what each comprises)
PARTS = ("gate", "dispatch", "experts", "optimizer", "rest")
BALANCE_LOSS = "train/balance_loss"
LEARNING_RATE = "train/lr"
GRAD_NORM = "train/grad_norm"
SKIPPED_STEPS = "train/skipped_steps"
NONFINITE_SOURCE = "train/nonfinite_source"
TFLOPS_PER_DEVICE = "throughput/tflops_per_device"
PEAK_BYTES_BY_RANK = "memory/peak_bytes_by_rank"
MAX_PEAK_BYTES = "memory/max_peak_bytes"
NORMS_PREFIX = "norms/"

# statistics of an MoE layer, for `layer_key`
IMPORTANCE_PER_EXPERT = "importance_per_expert"
TOKENS_PER_EXPERT = "tokens_per_expert"
IMPORTANCE_CV = "importance_cv"
LOAD_CV = "load_cv"
LOAD_MAX = "load_max_over_mean"
DEAD_EXPERTS = "dead_experts"
DROPPED = "dropped"
DROP_RATE = "drop_rate"
LOAD_PERCENTILES = (10, 50, 90)

# keys whose value is a list: of experts, and of ranks
PER_EXPERT_SUFFIXES = (f"/{IMPORTANCE_PER_EXPERT}", f"/{TOKENS_PER_EXPERT}")
LIST_SUFFIXES = (*PER_EXPERT_SUFFIXES, PEAK_BYTES_BY_RANK)
TEXT_KEYS = (NONFINITE_SOURCE,)

# `wandb_charts` draws several of these keys in one chart, so wandb hides their own panels
WANDB_HIDDEN = re.compile(r"moe/.+/load_p\d+_over_mean|comm/.+_bytes")

INTRA_NODE = "inside a node"
INTER_NODE = "between nodes"
LINK_KINDS = (INTRA_NODE, INTER_NODE)
DISPATCH_DIRECTIONS = (
    "counts",
    "dispatch",
    "combine",
    "dispatch (backward)",
    "combine (backward)",
)

_THROUGHPUT_KEY = re.compile(r"throughput/(.+)_per_sec")
_BYTES_KEY = re.compile(r"comm/(.+)/([^/]+)/(intra|inter)_node_bytes")
_MAX_BYTES = 1e30  # per step and direction; a larger number is damage


def throughput_key(unit: str) -> str:
    """Returns the key of the units ("tokens", "images", "texts") processed per second."""
    return f"throughput/{unit}_per_sec"


def throughput_unit(lines: list[dict]) -> str:
    """Returns the unit of the first throughput key in the lines ("tokens" if there is none)."""
    for line in lines:
        for key in line:
            match = _THROUGHPUT_KEY.fullmatch(key)
            if match:
                return match[1]
    return "tokens"


def time_key(part: str) -> str:
    """Returns the key of the milliseconds per step that a part takes (`step_timer.PARTS`)."""
    return f"time/{part}_ms"


def layer_key(layer: str, statistic: str) -> str:
    """Returns the key for a statistic of an MoE layer."""
    return f"moe/{layer}/{statistic}"


def load_percentile(percent: int) -> str:
    """Returns the statistic "percentile of the experts' loads, divided by the mean load"."""
    return f"load_p{percent}_over_mean"


def layers_with(lines: list[dict], statistic: str) -> list[str]:
    """Returns the names of the MoE layers for which some line has `statistic`, in file order."""
    pattern = re.compile(layer_key("(.+)", statistic))
    layers: dict[str, None] = {}
    for line in lines:
        for key in line:
            match = pattern.fullmatch(key)
            if match:
                layers[match[1]] = None
    return list(layers)


def bytes_key(place: str, direction: str, inter_node: bool) -> str:
    """Builds the key for the bytes that one kind of collective sends.

    Args:
        place: Name of the layer or module, or the kind of parameter.
        direction: Kind and direction of the data, as in "dispatch" or "dispatch_backward".
        inter_node: True for bytes that leave the node.

    Returns:
        The key, for example "comm/middle/dispatch/intra_node_bytes".
    """
    link = "inter" if inter_node else "intra"
    return f"comm/{place}/{direction}/{link}_node_bytes"


def step_milliseconds(line: dict) -> float | None:
    """Returns the milliseconds of a step, summed over its parts; None if the line lacks a part."""
    keys = [time_key(part) for part in PARTS]
    if not all(key in line for key in keys):
        return None
    return sum(line[key] for key in keys)


def timed_lines(lines: list[dict]) -> list[dict]:
    """Returns the lines that have the milliseconds of all parts of a step."""
    return [line for line in lines if step_milliseconds(line) is not None]


def bytes_sent_series(
    lines: list[dict],
) -> tuple[list[dict], dict[tuple[str, str, str], np.ndarray]]:
    """Extracts the bytes sent per step by all ranks.

    Args:
        lines: Lines of a metrics file.

    Returns:
        (n lines that contain such a key, bytes by (direction, link, place)). The bytes have shape
        [n]; a missing or damaged number counts as 0.
    """
    matches: dict[str, re.Match[str]] = {}
    for line in lines:
        for key in line:
            match = _BYTES_KEY.fullmatch(key)
            if match:
                matches[key] = match
    lines_with_bytes = [line for line in lines if not matches.keys().isdisjoint(line)]
    sent: dict[tuple[str, str, str], np.ndarray] = {}
    for key, match in matches.items():
        place, direction, link = match.groups()
        direction = direction.replace("_backward", " (backward)")
        label = (direction, INTER_NODE if link == "inter" else INTRA_NODE, place)
        bytes_n = np.array([line.get(key, 0.0) for line in lines_with_bytes], dtype=float)
        sent[label] = np.where(np.abs(bytes_n) < _MAX_BYTES, bytes_n, 0.0)
    return lines_with_bytes, sent
