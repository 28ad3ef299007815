"""Milliseconds of one MoE feed-forward layer, forward and backward: ours, the limits it is held
against, other systems.

    .venv/bin/python benchmarks/layer.py                            e32 and e256, all that is installed
    .venv/bin/python benchmarks/layer.py --shapes e32 e256 widenet3072 widenet4096 --gate --gelu --json FILE
    .venv/bin/python benchmarks/layer.py --shapes e32 e256 e1024 --threads 2
    .venv/bin/python benchmarks/layer.py --shapes e256 --world 2 --skew 0.6
    .venv/bin/python benchmarks/layer.py --shapes tokens --impl ours        a ladder of E; `rows` is the other

All of all shapes take turns in random order, on the same weights, tokens and choices; a round is
one step of each.
Printed are medians with 90 % intervals, medians of the rounds' ratios to the dense limit's speed,
relative errors (norms; bf16 against float32, float32 against float64) of the output and of the
worst gradient, and the share of assignments that is dropped. Time is the process's with one thread
on one rank, which others on the machine disturb least; else the clock's, of the slowest rank.

`dense` is the limit: one expert of the same shape gets all T·K rows, under plain autograd. `sorted`
is matmuls and ReLU alone, without autograd, on rows that lie sorted. `ours` reuses the memory of
the weights' gradients, as training on CPU does, `sorted_reused` and `dense_reused` reuse all;
`sorted` and other systems reuse none.
`ours_triton` has the kernels for a GPU that training does not take before they are measured.
`--gate` adds our layer with a noisy gate and both its losses, held against the dense limit with
that gate alone beside it; `--gelu` adds our experts with GELU and biases, held against a dense
network of that kind.
`peers.py` says what the others are.

On Linux fresh pages are a fifth of plain autograd's time, or none of it: where other
implementations share the process, its heap may keep enough for all. `--keep-memory` has it so for
every one, and the figures hang on nobody else then.

In float32 a hidden unit within rounding of 0 may fall either way, and is then an error of 2e-4 in
the gradients.

Legend: T tokens of all ranks, D width, H hidden units (F in names of tensors), E experts, K choices
    of a token.
"""

import argparse
import ctypes
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from machine import in_words, machine
from optimizer import interval
from ours import OURS, WITH_GATE, WITH_GELU, Work
from peers import PEERS

from moe_dist.distributed import launch_env
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.spawn import run_distributed
from moe_dist.nn import prng


class Shape(NamedTuple):
    T: int
    D: int
    H: int
    E: int
    K: int
    dtype: str


SHAPES = {
    "e32": Shape(8192, 512, 1024, 32, 4, "bf16"),
    "e256": Shape(8192, 512, 1024, 256, 4, "bf16"),
    "e1024": Shape(4096, 256, 512, 1024, 2, "fp32"),
    "widenet3072": Shape(3136, 768, 3072, 4, 2, "bf16"),
    "widenet4096": Shape(3136, 768, 4096, 4, 2, "bf16"),
    "tiny": Shape(64, 16, 32, 8, 2, "fp32"),
}
LADDERS = {  # E at equal tokens, and at equal tokens per expert; they meet at E = 32
    "tokens": {f"tokens{e}": Shape(4096, 256, 512, e, 2, "fp32") for e in (4, 32, 256, 1024)},
    "rows": {f"rows{e}": Shape(128 * e, 256, 512, e, 2, "fp32") for e in (4, 32, 256, 1024)},
}
EVERY = SHAPES | LADDERS["tokens"] | LADDERS["rows"]
DTYPES = {
    "bf16": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32, torch.float64),
}  # and the reference's
# "dense" for all others
BASES = {
    f"{whose}_{what}": f"dense_{what}" for whose in ("dense", "ours") for what in ("gate", "gelu")
}
ALL = OURS | PEERS
# know no exchange of tokens between ranks, or it is not here
ONE_RANK = {"sorted", "sorted_reused", "naive", "hf_grouped_mm", "scattermoe", "sonicmoe"}
Key = tuple[str, str]  # shape, implementation


class Taken(NamedTuple):
    """What one rank measured of one implementation."""

    version: str
    dropped: float
    load: float  # of the fullest expert, over the mean
    error_y: float | None
    error_gradients: float | None
    seconds: list[float]


def draw(shape: Shape, skew: float, device: torch.device) -> Work:
    """The work of all ranks. The n-th of the experts, in an order drawn as well, is chosen in
    proportion to n ** -skew,
    the K of a token without return."""
    g, dtype = prng.generator("layer", *shape), DTYPES[shape.dtype][0]
    popularity_E = (
        -skew * torch.arange(1.0, shape.E + 1).log()[torch.randperm(shape.E, generator=g)]
    )
    gumbel_TE = -torch.empty(shape.T, shape.E).exponential_(generator=g).log()

    def weights(*size: int) -> torch.Tensor:
        bound = (3 / size[1]) ** 0.5
        return torch.empty(*size, dtype=dtype).uniform_(-bound, bound, generator=g)

    drawn = (
        torch.randn(shape.T, shape.D, generator=g).to(dtype),
        torch.randn(shape.T, shape.D, generator=g).to(dtype),
        (popularity_E + gumbel_TE).topk(shape.K).indices,
        torch.randn(shape.T, shape.K, generator=g).softmax(1).sort(descending=True).values,
        weights(shape.E, shape.D, shape.H),
        weights(shape.E, shape.H, shape.D),
    )
    return Work(shape.E, *(t.to(device) for t in drawn))


