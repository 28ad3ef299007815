"""Measures bytes and seconds of one layer's dispatch and combine, for each kind of dispatcher.

    .venv/bin/python benchmarks/exchange.py             4 ranks here, grouped as 2 nodes of 2
    .venv/bin/python benchmarks/exchange.py --ranks 2   2 ranks of one node
    sudo benchmarks/two_nodes.sh 1gbit 2 benchmarks/exchange.py
                                                        2 network namespaces, a 1 Gbit/s link
    torchrun ... benchmarks/exchange.py --json FILE     any ranks
    sudo benchmarks/two_nodes.sh 1gbit 1 benchmarks/exchange.py --hidden 1024 --experts 32 \
        --zipf 0 --kinds all_to_all pieces1 pieces2 pieces4
                                                        how much of the transfer experts hide

Each rank runs forward and backward of 4,096 tokens, each with 4 of 256 experts drawn by Zipf's law.
Experts only multiply rows by their weights, or have `--hidden` units. Kinds:

- `all_to_all`: a row for each assignment, without overlap. All other kinds are compared with it.
- `dedup_rank`, `dedup_node`: a row once for each rank, or once for each node.
- `dedup_rank+`, `dedup_node+`: the same, with delayed weight gradients.
- `pieces2`: `all_to_all` in 2 chunks; weight gradients run while the last chunk travels.
- `bf16`: `all_to_all` with rows in bf16 on the wire.
- `experts`: the same computation without a transfer.

All kinds take turns in random order: a round is one of each, timed between barriers. Bytes are those
of the forward pass that a rank sends to other ranks (rows in both directions, ids, weights; mean over
ranks). Prints medians with 90 % intervals, and medians of the rounds' ratios to `all_to_all`.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import machine

from moe_dist.config.schema import MeshConfig
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.collectives import all_reduce_sum
from moe_dist.distributed.spawn import run_distributed
from moe_dist.engine.dispatcher_choice import build_dispatcher
from moe_dist.moe.experts import Experts
from moe_dist.moe.permutation import TokenPermutation
from moe_dist.moe.routing import Routing, build_routing

BASE = "all_to_all"


class Weigh(torch.nn.Module):
    """Without experts: rows times their weights."""

    needs_context = False

    def forward(self, x_TD: torch.Tensor, routing: Routing, ctx: Any) -> Any:
        copies = TokenPermutation(routing.token_N, len(x_TD))
        return copies.unpermute(copies.permute(x_TD) * routing.gate_N.to(x_TD.dtype)[:, None]), None


class Compute:
    """As many rows for each of this rank's experts as the exchange brings on average, and nothing
    travels.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, x_TD: torch.Tensor, routing: Routing, experts: Any, ctx: Any) -> Any:
        count_e = routing.count_E.view(self.size, -1).sum(0)
        return experts(x_TD, Routing(routing.token_N, routing.gate_N, count_e), ctx)


def configured(kind: str) -> MeshConfig:
    if kind.startswith("pieces"):
        return MeshConfig(dispatcher=BASE, overlap_chunks=int(kind.removeprefix("pieces")))
    if kind == "bf16":
        return MeshConfig(dispatcher=BASE, overlap_chunks=0, comm_dtype="bf16")
    return MeshConfig(dispatcher=kind.removesuffix("+"), overlap_chunks=int(kind.endswith("+")))


def routed(args: argparse.Namespace, rank: int) -> Routing:
    """Of this rank's tokens: each draws different experts by their popularity 1 / place ** zipf."""
    everywhere, here = (torch.Generator().manual_seed(seed) for seed in (0, 1 + rank))
    place_E = 1 + torch.randperm(args.experts, generator=everywhere)
    uniform_TE = torch.rand(args.tokens, args.experts, generator=here)
    score_TE = (
        -args.zipf * place_E.log() - (-uniform_TE.log()).log()
    )  # Gumbel: the top k are such a draw
    top = score_TE.topk(args.k, 1)
    return build_routing(
        top.indices,
        top.values.softmax(1),
        torch.ones_like(top.indices, dtype=torch.bool),
        args.experts,
    )


