"""Words per second of whole training steps: our MoE models, their dense baseline of equal ops per
timestep, and MoE-256 with DeepSpeed's own layer and engine.

    .venv/bin/python benchmarks/lm.py                                  under ten minutes on two cores, 19 GB of memory
    .venv/bin/python benchmarks/lm.py --rounds 15 --json FILE

Sizes of Appendix C.1 (width 512, experts of 1,024, 4 of them for a word, dense 4,096), vocabulary
8,000 on the bundled text, full softmax, torch's fused Adam on every parameter (`_factored`: our own
factored Adam, the trainer's default, on those of experts), one process. All live in one process and
take turns in random order; a round is one step of each. Prints medians with 90 % intervals and the
medians of the rounds' ratios.

`deepspeed` drops nothing, as ours; `deepspeed_drops` has capacity 1.25. Both train the same
weights: a step of the one is followed by a step of the other.
"""

import argparse
import json
import random
import resource
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed_moe
import torch
from machine import machine

from moe_dist.config.overrides import override
from moe_dist.config.papers import get
from moe_dist.distributed import batch_layout
from moe_dist.distributed import mesh as meshes
from moe_dist.engine.deepspeed import Engine
from moe_dist.engine.ds_config import compute_dtype, read_ds_config
from moe_dist.engine.parallelize import parallelize
from moe_dist.optim.lr_schedule import learning_rate
from moe_dist.tasks.language_model import LanguageModel

DENSE, OURS = "moe_1_wide", ("moe_32", "moe_256", "moe_256_factored", "moe_256_h")
DEEPSPEED = ("deepspeed", "deepspeed_drops")


class Step(NamedTuple):
    seconds: float
    loss: float  # nats per word
    experts: float  # whose output a word got


class Stepper:
    """One model, ready to train a step at a time."""

    def __init__(
        self, name: str, lanes: int, mesh: meshes.Mesh, ds_config: str, theirs: bool = False
    ) -> None:
        """`theirs`: with DeepSpeed's layer and engine."""
        form = "factored_adam" if name.endswith("_factored") else "adam"
        sets = [
            "data.text=bundled",
            "data.streamed=false",
            "data.vocabulary_size=8000",
            "model.softmax_samples=none",
            f"batch.global_batch_size={lanes}",
            f"optim.expert_optimizer={form}",
            "optim.warmup_steps=10",
            f"ds_config={ds_config}",
        ]
        self.config = override(get(name.removesuffix("_factored")), sets)
        ds, layout = read_ds_config(self.config), batch_layout.make_batch_layout(self.config, 1)
        self.task = LanguageModel(self.config, layout, mesh, None)
        plain = self.task.build_model(self.config)
        self.engine: Any
        if theirs:
            self.engine = deepspeed_moe.Engine(plain, self.config, ds, layout, mesh)
        else:
            model = parallelize(plain, mesh, self.config.seed, compute_dtype(ds))
            self.engine = Engine(model, self.config.optim, ds, layout, mesh)
        self.task.reset_state(compute_dtype(ds))
        self.words = lanes * self.config.batch.seq_len
        self.done = 0

    def step(self) -> Step:
        """Trains one step."""
        start = time.perf_counter()
        self.engine.optimizer.start_step(
            learning_rate(self.config.optim, self.done + 1, self.config.steps)
        )
        (batch,) = self.task.batches(self.done)
        loss, sums, stats = self.task.loss(self.engine, batch, self.task.loss_denominator([batch]))
        self.engine.backward(loss)
        mean_loss = sums["nll"].item() / self.words  # also waits for the device
        seconds = time.perf_counter() - start
        experts = sum((s.load_E.sum() - s.dropped).item() for s in stats.values())
        self.done += 1
        return Step(seconds, mean_loss, experts / self.words)


def interval(values: list[float]) -> tuple[float, float]:
    """The middle 90 % of the values."""
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[0], cuts[-1]


def measure(steppers: dict[str, Stepper], rounds: int) -> dict[str, list[Step]]:
    """Steps by implementation, in rounds of random order, after two rounds that are not kept."""
    steps: dict[str, list[Step]] = {impl: [] for impl in steppers}
    order = random.Random(0)
    for round_ in range(rounds + 2):
        for impl in order.sample(list(steppers), len(steppers)):
            if impl in DEEPSPEED:
                steppers[impl].engine.layer.drops = impl == "deepspeed_drops"
            steps[impl].append(steppers[impl].step())
        print(f"\rround {round_ - 1}/{rounds}", end="", flush=True)
    return {impl: kept[2:] for impl, kept in steps.items()}


def summary(
    steps: dict[str, list[Step]], words: int, common: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row by implementation; `of_deepspeed` is of the faster of DeepSpeed's two settings."""
    rates = {impl: [words / step.seconds for step in kept] for impl, kept in steps.items()}
    best = max(DEEPSPEED, key=lambda impl: statistics.median(rates[impl]))
    rows = []
    for impl, rate in rates.items():
        low, high = interval(rate)
        ratios = (
            statistics.median(x / y for x, y in zip(rate, rates[base], strict=True))
            for base in (DENSE, best)
        )
        version = (
            deepspeed_moe.import_deepspeed().__version__ if impl in DEEPSPEED else torch.__version__
        )
        figures = {"tokens_per_sec": statistics.median(rate), "low": low, "high": high}
        figures |= dict(zip(("of_dense", "of_deepspeed"), ratios, strict=True))
        rows.append({"impl": impl, "version": version} | common | figures)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="steps of each that are timed")
    parser.add_argument(
        "--ours", nargs="+", default=OURS, choices=OURS, help="fewer of them where memory is short"
    )
    parser.add_argument("--lanes", type=int, default=256, help="lanes of 20 words a step")
    parser.add_argument("--ds-config", default="fp32", help="file of ds_configs/: fp32 or bf16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures there")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: at least 2, for an interval")
    mesh = meshes.init_distributed(ep=1)
    steppers = {
        name: Stepper(name, args.lanes, mesh, args.ds_config) for name in (DENSE, *args.ours)
    }
    steppers |= dict.fromkeys(
        DEEPSPEED, Stepper("moe_256", args.lanes, mesh, args.ds_config, theirs=True)
    )
    steps = measure(steppers, args.rounds)
    device = (
        torch.cuda.get_device_name()
        if mesh.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"\r{device}, {args.ds_config}, {args.lanes} lanes x 20 words a step, {args.rounds} rounds"
    )
    common = {"device": device, "dtype": args.ds_config} | machine()
    rows = summary(steps, steppers[DENSE].words, common)
    print(
        f"{'':<18}tokens/s 90 % of rounds  of dense  of DeepSpeed  experts/word  loss: first, last"
    )
    for row in rows:
        first, last = steps[row["impl"]][0], steps[row["impl"]][-1]
        print(
            f"{row['impl']:<18}{row['tokens_per_sec']:>7,.0f}{row['low']:>8,.0f}{row['high']:>8,.0f}"
            f"{row['of_dense']:>10.3f}{row['of_deepspeed']:>14.3f}{last.experts:>14.2f}{first.loss:>13.3f}{last.loss:>6.3f}"
        )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    meshes.shutdown()


if __name__ == "__main__":
    main()