def reference(work: Work, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The output, and the gradients by what they are of; slow and obvious, in `dtype`."""
    x_TD, dy_TD, gate_TK = (t.to(dtype) for t in (work.x_TD, work.dy_TD, work.gate_TK))
    y_TD, dx_TD, dgate_TK = (torch.zeros_like(t) for t in (x_TD, x_TD, gate_TK))
    dw1_EDF, dw2_EFD = (torch.empty_like(w, dtype=dtype) for w in (work.w1_eDF, work.w2_eFD))
    for i in range(work.num_experts):
        token, choice = (work.expert_TK == i).nonzero(as_tuple=True)
        w1, w2, x, dy = (
            work.w1_eDF[i].to(dtype),
            work.w2_eFD[i].to(dtype),
            x_TD[token],
            dy_TD[token],
        )
        gate = gate_TK[token, choice, None]
        h = (x @ w1).relu()
        y_TD.index_add_(0, token, gate * (h @ w2))
        dgate_TK[token, choice] = (dy * (h @ w2)).sum(1)
        dh = (gate * dy) @ w2.t() * (h > 0)
        dx_TD.index_add_(0, token, dh @ w1.t())
        dw1_EDF[i], dw2_EFD[i] = x.t() @ dh, h.t() @ (gate * dy)
    return {"y": y_TD, "x": dx_TD, "gate": dgate_TK, "w1": dw1_EDF, "w2": dw2_EFD}


def errors(
    results: dict[str, torch.Tensor], right: dict[str, torch.Tensor]
) -> tuple[float | None, float | None]:
    """Of the output, and the worst of the gradients. None where there is nothing to compare."""
    relative = {
        name: ((x.to(right[name]) - right[name]).norm() / right[name].norm()).item()
        for name, x in results.items()
    }
    y = relative.pop("y", None)
    return y, max(relative.values(), default=None)


def measure(
    shapes: list[str], impls: list[str], rounds: int, threads: int, skew: float, keep_memory: bool
) -> dict[Key, Taken]:
    """On one rank; after two rounds that are not kept."""
    torch.set_num_threads(threads)
    if keep_memory:
        keep_freed_memory()
    mesh = meshes.init_distributed(ep=launch_env.world_size())
    layers: dict[Key, Any] = {}
    taken: dict[Key, Taken] = {}
    left_out: set[str] = set()
    for name in shapes:
        shape = EVERY[name]
        whole = draw(shape, skew, mesh.device)
        share, mine = shape.T // mesh.dp.size, mesh.local_experts(shape.E)
        tokens, experts = (
            slice(mesh.dp.index * share, (mesh.dp.index + 1) * share),
            slice(mine.start, mine.stop),
        )
        work, load = (
            whole.part(tokens, experts),
            (whole.count_E.max() / whole.count_E.float().mean()).item(),
        )
        of_all = reference(whole, DTYPES[shape.dtype][1])
        right = {what: t[experts if what in ("w1", "w2") else tokens] for what, t in of_all.items()}
        for impl in impls:
            try:
                layer = (ALL | WITH_GATE | WITH_GELU)[impl](work, mesh)
            except ImportError as error:
                reason = f"{impl} is left out: {error}"
                if mesh.is_main and reason not in left_out:
                    print(reason)
                left_out.add(reason)
                continue
            layer.step()
            layers[name, impl] = layer
            taken[name, impl] = Taken(
                layer.version, layer.dropped, load, *errors(layer.results(), right), []
            )
    order = random.Random(0)  # the same on every rank
    for round_ in range(rounds + 2):
        for key in order.sample(list(layers), len(layers)):
            spent = seconds(layers[key].step, mesh)
            if round_ >= 2:
                taken[key].seconds.append(spent)
        if mesh.is_main:
            print(f"\rround {round_ - 1}/{rounds}", end="", flush=True)
    if mesh.is_main:
        print("\r", end="")
    meshes.shutdown()
    return taken


def keep_freed_memory() -> None:
    """Has the C library (glibc) take all memory from one heap, and give nothing of it back to the
    system.
    """
    mallopt = ctypes.CDLL(None).mallopt
    no_mmap, no_trim, grow = (
        mallopt(-4, 0),
        mallopt(-1, -1),
        mallopt(-2, 2**26),
    )  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    assert no_mmap and no_trim and grow


def seconds(run: Any, mesh: meshes.Mesh) -> float:
    clock = time.perf_counter
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    elif mesh.dp.size == 1 and torch.get_num_threads() == 1:
        clock = time.process_time
    dist.barrier()
    start = clock()
    run()
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def slowest(ranks: list[dict[Key, Taken]]) -> dict[Key, Taken]:
    """Of all ranks: the longest time of each round, and the largest errors."""

    def worst(values: tuple[float | None, ...]) -> float | None:
        return max((v for v in values if v is not None), default=None)

    merged = {}
    for key, first in ranks[0].items():
        each = [taken[key] for taken in ranks]
        error_y, error_gradients = (
            worst(e) for e in zip(*((t.error_y, t.error_gradients) for t in each), strict=True)
        )
        longest = [max(round_) for round_ in zip(*(t.seconds for t in each), strict=True)]
        merged[key] = first._replace(
            error_y=error_y, error_gradients=error_gradients, seconds=longest
        )
    return merged


def summary(taken: dict[Key, Taken], common: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for (name, impl), one in taken.items():
        base = taken[name, BASES.get(impl, "dense")].seconds
        low, high = interval(one.seconds)
        figures = {"ms": 1e3 * statistics.median(one.seconds), "low": 1e3 * low, "high": 1e3 * high}
        figures["of_dense"] = statistics.median(
            limit / mine for limit, mine in zip(base, one.seconds, strict=True)
        )
        told = {
            "load": one.load,
            "dropped": one.dropped,
            "error_y": one.error_y,
            "error_gradients": one.error_gradients,
        }
        about = {"impl": impl, "version": one.version, "shape": name} | EVERY[name]._asdict()
        rows.append(about | common | figures | told)
    return rows


def print_table(rows: list[dict[str, Any]], taken: dict[Key, Taken]) -> None:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    shape = None
    for row in rows:
        if row["shape"] != shape:
            shape = row["shape"]
            sizes = " ".join(f"{key}{row[key]}" for key in "TDHEK")
            print(f"\n{shape}: {sizes} {row['dtype']}, fullest expert {row['load']:.2f} x the mean")
            print(
                f"{'':<16}{'ms':>9}{'90 % of rounds':>20}{'of dense':>10}{'error: y':>10}{'gradients':>11}  dropped"
            )
        print(
            f"{row['impl']:<16}{row['ms']:>9.2f}{row['low']:>10.2f}{row['high']:>10.2f}{row['of_dense']:>10.3f}"
            f"{number(row['error_y'], '.1e'):>10}{number(row['error_gradients'], '.1e'):>11}{row['dropped']:>9.3f}"
        )
    for ladder, steps in LADDERS.items():
        (lowest, few), *_, (highest, many) = steps.items()
        for impl in sorted(
            {impl for name, impl in taken if name == highest and (lowest, impl) in taken}
        ):
            pairs = zip(taken[highest, impl].seconds, taken[lowest, impl].seconds, strict=True)
            ratio = statistics.median(b / a for b, a in pairs) * few.T / many.T
            print(f"{ladder}: {impl} per token, E {many.E} over E {few.E}: {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", default=["e32", "e256"], choices=[*LADDERS, *EVERY], metavar="SHAPE"
    )
    parser.add_argument(
        "--impl", nargs="+", default=list(ALL), choices=list(ALL), help="`dense` always joins"
    )
    parser.add_argument(
        "--gate",
        action="store_true",
        help="our layer and the dense limit with a noisy gate as well",
    )
    parser.add_argument(
        "--gelu", action="store_true", help="and both with GELU and biases in place of ReLU"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--world", type=int, default=1, help="ranks on this machine; experts are spread over all"
    )
    skew = "zipf exponent of experts' popularity; max/mean load 3, 7: about 0.5, 1.3 at e32, 0.26, 0.46 at e256"
    parser.add_argument("--skew", type=float, default=0.0, help=skew)
    parser.add_argument(
        "--keep-memory", action="store_true", help="no implementation pays for fresh pages (glibc)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures there")
    args = parser.parse_args()
    shapes = [each for name in args.shapes for each in LADDERS.get(name, [name])]
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: at least 2, for an interval")
    for name in shapes:
        if args.world < 1 or EVERY[name].E % args.world or EVERY[name].T % args.world:
            parser.error(
                f"--world {args.world}: must divide the {EVERY[name].E} experts and the tokens of "
                f"{name}"
            )
    impls = [
        impl
        for impl in ALL
        if impl in ("dense", *args.impl) and not (args.world > 1 and impl in ONE_RANK)
    ]
    impls += list(WITH_GATE) * args.gate + list(WITH_GELU) * args.gelu
    job = shapes, impls, args.rounds, args.threads, args.skew, args.keep_memory
    alone = args.world == 1
    taken = (
        measure(*job)
        if alone
        else slowest(run_distributed(measure, args.world, *job, timeout=24 * 3600))
    )
    device, told = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", machine()
    ranks = f"ranks x threads: {args.world} x {args.threads}"
    print(f"{device}, {in_words(told)}, {ranks}, torch {torch.__version__}, {args.rounds} rounds")
    common = {
        "world": args.world,
        "skew": args.skew,
        "threads": args.threads,
        "rounds": args.rounds,
        "keep_memory": args.keep_memory,
        "device": device,
    } | told
    rows = summary(taken, common)
    print_table(rows, taken)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
