"""Bytes and seconds of a layer's exchange by kind: ragged, once to each rank, once to each node.

    .venv/bin/python benchmarks/exchange.py                      four ranks here, told that they are two nodes of two
    .venv/bin/python benchmarks/exchange.py --ranks 2            two ranks of one node
    sudo benchmarks/two_nodes.sh 1gbit 2 benchmarks/exchange.py  two network namespaces with a link of 1 Gbit/s
    torchrun ... benchmarks/exchange.py --json FILE              any ranks

Forward and backward of 4,096 tokens a rank to experts that only weight their rows, 4 of 256 for each token, popular by
Zipf's law. All kinds take turns in random order, a round is one of each, timed by the clock between barriers, and every
kind's output and gradient are compared with the ragged ones. Bytes are of forward, there and back, with ids, weights:
those that a rank sends to others, the mean of the ranks. Prints medians with 90 % intervals, and medians of the rounds'
ratios to the ragged exchange.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.parallel import mesh as meshes
from moe_dist.parallel.collectives import sum_over
from moe_dist.parallel.spawn import run_distributed
from moe_dist.parallelize import exchange_on
from moe_dist.routing import Routing, route

BASE = "ragged"


class Weigh:
    """An expert module without experts: rows times their weights."""

    needs_context = False

    def __call__(self, x_RD: torch.Tensor, gate_R: torch.Tensor, count_e: torch.Tensor, ctx_R: Any) -> Any:
        return x_RD * gate_R.to(x_RD.dtype)[:, None], None


def routed(args: argparse.Namespace, rank: int) -> Routing:
    """Of this rank's tokens: each draws different experts by their popularity 1 / place ** zipf."""
    everywhere, here = (torch.Generator().manual_seed(seed) for seed in (0, 1 + rank))
    place_E = 1 + torch.randperm(args.experts, generator=everywhere)
    uniform_TE = torch.rand(args.tokens, args.experts, generator=here)
    score_TE = -args.zipf * place_E.log() - (-uniform_TE.log()).log()  # Gumbel: the top k are such a draw
    top = score_TE.topk(args.k, 1)
    return route(top.indices, top.values.softmax(1), torch.ones_like(top.indices, dtype=torch.bool), args.experts)


def ranks(args: argparse.Namespace, per_node: int | None) -> list[dict[str, Any]]:
    if per_node:
        os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    meshes.join()
    mesh = meshes.arrange(dist.get_world_size())
    kinds = [BASE, "once", *(["node"] if mesh.inside else [])]
    exchanges = {kind: exchange_on(mesh, kind) for kind in kinds}
    routing, dtype = routed(args, mesh.dp.index), getattr(torch, args.dtype)
    ctx: Any = argparse.Namespace(site=0)  # of a context only the site matters here
    x_TD = torch.randn(args.tokens, args.dim).to(dtype).requires_grad_()
    dy_TD = torch.randn(args.tokens, args.dim).to(dtype)
    order, taken, told = random.Random(0), {kind: [] for kind in kinds}, {}
    for _ in range(args.rounds + 2):
        for kind in order.sample(kinds, len(kinds)):
            dist.barrier()
            start, sent = time.perf_counter(), mesh.sent
            y_TD, _ = exchanges[kind](x_TD, routing, Weigh(), ctx)
            forward = Counter({label: n - sent[label] for label, n in mesh.sent.items()})
            (dx_TD,) = torch.autograd.grad(y_TD, x_TD, dy_TD)
            dist.barrier()
            taken[kind].append(time.perf_counter() - start)
            far = sum(n for (_, direction), n in forward.items() if direction.endswith("between_nodes"))
            told[kind] = (torch.tensor([far, forward.total()], dtype=torch.float64), y_TD.detach(), dx_TD)
    rows = []
    for kind in kinds:
        (bytes_2, *got), seconds = told[kind], taken[kind][2:]
        far, total = (sum_over(bytes_2.clone(), mesh.dp) / mesh.dp.size).tolist()
        errors = [(a - b).double().norm() / b.double().norm() for a, b in zip(got, told[BASE][1:], strict=True)]
        ratios = [mine / base for mine, base in zip(seconds, taken[BASE][2:], strict=True)]
        low, high = statistics.quantiles(seconds, n=20, method="inclusive")[::18]
        rows.append(
            {"impl": kind, "T": args.tokens, "D": args.dim, "E": args.experts, "K": args.k, "dtype": args.dtype}
            | {"world": mesh.dp.size, "ranks_per_node": mesh.ranks_per_node, "skew": args.zipf, "rounds": args.rounds}
            | {"bytes_between_nodes": far, "bytes": total, "error": max(errors).item()}
            | {"ms": 1e3 * statistics.median(seconds), "low": 1e3 * low, "high": 1e3 * high}
            | {"of_ragged": statistics.median(ratios), "machine": platform.machine(), "version": torch.__version__}
        )
    meshes.stop()
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    first, cells = rows[0], "{:<8}{:>17}{:>11}{:>11}{:>11}{:>9}{:>9}{:>9}{:>11}{:>10}"
    print(
        "{world} ranks, {ranks_per_node} a node; T{T} D{D} E{E} K{K} {dtype}, zipf {skew}, {rounds} rounds".format(
            **first
        )
    )
    heads = ("MB between nodes", "of ragged", "MB in all", "of ragged", "ms", "low", "high", "of ragged", "error")
    print(cells.format("", *heads))
    for row in rows:
        figures = []
        for key in ("bytes_between_nodes", "bytes"):
            figures += [f"{row[key] / 1e6:.2f}", f"{row[key] / first[key]:.3f}" if first[key] else ""]
        figures += [f"{row[key]:.1f}" for key in ("ms", "low", "high")]
        print(cells.format(row["impl"], *figures, f"{row['of_ragged']:.3f}", f"{row['error']:.1e}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "ranks": 4,
        "ranks-per-node": 2,
        "tokens": 4096,
        "dim": 512,
        "experts": 256,
        "k": 4,
        "rounds": 15,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--zipf", type=float, default=0.6, help="0: all experts alike")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures there")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: at least 2, for an interval")
    launched = "RANK" in os.environ
    rows = (
        ranks(args, None) if launched else run_distributed(ranks, args.ranks, args, args.ranks_per_node, timeout=600)[0]
    )
    if os.environ.get("RANK", "0") == "0":
        show(rows)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
