"""Tables and plots of the kept runs of `run.py`: experiments/results/widenet/README.md and PNG
files beside it.

.venv/bin/python experiments/widenet/report.py
"""

import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))
from run import ARMS, KEPT, kept

FOLDER = KEPT.parent
T95 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
}  # Student's t for a 95 % interval of a mean, by the number of seeds
Table = tuple[
    str, dict[str, str]
]  # what it asks and which way the paper went; arms with what they are called
TABLES: dict[str, Table] = {
    "WideNet and its baselines, images": (
        "Paper (ImageNet-1K): WideNet-L above ViT-L and ViT-MoE-L with a tenth of the parameters; "
        "a shared ViT below, "
        "and a wider one no better.",
        {
            "widenet": "WideNet, 4 experts",
            "shared_vit": "shared ViT, FFN 1x",
            "shared_vit_2x": "shared ViT, FFN 2x",
            "vit": "ViT, nothing shared",
            "vit_moe": "ViT-MoE, nothing shared",
        },
    ),
    "Routing shared by groups of blocks, images": (
        "Paper: fewer routings are clearly worse.",
        {
            "routing_1": "1 routing",
            "routing_2": "2 routings",
            "routing_3": "3 routings",
            "widenet": "6, one a block",
        },
    ),
    "LayerNorms, images": (
        "Paper: shared ones are worse by a point and more.",
        {"widenet": "individual", "shared_norms": "shared"},
    ),
    "Number of experts, images": (
        "Paper: beyond 4 the fit in training gets better and accuracy worse.",
        {"experts_2": "2", "widenet": "4", "experts_8": "8", "experts_16": "16"},
    ),
    "Number of experts, texts": (
        "Paper: the more the better, and all above ALBERT.",
        {
            "text_albert": "ALBERT-style, dense",
            "text_experts_2": "2",
            "text_experts_4": "4",
            "text_experts_8": "8",
            "text_experts_16": "16",
        },
    ),
    "Half the blocks, images": (
        "Paper: WideNet-L with 12 blocks is 1.3 points below that with 24.",
        {"widenet": "6 blocks", "half_depth": "3 blocks"},
    ),
}