def ranks(args: argparse.Namespace, per_node: int | None) -> list[dict[str, Any]]:
    if per_node:
        os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    meshes.init_process_group()
    mesh = meshes.build_mesh(dist.get_world_size())
    kinds = [
        kind
        for kind in args.kinds or [BASE, "dedup_rank", "dedup_node"]
        if kind != "dedup_node" or mesh.intra_node or args.kinds
    ]
    exchanges = {
        kind: build_dispatcher(mesh, configured(kind), args.experts, args.k)
        for kind in kinds
        if kind != "experts"
    }
    exchanges["experts"] = Compute(mesh.ep.size)
    routing, dtype = routed(args, mesh.dp.index), getattr(torch, args.dtype)
    ctx: Any = argparse.Namespace(layer_call=0)  # the dispatchers read nothing else of a context
    x_TD = torch.randn(args.tokens, args.dim).to(dtype).requires_grad_()
    dy_TD = torch.randn(args.tokens, args.dim).to(dtype)
    experts: torch.nn.Module = Weigh()
    if args.hidden:
        experts = Experts(args.experts // mesh.ep.size, args.dim, args.hidden).to(dtype)
        for p in experts.parameters():
            torch.nn.init.uniform_(p, -(args.dim**-0.5), args.dim**-0.5)
    leaves = [x_TD, *experts.parameters()]
    order, taken, told = random.Random(0), {kind: [] for kind in kinds}, {}
    for _ in range(args.rounds + 2):
        for kind in order.sample(kinds, len(kinds)):
            dist.barrier()
            start, sent = time.perf_counter(), mesh.bytes_sent
            y_TD, _ = exchanges[kind](x_TD, routing, experts, ctx)
            forward = Counter({key: n - sent[key] for key, n in mesh.bytes_sent.items()})
            gradients = torch.autograd.grad(y_TD, leaves, dy_TD)
            dist.barrier()
            taken[kind].append(time.perf_counter() - start)
            far = sum(num_bytes for key, num_bytes in forward.items() if key.inter_node)
            told[kind] = (
                torch.tensor([far, forward.total()], dtype=torch.float64),
                y_TD.detach(),
                *gradients,
            )
    rows = []
    for kind in kinds:
        (bytes_2, *got), seconds = told[kind], taken[kind][2:]
        far, total = (all_reduce_sum(bytes_2.clone(), mesh.dp) / mesh.dp.size).tolist()
        errors = [
            (a - b).double().norm() / b.double().norm()
            for a, b in zip(got, told[BASE][1:], strict=True)
        ]
        ratios = [mine / base for mine, base in zip(seconds, taken[BASE][2:], strict=True)]
        low, high = statistics.quantiles(seconds, n=20, method="inclusive")[::18]
        rows.append(
            {
                "impl": kind,
                "T": args.tokens,
                "D": args.dim,
                "H": args.hidden,
                "E": args.experts,
                "K": args.k,
                "dtype": args.dtype,
            }
            | {
                "world": mesh.dp.size,
                "ranks_per_node": mesh.ranks_per_node,
                "skew": args.zipf,
                "rounds": args.rounds,
            }
            | {"bytes_between_nodes": far, "bytes": total, "error": max(errors).item()}
            | {"ms": 1e3 * statistics.median(seconds), "low": 1e3 * low, "high": 1e3 * high}
            | {"of_all_to_all": statistics.median(ratios), "version": torch.__version__}
            | machine()
        )
    meshes.shutdown()
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    first, cells = rows[0], "{:<8}{:>17}{:>11}{:>11}{:>11}{:>9}{:>9}{:>9}{:>11}{:>10}"
    print(
        "{world} ranks, {ranks_per_node} a node; T{T} D{D} H{H} E{E} K{K} {dtype}, zipf {skew}, {rounds} rounds".format(
            **first
        )
    )
    heads = (
        "MB between nodes",
        "of all_to_all",
        "MB in all",
        "of all_to_all",
        "ms",
        "low",
        "high",
        "of all_to_all",
        "error",
    )
    print(cells.format("", *heads))
    for row in rows:
        figures = []
        for key in ("bytes_between_nodes", "bytes"):
            figures += [
                f"{row[key] / 1e6:.2f}",
                f"{row[key] / first[key]:.3f}" if first[key] else "",
            ]
        figures += [f"{row[key]:.1f}" for key in ("ms", "low", "high")]
        print(
            cells.format(
                row["impl"], *figures, f"{row['of_all_to_all']:.3f}", f"{row['error']:.1e}"
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {
        "ranks": 4,
        "ranks-per-node": 2,
        "tokens": 4096,
        "dim": 512,
        "experts": 256,
        "k": 4,
        "hidden": 0,
        "rounds": 15,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--kinds",
        nargs="+",
        metavar="KIND",
        help="all_to_all first; else all_to_all, dedup_rank and dedup_node",
    )
    parser.add_argument("--zipf", type=float, default=0.6, help="0: all experts alike")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures there")
    args = parser.parse_args()
    if args.kinds and args.kinds[0] != BASE:
        parser.error(
            f"--kinds {args.kinds[0]}: first comes {BASE}, which the others are held against"
        )
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: at least 2, for an interval")
    launched = "RANK" in os.environ
    rows = (
        ranks(args, None)
        if launched
        else run_distributed(ranks, args.ranks, args, args.ranks_per_node, timeout=600)[0]
    )
    if os.environ.get("RANK", "0") == "0":
        show(rows)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
