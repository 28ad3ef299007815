"""A demo's mixture of experts against its dense baseline of equal multiply-adds, on the same data
and steps.

    .venv/bin/python experiments/demos.py lstm_moe_demo        about 50 minutes on two cores; finished runs are kept
    .venv/bin/python experiments/demos.py widenet_demo
    .venv/bin/python experiments/demos.py widenet_text_demo

Each arm trains once at every learning rate of one grid, with seed 0; its best rate on the
validation split then gets two more seeds. The test split is read by the kept runs alone. Writes
experiments/results/DEMO.json.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moe_dist.config.papers import get
from moe_dist.monitoring.metrics_file import read_metrics
from moe_dist.tasks.registry import task_of

ROOT = Path(__file__).resolve().parent.parent
BASELINES = {
    "lstm_moe_demo": "lstm_wide_demo",
    "widenet_demo": "shared_vit_demo",
    "widenet_text_demo": "albert_demo",
}
GRIDS = {
    "lstm_moe_demo": (4e-3, 8e-3, 16e-3),
    "widenet_demo": (1e-3, 2e-3, 4e-3),
    "widenet_text_demo": (5e-4, 1e-3, 2e-3),
}
BEST = {"perplexity": min, "accuracy": max}
SEEDS = (0, 1, 2)


def train(demo: str, arm: str, lr: float, seed: int) -> Path:
    """One run in one process; a finished one is not run again."""
    folder = ROOT / "runs" / demo / f"{arm}-{lr:g}-{seed}"
    if not finished(folder):
        sets = [f"optim.lr={lr}", f"seed={seed}", "wandb.mode=off", f"save_every={get(arm).steps}"]
        command = [
            sys.executable,
            "train.py",
            arm,
            "--folder",
            str(folder),
            *(p for s in sets for p in ("--set", s)),
        ]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with open(folder / "log.txt", "w") as log:
            subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                check=True,
            )
        print(
            f"{arm} lr {lr:g} seed {seed}: valid loss {last(folder, 'valid/loss'):.4f}", flush=True
        )
    return folder


def finished(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() and any(
        "test/loss" in line for line in read_metrics(folder)
    )


def last(folder: Path, key: str) -> float:
    return [line[key] for line in read_metrics(folder) if key in line][-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", choices=BASELINES)
    demo = parser.parse_args().demo
    names, grid, config = (demo, BASELINES[demo]), GRIDS[demo], get(demo)
    measure = task_of(config).primary_metric
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    with ThreadPoolExecutor(2) as pool:
        first = {(arm, lr): pool.submit(train, demo, arm, lr, 0) for lr in grid for arm in names}
        valid = {
            arm: {lr: last(first[arm, lr].result(), f"valid/{measure}") for lr in grid}
            for arm in names
        }
        best = {arm: BEST[measure](valid[arm], key=valid[arm].__getitem__) for arm in names}
        kept = {
            (arm, seed): pool.submit(train, demo, arm, best[arm], seed)
            for seed in SEEDS
            for arm in names
        }
        arms: dict[str, Any] = {}
        for arm in names:
            folders = [kept[arm, seed].result() for seed in SEEDS]
            arms[arm] = {
                "lr": best[arm],
                f"valid_{measure}_by_lr": {f"{lr:g}": value for lr, value in valid[arm].items()},
                f"valid_{measure}": [last(folder, f"valid/{measure}") for folder in folders],
                f"test_{measure}": [last(folder, f"test/{measure}") for folder in folders],
            }
    result = {
        "command": f".venv/bin/python experiments/demos.py {demo}",
        "commit": commit.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, CPU, float32",
        "seeds": SEEDS,
        "given": task_of(config).comparison_key(config),
        "arms": arms,
    }
    file = ROOT / "experiments" / "results" / f"{demo}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(arms, indent=2))


if __name__ == "__main__":
    main()
