"""The demo's mixture of experts against its dense baseline of equal ops per timestep, on the same data and steps.

    .venv/bin/python experiments/lstm_moe_demo.py             about 50 minutes on two cores; finished runs are kept

Each arm trains once at every learning rate of one grid, with seed 0; its best rate by validation perplexity then gets
two more seeds. Test perplexities are read for the kept runs alone. Writes experiments/results/lstm_moe_demo.json.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moe_dist.cli import given
from moe_dist.configs import get
from moe_dist.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "lstm_moe_demo"
RESULT = ROOT / "experiments" / "results" / "lstm_moe_demo.json"
ARMS = ("lstm_moe_demo", "lstm_wide_demo")
GRID = (4e-3, 8e-3, 16e-3)
SEEDS = (0, 1, 2)


def train(arm: str, lr: float, seed: int) -> Path:
    """One run in one process; a finished one is not run again."""
    folder = RUNS / f"{arm}-{lr:g}-{seed}"
    if not finished(folder):
        sets = [f"optim.lr={lr}", f"seed={seed}", "wandb.mode=off", f"save_every={get(arm).steps}"]
        command = [sys.executable, "train.py", arm, "--folder", str(folder), *(p for s in sets for p in ("--set", s))]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with open(folder / "log.txt", "w") as log:
            subprocess.run(
                command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True
            )
        print(f"{arm} lr {lr:g} seed {seed}: valid perplexity {last(folder, 'valid/perplexity'):.2f}", flush=True)
    return folder


def finished(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() and any("test/perplexity" in line for line in read_metrics(folder))


def last(folder: Path, key: str) -> float:
    return [line[key] for line in read_metrics(folder) if key in line][-1]


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    with ThreadPoolExecutor(2) as pool:
        grid = {(arm, lr): pool.submit(train, arm, lr, 0) for lr in GRID for arm in ARMS}
        valid = {arm: {lr: last(grid[arm, lr].result(), "valid/perplexity") for lr in GRID} for arm in ARMS}
        best = {arm: min(valid[arm], key=valid[arm].__getitem__) for arm in ARMS}
        kept = {(arm, seed): pool.submit(train, arm, best[arm], seed) for seed in SEEDS for arm in ARMS}
        arms: dict[str, Any] = {}
        for arm in ARMS:
            folders = [kept[arm, seed].result() for seed in SEEDS]
            arms[arm] = {
                "lr": best[arm],
                "valid_perplexity_by_lr": {f"{lr:g}": p for lr, p in valid[arm].items()},
                "valid_perplexity": [last(folder, "valid/perplexity") for folder in folders],
                "test_perplexity": [last(folder, "test/perplexity") for folder in folders],
            }
    result = {
        "command": ".venv/bin/python experiments/lstm_moe_demo.py",
        "commit": commit.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, CPU, float32",
        "seeds": SEEDS,
        "given": given(get(ARMS[0])),
        "arms": arms,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(arms, indent=2))


if __name__ == "__main__":
    main()
