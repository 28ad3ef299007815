"""Draws the curves of a run as PNG pictures: `python -m moe_dist.report RUN`."""

import argparse
import pathlib
import re
import sys
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from moe_dist.metrics import FILE_NAME, read_metrics

_LOAD_KEY = re.compile(r"moe/(.+)/load")
_LOAD_TICKS = {0.25: "≤ 0.25", 0.5: "0.5", 1.0: "1.0", 2.0: "2.0", 4.0: "≥ 4.0"}
_COLUMNS = 300  # most columns of a heat map: the lines of a longer run are summed in groups
_STYLES: dict[str, dict[str, Any]] = {
    "train": dict(color="tab:blue", linewidth=1, marker=".", markersize=3),
    "valid": dict(color="tab:orange", linewidth=2, marker="o", markersize=4),
    "test": dict(color="tab:red", linestyle="none", marker="*", markersize=14),
}


def write_report(run: pathlib.Path) -> list[pathlib.Path]:
    """Writes loss.png, perplexity.png and one load_LAYER.png for each MoE layer to `run/report`, and returns them.

    Raises ValueError if the run has no metrics yet.
    """
    lines = read_metrics(run)
    if not lines:
        raise ValueError(f"metrics file {run / FILE_NAME} is empty: wait until the run has logged a step")
    name = run.resolve().name
    figures = {
        "loss": _curves(lines, "loss", f"{name}: loss", "loss (nats per word)"),
        "perplexity": _curves(lines, "perplexity", f"{name}: perplexity", "perplexity (log scale)"),
    }
    perplexity_axes = figures["perplexity"].axes[0]
    perplexity_axes.set_yscale("log")
    perplexity_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    perplexity_axes.yaxis.set_major_formatter("{x:g}")
    for layer in dict.fromkeys(match[1] for line in lines for key in line if (match := _LOAD_KEY.fullmatch(key))):
        figures[f"load_{layer.replace('/', '_')}"] = _load_map(lines, layer, f"{name}: load of MoE layer {layer}")
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{stem}.png" for stem in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path)
    return paths


def _figure(title: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step (optimizer updates)", ylabel=ylabel)
    axes.xaxis.set_major_locator(_integers())
    return figure, axes


def _integers() -> MaxNLocator:
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def _series(lines: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps, of shape [n], and the values, of shape [n] or [n, E], of the lines that have `key`."""
    having = [line for line in lines if key in line]
    return np.array([line["step"] for line in having]), np.array([line[key] for line in having], dtype=float)


def _curves(lines: list[dict], quantity: str, title: str, ylabel: str) -> Figure:
    """Draws `quantity` of the train, valid and test lines against the step; the legend names the last values."""
    figure, axes = _figure(title, ylabel)
    for split, style in _STYLES.items():
        steps, values = _series(lines, f"{split}/{quantity}")
        if len(steps):
            axes.plot(steps, values, label=f"{split} (last {values[-1]:#.4g})", **style)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return figure


def _load_map(lines: list[dict], layer: str, title: str) -> Figure:
    """Draws the load of each expert relative to the mean over experts, over time."""
    steps, loads = _series(lines, f"moe/{layer}/load")
    groups = np.array_split(np.arange(len(steps)), min(len(steps), _COLUMNS))
    ends = steps[[group[-1] for group in groups]]
    edges = np.concatenate([[2 * ends[0] - ends[1] if len(ends) > 1 else ends[0] - 1], ends])
    loads = np.stack([loads[group].sum(axis=0) for group in groups], axis=1)
    relative = loads / np.maximum(loads.mean(axis=0), 1e-9)

    figure, axes = _figure(title, "expert")
    axes.yaxis.set_major_locator(_integers())
    low, high = min(_LOAD_TICKS), max(_LOAD_TICKS)
    mesh = axes.pcolormesh(
        edges, np.arange(len(relative) + 1) - 0.5, relative.clip(low, high), norm=LogNorm(low, high), cmap="RdBu_r"
    )
    bar = figure.colorbar(mesh, label="load relative to the mean (1.0 = balanced)")
    bar.set_ticks(list(_LOAD_TICKS), labels=list(_LOAD_TICKS.values()), minor=False)
    bar.minorticks_off()
    return figure


def main() -> None:
    """Runs the command line; what is wrong with the run is one line on stderr and exit status 1."""
    parser = argparse.ArgumentParser(description="Draw the curves of a run as PNG pictures in RUN/report.")
    parser.add_argument("run", metavar="RUN", type=pathlib.Path, help="folder of the run")
    try:
        for path in write_report(parser.parse_args().run):
            print(path)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
