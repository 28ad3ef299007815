"""Plans a config on a cluster: every legal layout's memory, communication and step time.

    python -m moe_dist.planner moe_131072_h --nodes 16 --gpus-per-node 8 --gpu h100
    python -m moe_dist.planner lstm_moe_demo --gpus-per-node 2 --measure    takes a minute or two

A layout is an expert-parallel degree and a ZeRO stage. For each layout the table lists a rank's
memory by kind, its sent bytes inside the node and between nodes, and the step time by part. The
fastest layout that fits is marked with *. If a layout does not fit, its needed memory is printed;
if none fits, the exit status is 1.

--gpu estimates from fixed fractions of public peaks (FLOPS_EFFICIENCY and BANDWIDTH_EFFICIENCY in
planner/cost_model.py). --measure times short runs of one rank's share on this machine
(planner/microbenchmark.py). With --gpu no tensor is allocated, even for a very large model.
"""

import argparse
import dataclasses
import json
import math
import os
import sys

import torch

from moe_dist.config.arg_parser import Parser, path_argument
from moe_dist.config.messages import shorten
from moe_dist.config.overrides import keys_of
from moe_dist.config.schema import Config
from moe_dist.distributed.launch_env import memory_per_rank
from moe_dist.distributed.spawn import RankFailed
from moe_dist.engine.ds_config import read_ds_config
from moe_dist.monitoring.metric_format import byte_unit, format_bytes
from moe_dist.monitoring.metric_keys import PARTS
from moe_dist.planner.cost_model import GPUS, Link, Machine, RankCost, gpu_machine
from moe_dist.planner.search import LayoutKey, PlannedLayout, legal_layouts, plan_layouts
from moe_dist.tasks.registry import task_of
from moe_dist.training.errors import plain_errors
from moe_dist.training.run_spec import MAX_RANKS, named_config

# processes that can share a CPU core with about the same times as real ranks
MAX_PROCESSES_PER_CORE = 4
MAX_GB = 1e9  # for --nic and --memory
NIC_LATENCY_S = 5e-5  # latency between nodes with --measure
BYTES_PER_GB = 1e9


def main(argv: list[str]) -> int:
    """Runs the command.

    Args:
        argv: Command-line arguments.

    Returns:
        The exit status: 0, or 1 if no layout fits.
    """
    args = _parser().parse_args(argv)
    with plain_errors():
        _check_args(args)
        config, notes = named_config(args.name, args.set)
        _check_config(config, args)
        planned, machine = _plan(config, args)
    if args.json:
        with plain_errors(OSError):
            _write_json(args, planned, machine)
    for note in notes:
        print(f"note: {note}")
    print(format_plan(planned, machine), flush=True)
    if planned[0].fits:
        return 0
    smallest_bytes = min(layout.memory_bytes for layout in planned)
    print(
        f"error: no layout fits: a rank needs at least {format_bytes(smallest_bytes)} of "
        f"{format_bytes(machine.memory)}; use more ranks, a smaller model or a smaller batch",
        file=sys.stderr,
    )
    return 1


def _parser() -> Parser:
    """Returns the command line's parser."""
    parser = Parser("python -m moe_dist.planner", description=__doc__)
    add = parser.add_argument
    add("name", help="a named config; train.py --list shows them")
    add("--nodes", type=int, default=1, metavar="N", help="number of nodes (1)")
    add(
        "--gpus-per-node",
        type=int,
        default=1,
        metavar="G",
        help="ranks on each node, also without GPUs (1)",
    )
    add("--gpu", metavar="NAME", help=f"estimates with the peaks of {', '.join(GPUS)}")
    add("--measure", action="store_true", help="times short runs of a rank's share here")
    add(
        "--nic",
        type=float,
        metavar="GB",
        help="bandwidth of a rank between nodes, in GB per second",
    )
    add(
        "--memory",
        type=float,
        metavar="GB",
        help="memory of a rank, if not that of this machine or of the GPU",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="overrides a field of the config",
    )
    add("--json", type=path_argument, metavar="FILE", help="also writes the plan to a JSON file")
    return parser


