"""Compares predictions of `python -m moe_dist.planner --measure` with measurements: step time and
peak memory.

    .venv/bin/python experiments/plan.py --rounds 3      adds to what is kept; 3 minutes a round and config on two cores
    .venv/bin/python experiments/plan.py --rounds 3 --blind     layouts alone that the plan was not made with

A round of a config is its plan by measurements, and then a short training on each of the layouts
below in processes of their own, in an order drawn anew, with the same steps. Prediction and
measurement are each the median of all rounds.
Memory is what a rank has held at most beside what imports take: on CPU, peak resident memory.
Writes experiments/results/plan/results.json after each round, and table.md.
"""

import argparse
import dataclasses
import json
import random
import statistics
from pathlib import Path
from typing import Any

from moe_dist.config import papers
from moe_dist.config.overrides import override
from moe_dist.distributed.spawn import run_distributed
from moe_dist.planner.__main__ import measure_this_machine
from moe_dist.planner.microbenchmark import run_short_training
from moe_dist.planner.search import plan_layouts

FOLDER = Path(__file__).parent / "results" / "plan"
RANKS = 2
Set = dict[
    str, tuple[str, list[str], list[tuple[int, int]]]
]  # config, overrides, layouts: ep, ZeRO stage
LOOKED_AT: Set = {  # while the plan's form was chosen
    "lstm_moe_demo": ("lstm_moe_demo", [], [(2, 0), (1, 1), (2, 3)]),
    "lstm_moe_demo, 256 experts, 128 lanes": (
        "lstm_moe_demo",
        ["model.moe.num_experts=256", "batch.global_batch_size=128"],
        [(1, 0), (2, 1), (1, 3)],
    ),
    "widenet_demo, 128 images": (
        "widenet_demo",
        ["batch.global_batch_size=128"],
        [(1, 0), (2, 1), (2, 2)],
    ),
    "widenet_text_demo": ("widenet_text_demo", [], [(2, 0), (1, 2), (1, 3)]),
}
BLIND: Set = {  # written down before any of them was planned or measured
    "lstm_moe_demo, 2 of 8 groups, 2 of 8 experts": (
        "lstm_moe_demo",
        ["model.moe.num_groups=8", "model.moe.k=2"],
        [(2, 1), (1, 2), (2, 3)],
    ),
    "lstm_moe_demo, width 256, 32 experts of 512": (
        "lstm_moe_demo",
        ["model.dim=256", "model.moe.num_experts=32", "model.moe.expert_hidden_dim=512"],
        [(2, 0), (1, 1), (2, 2)],
    ),
    "widenet_demo, 8 experts, 64 images, depth 4": (
        "widenet_demo",
        ["model.encoder.moe.num_experts=8", "batch.global_batch_size=64", "model.encoder.depth=4"],
        [(2, 0), (1, 1), (2, 3)],
    ),
    "widenet_pretraining_demo": ("widenet_pretraining_demo", [], [(1, 0), (2, 2), (1, 3)]),
}
CONFIGS = LOOKED_AT | BLIND


def one(name: str) -> dict[str, Any]:
    """Runs a round of a config. Returns its predictions and measurements by layout."""
    base, sets, layouts = CONFIGS[name]
    config = override(papers.get(base), [*sets, "wandb.mode=off"])
    machine, rank_costs = measure_this_machine(config, 1, RANKS, 1.0)
    planned = {
        (plan.ep, plan.zero_stage): plan
        for plan in plan_layouts(config, 1, RANKS, machine, rank_costs)
    }
    result: dict[str, Any] = {"machine": dataclasses.asdict(machine)}
    for ep, zero_stage in random.sample(layouts, len(layouts)):
        plan = planned[ep, zero_stage]
        at_layout = override(config, [f"mesh.ep={ep}", f"zero_stage={zero_stage}"])
        runs = run_distributed(run_short_training, RANKS, at_layout, timeout=280)
        result[f"{ep},{zero_stage}"] = {
            "predicted": {
                "step": plan.step_s,
                "bytes": plan.memory_bytes - plan.memory["libraries"],
                "seconds": plan.seconds,
            },
            "measured": {
                "step": max(run.step_s for run in runs),
                "bytes": max(run.training_bytes for run in runs),
                "seconds": runs[0].seconds,
            },
        }
    return result


def table(kept: dict[str, list[Any]]) -> str:
    """Markdown, medians over rounds."""
    heads = [
        "config",
        "ep, ZeRO",
        "ms predicted",
        "ms measured",
        "off",
        "MB predicted",
        "MB measured",
        "off",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, rounds in kept.items():
        for ep, zero in CONFIGS[name][2]:
            cells = []
            for key, unit in (("step", 1e3), ("bytes", 1e-6)):
                each = [
                    [unit * r[f"{ep},{zero}"][what][key] for r in rounds]
                    for what in ("predicted", "measured")
                ]
                said, got = map(statistics.median, each)
                cells += [
                    *(f"{statistics.median(x):.0f} ({min(x):.0f} to {max(x):.0f})" for x in each)
                ]
                cells += [f"{100 * (said / got - 1):+.0f} %"]
            lines += [f"| {name} | {ep}, {zero} | {' | '.join(cells)} |"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", choices=CONFIGS, action="append", help="these configs alone")
    which.add_argument(
        "--blind", action="store_true", help="those alone that the plan was not made with"
    )
    args = parser.parse_args()
    file = FOLDER / "results.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for _ in range(args.rounds):
        for name in args.only or (BLIND if args.blind else CONFIGS):
            kept.setdefault(name, []).append(one(name))
            file.write_text(json.dumps(kept, indent=1) + "\n")
            (FOLDER / "table.md").write_text(table(kept) + "\n")
    print(table(kept))


if __name__ == "__main__":
    main()
