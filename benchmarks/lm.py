"""Words per second of whole training steps: MoE-32 beside MoE-1-Wide, its dense baseline of equal ops per timestep.

    .venv/bin/python benchmarks/lm.py                                  a few minutes on two cores
    .venv/bin/python benchmarks/lm.py --rounds 15 --json FILE

Sizes of Appendix C.1 (width 512, experts of 1,024, k 4, dense 4,096), vocabulary 8,000 on the embedded text, one
process. Both models live in one process and take turns in random order; a round is one step of each. Prints medians
with 90 % intervals and the median of the rounds' ratios.
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from moe_dist.config import override
from moe_dist.configs import get
from moe_dist.engine import Engine, compute_dtype, read_ds_config
from moe_dist.optim import learning_rate
from moe_dist.parallel import mesh as meshes
from moe_dist.parallelize import parallelize
from moe_dist.tasks import LanguageModel

MODELS = ("moe_32", "moe_1_wide")


class Stepper:
    """One model, ready to train a step at a time."""

    def __init__(self, name: str, lanes: int, mesh: meshes.Mesh, ds_config: str) -> None:
        sets = ["data.text=embedded", "data.streamed=false", "data.vocabulary_size=8000", f"batch.samples={lanes}"]
        sets += [f"ds_config={ds_config}"]
        self.config = override(get(name), sets)
        ds, layout = read_ds_config(self.config), meshes.lay_out(self.config, 1)
        self.task = LanguageModel(self.config, layout, mesh)
        model = parallelize(self.task.plain_model(self.config), mesh, self.config.seed, compute_dtype(ds))
        self.engine = Engine(model, self.config.optim, ds, layout, mesh)
        self.optimizer = self.engine.optimizer
        self.task.start(compute_dtype(ds))
        self.words = lanes * self.config.batch.timesteps
        self.done = 0

    def step(self) -> float:
        """Trains one step; seconds."""
        start = time.perf_counter()
        self.optimizer.begin(learning_rate(self.config.optim, self.done + 1))
        batches = list(self.task.batches(self.done))
        words = self.task.words(batches)
        for batch in batches:
            loss, _, _ = self.task.loss(self.engine, batch, words)
            self.engine.backward(loss)
        assert self.optimizer.norm < float("inf")  # also waits for the device
        self.done += 1
        return time.perf_counter() - start


def interval(values: list[float]) -> tuple[float, float]:
    """The middle 90 % of the values."""
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[0], cuts[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each model")
    parser.add_argument("--lanes", type=int, default=256, help="lanes of 20 words a step")
    parser.add_argument("--ds-config", default="fp32", help="file of ds_configs/: fp32 or bf16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures there")
    args = parser.parse_args()
    mesh = meshes.start(ep=1)
    steppers = {name: Stepper(name, args.lanes, mesh, args.ds_config) for name in MODELS}
    for stepper in steppers.values():
        stepper.step(), stepper.step()
    seconds: dict[str, list[float]] = {name: [] for name in MODELS}
    order = random.Random(0)
    for round_ in range(args.rounds):
        for name in order.sample(MODELS, len(MODELS)):
            seconds[name].append(steppers[name].step())
        print(f"\rround {round_ + 1}/{args.rounds}", end="", flush=True)
    device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\r{device}, {args.ds_config}, {args.lanes} lanes x 20 words a step, {args.rounds} rounds")
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        rate = [steppers[name].words / s for s in seconds[name]]
        ratio = [dense / s for s, dense in zip(seconds[name], seconds["moe_1_wide"], strict=True)]
        low, high = interval(rate)
        rows.append(
            {
                "impl": name, "version": torch.__version__, "device": device, "machine": platform.machine(),
                "dtype": args.ds_config, "words_per_second": statistics.median(rate), "low": low, "high": high,
                "of_dense": statistics.median(ratio),
            }
        )  # fmt: skip
        of_dense = f"{rows[-1]['of_dense']:.3f} of moe_1_wide"
        print(f"{name:<12}{rows[-1]['words_per_second']:>9,.0f} words/s  ({low:,.0f} to {high:,.0f})   {of_dense}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    meshes.stop()


if __name__ == "__main__":
    main()