def runs_of(name: str) -> list[dict[str, Any]]:
    return [run for seed in range(ARMS[name].seeds) if (run := kept(name, seed)) is not None]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval; not a number from one value."""
    if len(values) < 2:
        return mean(values), float("nan")
    return mean(values), T95[len(values)] * stdev(values) / len(values) ** 0.5


def percent(values: list[float]) -> str:
    middle, half = interval(values)
    return f"{100 * middle:.2f} ± {100 * half:.2f}" if half == half else f"{100 * middle:.2f}"


def table(arms: dict[str, str]) -> list[str]:
    lines = [
        "| arm | parameters | multiply-adds | ms a step | dropped | seeds | test accuracy, % | "
        "train accuracy, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, called in arms.items():
        if runs := runs_of(name):
            lines.append(
                f"| {called} | {runs[0]['parameters']:,} | {runs[0]['multiply_adds'] / 1e6:.1f}M "
                f"| {mean(run['milliseconds_per_step'] for run in runs):.0f} "
                f"| {100 * mean(run['drop_rate'] for run in runs):.1f} % | {len(runs)} "
                f"| {percent([run['test_accuracy'] for run in runs])} "
                f"| {percent([run['train_accuracy'][-1] for run in runs])} |"
            )
    return lines


def divergence() -> list[str]:
    """y at the end of training, of WideNet and of a shared ViT with LayerNorms of its own for each
    block.
    """
    arms = {name: runs_of(name) for name in ("widenet", "shared_vit")}
    lines = ["| LayerNorms | WideNet | shared ViT |", "|---|---|---|"]
    for key in arms["widenet"][0]["norms"]:
        cells = []
        for runs in arms.values():
            middle, half = interval([run["norms"][key][-1] for run in runs])
            cells.append(f"{middle:.2e} ± {half:.1e}")
        lines.append(f"| {key.removeprefix('norms/').replace('.', ', ')} | {' | '.join(cells)} |")
    return lines


def report() -> str:
    """All tables, from the kept runs alone."""
    parts = [
        "# Ablations of WideNet",
        f"Written by `experiments/widenet/report.py` from `kept/`. {run_notes()}",
        "These runs let vectors decay as matrices do (weight decay 0.1), which pulls divergences "
        "towards 0; "
        "since 2026-12-01 vectors are exempt.",
    ]
    for title, (direction, arms) in TABLES.items():
        parts += [f"## {title}", direction, "\n".join(table(arms))]
    parts += [
        "## Divergence of LayerNorms, images",
        "Paper: larger in WideNet than in ViT, for gains and biases.",
        "\n".join(divergence()),
    ]
    return "\n\n".join(parts) + "\n"


def run_notes() -> str:
    runs = [run for name in ARMS for run in runs_of(name)]
    commits = ", ".join(sorted({run["commit"] for run in runs}))
    wanted = sum(arm.seeds for arm in ARMS.values())
    return (
        f"{len(runs)} of {wanted} runs, {sum(run['minutes'] for run in runs) / 2:.0f} minutes two "
        "at a time; "
        f"{runs[0]['machine']}; commit {commits}.\n`run.py` tells what is cut. ± is half of a 95 % "
        "interval (Student's "
        f"t over seeds). Train accuracy is that of the last steps, with dropout and noise on."
    )


def bars(axes: Axes, arms: dict[str, str]) -> None:
    """Test accuracy of each arm with its interval."""
    there = {called: runs for name, called in arms.items() if (runs := runs_of(name))}
    for i, runs in enumerate(there.values()):
        values = [100 * run["test_accuracy"] for run in runs]
        middle, half = interval(values)
        axes.errorbar(i, middle, half, fmt="o", capsize=5, color="black")
        axes.plot([i] * len(values), values, ".", color="tab:blue", alpha=0.6)
    axes.set_xticks(range(len(there)), [called.replace(", ", ",\n") for called in there])
    axes.set_ylabel("test accuracy (%)\nmean, 95 % interval, seeds")
    axes.grid(axis="y", alpha=0.3)


def curves(figure: Figure, arms: dict[str, str], quantity: str) -> None:
    """In training and held out, means over seeds."""
    train, valid = figure.subplots(1, 2, sharey=True)
    for axes, split in ((train, "train"), (valid, "valid")):
        for name, called in arms.items():
            if runs := runs_of(name):
                values = [
                    [run[f"{split}_{quantity}"][i] for run in runs]
                    for i in range(len(runs[0]["steps"]))
                ]
                axes.plot(runs[0]["steps"], [mean(v) for v in values], marker=".", label=called)
        axes.set_title("in training" if split == "train" else "held out")
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3)
    train.set_ylabel(f"{quantity}, mean over seeds")
    valid.legend(title="experts")


def figures() -> dict[str, Figure]:
    drawn = {}
    for title, (_, arms) in TABLES.items():
        if any(runs_of(name) for name in arms):
            figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
            axes = figure.subplots()
            bars(axes, arms)
            axes.set_title(title)
            drawn[title.lower().replace(",", "").replace(" ", "_")] = figure
    for of in ("images", "texts"):
        figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
        arms = {n: c for n, c in TABLES[f"Number of experts, {of}"][1].items() if c.isdigit()}
        curves(figure, arms, "loss")
        figure.suptitle(f"Number of experts, {of}: loss (nats)")
        drawn[f"fit_by_number_of_experts_{of}"] = figure
    return drawn


def main() -> None:
    (FOLDER / "README.md").write_text(report())
    for stem, figure in figures().items():
        figure.savefig(FOLDER / f"{stem}.png")
    print(f"{FOLDER}: README.md and pictures")


if __name__ == "__main__":
    main()
