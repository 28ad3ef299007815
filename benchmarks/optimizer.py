"""Seconds of an update of stacked experts: our factored Adam beside torch's fused Adam, on the same
parameters.

    .venv/bin/python benchmarks/optimizer.py                             two minutes on a core, 7 GB of memory
    .venv/bin/python benchmarks/optimizer.py --rounds 31 --json FILE

Both matrices of 32 and of 256 experts of 512 x 1024 (Appendix C.1), float32. `update` alone, and
with it the pass that gives the gradient's norm and its row and column sums (`step`), are held
against fused Adam's step, which has no norm; `clipped Adam` is torch's `clip_grad_norm_` and then
fused Adam, and `adam form` our own use of fused Adam (`optim.expert_optimizer=adam`) with its norm
and its clip factor. All take turns in random order, a round is one of each. Prints medians with 90
% intervals, and medians of the rounds' ratios to fused Adam, and of our step to clipped Adam.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import nn

from moe_dist.config.schema import OptimConfig
from moe_dist.distributed.mesh import Axis
from moe_dist.optim.expert_state import AdamParam, FactoredAdamParam, Statistics

DIM, HIDDEN = 512, 1024
CONFIG, LR, SCALE = OptimConfig(), 1e-3, 0.5
BASE, CLIPPED = "fused Adam", "clipped Adam"


def contenders(num_experts: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """By name, what is timed: all on parameters and gradients of the same shape, the gradients
    shared.
    """
    shapes = ((num_experts, DIM, HIDDEN), (num_experts, HIDDEN, DIM))
    alone = Axis(1, 0, None)  # type: ignore[arg-type]  # nobody to talk to
    parameters = [nn.Parameter(torch.empty(s, device=device).uniform_(-0.1, 0.1)) for s in shapes]
    for p in parameters:
        p.grad = torch.empty_like(p).normal_(std=1e-3)
    factored = [FactoredAdamParam(p, alone) for p in parameters]
    adam_form = [AdamParam(p, alone) for p in parameters]
    fused = torch.optim.Adam(parameters, lr=LR, fused=True)
    last_statistics: list[Statistics] = []  # of the last `norm`
    steps = 0

    def update() -> None:
        nonlocal steps
        steps += 1
        for state, sums in zip(factored, last_statistics, strict=True):
            state.update(state.local_gradient(), sums, SCALE, LR, steps, CONFIG)

    def norm() -> None:
        last_statistics.clear()
        for state in factored:
            last_statistics.append(state.square(state.local_gradient())[1])

    def step_of_adam_form() -> None:
        sum(state.square(state.local_gradient())[0] for state in adam_form)
        for state in adam_form:
            state.update(state.local_gradient(), (), 1.0, LR, 1, CONFIG)

    def clipped() -> None:
        torch.nn.utils.clip_grad_norm_(
            parameters, 1e9
        )  # never reached, so that gradients stay as they are
        fused.step()

    return {
        "norm": norm,
        "update": update,
        "adam form": step_of_adam_form,
        CLIPPED: clipped,
        BASE: lambda: fused.step() and None,
    }


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Of this process on CPU, which others on the machine disturb least; of the clock on a GPU."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(num_experts: int, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds by name, after two rounds that are not kept. `update` comes right after `norm`, as in
    a step.
    """
    runs, order = contenders(num_experts, device), random.Random(0)
    turns = [("norm", "update"), ("adam form",), (CLIPPED,), (BASE,)]
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for turn in order.sample(turns, len(turns)):
            for name in turn:
                taken[name].append(seconds(runs[name], device))
    taken = {name: kept[2:] for name, kept in taken.items()}
    taken["step"] = [
        norm + update for norm, update in zip(taken["norm"], taken["update"], strict=True)
    ]
    return taken


def interval(values: list[float]) -> tuple[float, float]:
    """The middle 90 % of the values."""
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[0], cuts[-1]


def summary(taken: dict[str, list[float]], common: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, kept in taken.items():
        ratios = [mine / theirs for mine, theirs in zip(kept, taken[BASE], strict=True)]
        low, high = interval(kept)
        figures = {"seconds": statistics.median(kept), "low": low, "high": high}
        low, high = interval(ratios)
        figures |= {
            "of_fused_adam": statistics.median(ratios),
            "ratio_low": low,
            "ratio_high": high,
        }
        figures["of_clipped_adam"] = statistics.median(
            mine / theirs for mine, theirs in zip(kept, taken[CLIPPED], strict=True)
        )
        rows.append({"what": name} | common | figures)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures there")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: at least 2, for an interval")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{name}, torch {torch.__version__}, {args.rounds} rounds")
    print(
        f"{'experts':>7}  {'':<12}{'ms':>8}  90 % of rounds   of fused Adam  90 % of rounds  of "
        "clipped"
    )
    rows = []
    for num_experts in args.experts:
        common = {
            "num_experts": num_experts,
            "dim": DIM,
            "hidden": HIDDEN,
            "rounds": args.rounds,
            "device": name,
            "version": torch.__version__,
        } | machine()
        here = summary(measure(num_experts, args.rounds, device), common)
        for row in here:
            low, median, high = (1e3 * row[key] for key in ("low", "seconds", "high"))
            print(
                f"{num_experts:>7}  {row['what']:<12}{median:>8.1f}{low:>8.1f}{high:>8.1f}"
                f"{row['of_fused_adam']:>16.3f}{row['ratio_low']:>9.3f}{row['ratio_high']:>7.3f}{row['of_clipped_adam']:>12.3f}"
            )
        rows += here
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
