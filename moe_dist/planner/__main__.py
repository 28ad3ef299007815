"""Plans a config on a cluster: memory by kind, bytes by link and seconds by part of every legal layout.

    python -m moe_dist.planner moe_131072_h --nodes 16 --gpus-per-node 8 --gpu h100 --set ds_config=bf16
    python -m moe_dist.planner lstm_moe_demo --gpus-per-node 2 --measure      on this machine, in a minute or two

A layout is an expert-parallel degree and a ZeRO stage. The fastest that fits is marked; one that does not is refused
with the number; where none does the exit status is 1. `--gpu` reckons with public peaks, a stated part of which is
achieved (`machine.ACHIEVED`, `machine.OF_BANDWIDTH`); `--measure` with short runs of a rank's share on this machine
(`rehearsal`). With `--gpu` no tensor is made, whatever the size.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator

import torch

from moe_dist.config.arg_parser import Parser, path_argument
from moe_dist.config.messages import shorten
from moe_dist.config.overrides import keys_of, override
from moe_dist.config.schema import Config, moe_section
from moe_dist.distributed.batch_layout import BatchLayout, make_batch_layout
from moe_dist.distributed.launch_env import memory_per_rank
from moe_dist.distributed.spawn import RankFailed
from moe_dist.engine.ds_config import read_ds_config
from moe_dist.monitoring.metric_keys import PARTS
from moe_dist.planner.cost_model import (
    GPUS,
    Link,
    Machine,
    RankCost,
    gpu_machine,
    rank_cost_on_gpu,
    rank_memory,
    step_seconds,
)
from moe_dist.tasks.registry import task_of
from moe_dist.training.errors import plain_errors
from moe_dist.training.model_stats import dispatcher_of
from moe_dist.training.run_spec import MAX_RANKS, named_config

PROCESSES_PER_CORE = 4  # that take turns on a CPU, still about as ranks would


def most_processes() -> int:
    """That this machine runs as ranks."""
    return (
        torch.cuda.device_count()
        if torch.cuda.is_available()
        else PROCESSES_PER_CORE * (os.cpu_count() or 1)
    )


@dataclasses.dataclass(frozen=True)
class PlannedLayout:
    """A layout: bytes of a rank by kind, seconds of a step by part, bytes that a rank sends in it by what for."""

    ep: int
    zero: int
    memory: dict[str, int]
    seconds: dict[str, float]
    intra_node_bytes: dict[str, float]
    inter_node_bytes: dict[str, float]
    fits: bool

    @property
    def step(self) -> float:
        return sum(self.seconds.values())

    @property
    def bytes(self) -> int:
        return sum(self.memory.values())


def legal_layouts(
    config: Config, nodes: int, per_node: int
) -> Iterator[tuple[Config, BatchLayout]]:
    """Every expert-parallel degree and ZeRO stage that the config and its DeepSpeed file have on the ranks. Raises
    ValueError, of the first that is none, where there is no other."""
    world, found, refused = nodes * per_node, False, None
    for ep in (
        d for d in range(1, world + 1) if world % d == 0 and (d == 1 or moe_section(config))
    ):
        try:
            at = override(config, [f"mesh.ep={ep}"])
            layout = make_batch_layout(at, world)
            dispatcher_of(at, per_node)
        except ValueError as error:
            refused = refused or error
            continue
        for staged in (override(at, [f"zero_stage={stage}"]) for stage in range(4)):
            try:
                read_ds_config(staged)
            except ValueError as error:
                refused = refused or error
                continue
            found = True
            yield staged, layout
    if not found:
        assert refused
        raise refused


def plan_layouts(
    config: Config,
    nodes: int,
    per_node: int,
    machine: Machine,
    owns: dict[tuple[int, int], RankCost] | None = None,
) -> list[PlannedLayout]:
    """Every legal layout, those that fit first, by time. `owns`: what a rank does and holds by itself, by degree and
    stage; None: reckoned of the GPU that `machine` names. Raises ValueError where none is legal."""
    plain, planned = task_of(config).build_model(config), []
    for at, layout in legal_layouts(config, nodes, per_node):
        ds = read_ds_config(at)
        ep, stage = at.mesh.ep, ds["zero_optimization"]["stage"]
        own = owns[ep, stage] if owns else rank_cost_on_gpu(machine.name, plain, at, layout, ds)
        took, sent = step_seconds(plain, at, layout, per_node, ds, own, machine)
        held = rank_memory(plain, at, layout, ds, own)
        inside, between = (
            {t.name: b for t in sent if (b := getattr(t, link))}
            for link in ("intra_node_bytes", "inter_node_bytes")
        )
        planned.append(
            PlannedLayout(
                ep, stage, held, took, inside, between, sum(held.values()) <= machine.memory
            )
        )
    return sorted(planned, key=lambda p: (not p.fits, p.step))


def format_plan(planned: list[PlannedLayout], machine: Machine) -> str:
    """For a terminal: a line a layout, the best marked; of it, bytes by what is sent."""
    best, kinds = planned[0], list(planned[0].memory)
    heads = [
        "",
        "ep",
        "ZeRO",
        *(_short(kind) for kind in kinds),
        "memory",
        "inside",
        "between",
        *PARTS,
        "step",
        "",
    ]
    size, name = _unit(min(1e9, max(each.bytes for each in planned)))
    sent, sent_name = _unit(
        max(
            sum(each.intra_node_bytes.values()) + sum(each.inter_node_bytes.values())
            for each in planned
        )
    )
    rows = [heads]
    for each in planned:
        refused = (
            "" if each.fits else f"refused: needs {_bytes(each.bytes)} of {_bytes(machine.memory)}"
        )
        rows += [
            ["*" if each is best and each.fits else "", str(each.ep), str(each.zero)]
            + [
                _number(number / size)
                for number in (*(each.memory[kind] for kind in kinds), each.bytes)
            ]
            + [
                _number(sum(link.values()) / sent)
                for link in (each.intra_node_bytes, each.inter_node_bytes)
            ]
            + [
                _number(1e3 * number)
                for number in (*(each.seconds[part] for part in PARTS), each.step)
            ]
            + [refused]
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"A rank of {machine.name}: memory in {name}, bytes sent in a step in {sent_name}, time in ms; * is the best"
    ]
    lines += [
        "  ".join(
            [*(x.rjust(width) for x, width in zip(row[:-1], widths[:-1], strict=True)), row[-1]]
        ).rstrip()
        for row in rows
    ]
    if best.fits:
        lines += [f"best: mesh.ep={best.ep} zero_stage={best.zero}"]
        for where, link in (
            ("inside a node", best.intra_node_bytes),
            ("between nodes", best.inter_node_bytes),
        ):
            lines += [
                f"  {what + ', ' + where:<40}{_bytes(number):>12}" for what, number in link.items()
            ]
    return "\n".join(lines)


def _short(kind: str) -> str:
    """Of a column: its last word."""
    return kind.split()[-1]


def _number(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 1 or x == 0 else f"{x:.2g}"


def _unit(number: float) -> tuple[float, str]:
    return next(
        (u for u in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if number >= u[0]),
        (1.0, "B"),
    )


def _bytes(number: float) -> str:
    size, name = _unit(number)
    return f"{number / size:.1f} {name}"


def measure_this_machine(
    config: Config, nodes: int, per_node: int, nic: float
) -> tuple[Machine, dict[tuple[int, int], RankCost]]:
    """This machine, of which a node has `per_node` ranks, and a rank's own work by degree and stage. `nic`: bytes a
    second between nodes. Raises ValueError for data that is not here, or a model of which no share fits."""
    from moe_dist.planner.microbenchmark import calibrate  # which trains

    try:
        return calibrate(
            list(legal_layouts(config, nodes, per_node)),
            per_node,
            memory_per_rank(per_node),
            Link(5e-5, nic),
        )
    except (RankFailed, TimeoutError) as error:  # of memory, most likely
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"{config.name}: a rank's share of it could not be trained here ({reason}); use --gpu"
        ) from None


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("name", help="a named config; train.py --list shows them")
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument(
        "--gpus-per-node", type=int, default=1, metavar="G", help="ranks of a node, on CPU too"
    )
    parser.add_argument("--gpu", metavar="NAME", help=f"reckon with the peaks of {', '.join(GPUS)}")
    parser.add_argument(
        "--measure", action="store_true", help="reckon with short runs of a rank's share here"
    )
    parser.add_argument(
        "--nic", type=float, metavar="GB", help="GB a second of a rank between nodes"
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="of a rank, in place of what machine or preset has",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="overrides a field of the config",
    )
    parser.add_argument(
        "--json", type=path_argument, metavar="FILE", help="writes all of it there, too"
    )
    args = parser.parse_args(argv)
    with plain_errors():
        for key, number in (("nodes", args.nodes), ("gpus-per-node", args.gpus_per_node)):
            if not 1 <= number <= MAX_RANKS:
                raise ValueError(f"--{key} {shorten(number)}: from 1 to {MAX_RANKS}")
        if args.nodes * args.gpus_per_node > MAX_RANKS:
            raise ValueError(
                f"--nodes {args.nodes} x --gpus-per-node {args.gpus_per_node}: {MAX_RANKS} ranks at most"
            )
        if args.measure and args.gpus_per_node > (most := most_processes()):
            raise ValueError(
                f"--measure starts the ranks of a node, --gpus-per-node {args.gpus_per_node}: {most} at most here"
            )
        for key, size in (("nic", args.nic), ("memory", args.memory)):
            if size is not None and not 0 < size < 1e9:
                raise ValueError(f"--{key} {size}: a positive number of GB")
        if bool(args.gpu) == args.measure:
            raise ValueError(f"give one of --gpu ({', '.join(GPUS)}) and --measure")
        if args.gpu and args.gpu not in GPUS:
            raise ValueError(f"--gpu {args.gpu}: one of {', '.join(GPUS)}")
        if args.measure and args.nodes > 1 and args.nic is None:
            raise ValueError(
                f"--nodes {args.nodes} --measure: links between nodes cannot be measured here; give --nic"
            )
        if args.json and not args.json.absolute().parent.is_dir():
            raise ValueError(f"--json {args.json}: no such folder")
        config, notes = named_config(args.name, args.set)
        read_ds_config(config)
        task_of(config).build_model(config)
        next(legal_layouts(config, args.nodes, args.gpus_per_node))
        nic = None if args.nic is None else args.nic * 1e9
        if args.gpu:
            machine, owns = gpu_machine(args.gpu, nic), None
        else:
            from moe_dist.planner.microbenchmark import adopt_data_sizes  # which trains

            config = adopt_data_sizes(config, keys_of(args.set))
            machine, owns = measure_this_machine(
                config, args.nodes, args.gpus_per_node, nic or math.inf
            )
        if args.memory is not None:
            machine = dataclasses.replace(machine, memory=int(args.memory * 1e9))
        planned = plan_layouts(config, args.nodes, args.gpus_per_node, machine, owns)
    if args.json:
        told = {
            "machine": dataclasses.asdict(machine),
            "layouts": [dataclasses.asdict(each) for each in planned],
        }
        with plain_errors(OSError):
            args.json.write_text(json.dumps(told, indent=1) + "\n")
    for note in notes:
        print(f"note: {note}")
    print(format_plan(planned, machine), flush=True)
    if not planned[0].fits:
        least = min(each.bytes for each in planned)
        print(
            f"error: no layout fits: {_bytes(least)} at least of {_bytes(machine.memory)} a rank",
            file=sys.stderr,
        )
    return 0 if planned[0].fits else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