def _check_args(args: argparse.Namespace) -> None:
    """Raises ValueError for options out of range or incompatible options."""
    for key, number in (("nodes", args.nodes), ("gpus-per-node", args.gpus_per_node)):
        if not 1 <= number <= MAX_RANKS:
            raise ValueError(
                f"--{key} {shorten(number)} is out of range; use a number from 1 to {MAX_RANKS}"
            )
    if args.nodes * args.gpus_per_node > MAX_RANKS:
        raise ValueError(
            f"--nodes {args.nodes} x --gpus-per-node {args.gpus_per_node} is too large; "
            f"use at most {MAX_RANKS} ranks"
        )
    if args.measure and args.gpus_per_node > max_local_ranks():
        raise ValueError(
            f"--gpus-per-node {args.gpus_per_node} is too large with --measure, which starts the "
            f"ranks of a node here; use at most {max_local_ranks()}"
        )
    for key, size_gb in (("nic", args.nic), ("memory", args.memory)):
        if size_gb is not None and not 0 < size_gb < MAX_GB:
            raise ValueError(
                f"--{key} {size_gb} is out of range; use a positive number of GB below {MAX_GB:.0f}"
            )
    if bool(args.gpu) == args.measure:
        raise ValueError(f"give one of --gpu ({', '.join(GPUS)}) and --measure")
    if args.gpu and args.gpu not in GPUS:
        raise ValueError(f"--gpu {args.gpu} is unknown; use one of {', '.join(GPUS)}")
    if args.measure and args.nodes > 1 and args.nic is None:
        raise ValueError(
            f"--nodes {args.nodes} --measure cannot measure links between nodes; give --nic"
        )
    if args.json and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: the folder does not exist; create it first")


def _check_config(config: Config, args: argparse.Namespace) -> None:
    """Raises ValueError if the model cannot be built or has no legal layout."""
    read_ds_config(config)
    task_of(config).build_model(config)
    next(legal_layouts(config, args.nodes, args.gpus_per_node))


def _plan(config: Config, args: argparse.Namespace) -> tuple[list[PlannedLayout], Machine]:
    """Returns the planned layouts and the machine: a GPU preset, or this machine as measured."""
    nic_bytes_per_s = None if args.nic is None else args.nic * BYTES_PER_GB
    rank_costs = None
    if args.gpu:
        machine = gpu_machine(args.gpu, nic_bytes_per_s)
    else:
        # imported here because it imports the whole trainer, not needed for --gpu
        from moe_dist.planner.microbenchmark import adopt_data_sizes

        config = adopt_data_sizes(config, keys_of(args.set))
        machine, rank_costs = measure_this_machine(
            config, args.nodes, args.gpus_per_node, nic_bytes_per_s or math.inf
        )
    if args.memory is not None:
        machine = dataclasses.replace(machine, memory=int(args.memory * BYTES_PER_GB))
    planned = plan_layouts(config, args.nodes, args.gpus_per_node, machine, rank_costs)
    return planned, machine


