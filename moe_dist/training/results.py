"""Formats the lines train.py prints at the end of a run."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from moe_dist.config.schema import Config
from moe_dist.monitoring.metric_format import format_metric
from moe_dist.tasks.registry import task_of

# a link to experiments/results/; a wheel contains its JSON files
KEPT_RESULTS = Path(__file__).parent / "kept_results"
KEPT_KEYS = {"given", "arms", "command"}


def result_lines(
    config: Config,
    folder: Path,
    task_result: str,
    num_steps: int,
    num_updates: int,
    baseline_is_explicit: bool,
) -> str:
    """Formats a run's result.

    Args:
        config: The run's config.
        folder: Its run folder.
        task_result: The test metrics as formatted by the task.
        num_steps: Number of trained steps, skipped ones included.
        num_updates: Number of steps without the skipped ones.
        baseline_is_explicit: If True, the user named the baseline, so its absence is reported.

    Returns:
        Lines without a newline at the end: the test metrics, the skipped steps if there are any,
        the baseline's metrics if they can be compared, and the run folder.
    """
    lines = [task_result]
    if num_updates < num_steps:
        lines.append(
            f"{num_steps - num_updates} of {num_steps} steps were skipped, because their "
            "gradients were not finite; a lower optim.lr may help"
        )
    if config.baseline:
        lines += _baseline_lines(config, config.baseline, baseline_is_explicit)
    return "\n".join([*lines, f"run folder: {folder}"])


def read_kept_metrics(baseline: str) -> dict[str, Any] | None:
    """Reads the metrics of earlier runs, for comparison.

    Args:
        baseline: A name in experiments/results/, or a path that ends with ".json".

    Returns:
        The file's JSON object, with at least `KEPT_KEYS`; None if there is no such file.

    Raises:
        ValueError: The file contains something else.
    """
    path = Path(baseline) if baseline.endswith(".json") else KEPT_RESULTS / f"{baseline}.json"
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text())
    except ValueError:
        kept = None
    if not isinstance(kept, dict) or not kept.keys() >= KEPT_KEYS:
        raise ValueError(
            f"baseline={baseline}: no kept metrics; give a file that an experiment wrote, or none"
        )
    return kept


def _baseline_lines(config: Config, baseline: str, is_explicit: bool) -> list[str]:
    """Returns lines about the kept metrics; if there are none, a note if the user named them."""
    kept = read_kept_metrics(baseline)
    if kept is None:
        return [f"no kept metrics {baseline} to compare with"] if is_explicit else []
    task = task_of(config)
    if task.comparison_key(config) != kept["given"]:
        note = f"not comparable with {baseline}: other data, batch or steps"
        return [note] if is_explicit else []
    metric = task.primary_metric
    lines = [
        f"kept runs of the same data and steps, each at its own best learning rate ({baseline}):"
    ]
    for name, arm in kept["arms"].items():
        seeds = arm[f"test_{metric}"]
        values = ", ".join(format_metric(metric, value, ".2f") for value in seeds)
        average = format_metric(metric, mean(seeds), ".2f")
        lines.append(
            f"  {name:<18} mean {average} over {len(seeds)} seeds ({values}), lr {arm['lr']:g}"
        )
    lines.append(f"  repeat with: {kept['command']}")
    return lines