def max_local_ranks() -> int:
    """Returns how many processes this machine can run as ranks."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return MAX_PROCESSES_PER_CORE * (os.cpu_count() or 1)


def measure_this_machine(
    config: Config, nodes: int, ranks_per_node: int, nic_bytes_per_s: float
) -> tuple[Machine, dict[LayoutKey, RankCost]]:
    """Measures this machine as one node.

    Args:
        config: The config, with data-determined sizes.
        nodes: Node count to plan for.
        ranks_per_node: Ranks on each node; as many run here.
        nic_bytes_per_s: A rank's bandwidth between nodes.

    Returns:
        The machine, and one rank's work by expert-parallel degree and ZeRO stage.

    Raises:
        ValueError: The data is not on this machine, or one rank's share cannot be trained here.
    """
    # imported here because it imports the whole trainer, not needed for --gpu
    from moe_dist.planner.microbenchmark import calibrate

    layouts = list(legal_layouts(config, nodes, ranks_per_node))
    between = Link(NIC_LATENCY_S, nic_bytes_per_s)
    try:
        return calibrate(layouts, ranks_per_node, memory_per_rank(ranks_per_node), between)
    except (RankFailed, TimeoutError) as error:  # most likely out of memory
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"{config.name}: training one rank's share failed here ({reason}); use --gpu"
        ) from None


def _write_json(args: argparse.Namespace, planned: list[PlannedLayout], machine: Machine) -> None:
    """Writes the machine and the layouts to the --json file."""
    report = {
        "machine": dataclasses.asdict(machine),
        "layouts": [dataclasses.asdict(layout) for layout in planned],
    }
    args.json.write_text(json.dumps(report, indent=1) + "\n")


# The table


def format_plan(planned: list[PlannedLayout], machine: Machine) -> str:
    """Formats a plan for a terminal: a line per layout, and the best layout's traffic by purpose.

    Args:
        planned: The layouts from `plan_layouts`.
        machine: Their machine.

    Returns:
        The table's lines.
    """
    best = planned[0]
    memory_unit, memory_name = byte_unit(min(1e9, max(layout.memory_bytes for layout in planned)))
    sent_unit, sent_name = byte_unit(max(layout.sent_bytes for layout in planned))
    rows = [_table_head(best)]
    for layout in planned:
        mark = "*" if layout is best and layout.fits else ""
        refusal = ""
        if not layout.fits:
            needed = format_bytes(layout.memory_bytes)
            refusal = f"refused: needs {needed} of {format_bytes(machine.memory)}"
        figures = _table_figures(layout, memory_unit, sent_unit)
        rows.append([mark, str(layout.ep), str(layout.zero_stage), *figures, refusal])
    lines = [
        f"One rank of {machine.name}: memory in {memory_name}, bytes sent per step in {sent_name}, "
        "times in ms; * marks the best layout",
        *_align(rows),
    ]
    if best.fits:
        lines.append(f"best: mesh.ep={best.ep} zero_stage={best.zero_stage}")
        lines += _traffic_lines("inside a node", best.intra_node_bytes)
        lines += _traffic_lines("between nodes", best.inter_node_bytes)
    return "\n".join(lines)


def _table_head(layout: PlannedLayout) -> list[str]:
    """Returns the column names; a memory kind's column is its last word."""
    kinds = [kind.split()[-1] for kind in layout.memory]
    return ["", "ep", "ZeRO", *kinds, "memory", "inside", "between", *PARTS, "step", ""]


def _table_figures(layout: PlannedLayout, memory_unit: float, sent_unit: float) -> list[str]:
    """Returns a layout's numbers in column order."""
    memory = [*layout.memory.values(), layout.memory_bytes]
    sent = [sum(layout.intra_node_bytes.values()), sum(layout.inter_node_bytes.values())]
    seconds = [*(layout.seconds[part] for part in PARTS), layout.step_s]
    return [
        *(_format_number(size / memory_unit) for size in memory),
        *(_format_number(size / sent_unit) for size in sent),
        *(_format_number(1e3 * duration_s) for duration_s in seconds),
    ]


def _align(rows: list[list[str]]) -> list[str]:
    """Returns the rows as lines with aligned columns; the last column stays as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([*cells[:-1], row[-1]]).rstrip())
    return lines


def _traffic_lines(where: str, bytes_by_purpose: dict[str, float]) -> list[str]:
    """Returns a line per purpose with the bytes a rank sends in a step."""
    lines = []
    for purpose, num_bytes in bytes_by_purpose.items():
        label = f"{purpose}, {where}"
        lines.append(f"  {label:<40}{format_bytes(num_bytes):>12}")
    return lines


def _format_number(x: float) -> str:
    """Formats a table's number with two or three significant digits."""
    if x >= 100:
        return f"{x:.0f}"
    return f"{x:.1f}" if x >= 1 or x == 0 else f"{x:.2g}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
