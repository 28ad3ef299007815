"""Certifies that the layout does not change the result: trains a config on many layouts.

    python -m moe_dist.verify lstm_moe_demo                  1, 2 and 4 ranks at every ep and ZeRO
    python -m moe_dist.verify lstm_wide_demo --set model.dim=64 --worlds 2 --zero 0 3 --json FILE

The reference is one rank at ZeRO 0. For every other layout a line shows its largest relative
deviation over all ranks: in any step's loss and gradient norm, and in any weight tensor after the
last step (||difference|| / ||reference||). The exit status is 1 if a deviation is above
--tolerance.

Rounding decides some choices: two scores, equal up to rounding, can be ranked either way, and a
word then visits another expert; a hidden unit with an input of zero, up to rounding, can be on or
off. These are coincidences, not faults. So the reference's rankings and signs are recorded, and
every layout replays them. A layout's differing choices are counted (flips, signs), and their widest
gap is shown: the distance between two scores relative to the largest score, or between a unit's
input and zero relative to the largest input in its row. A gap above 1e-5 is more than rounding, and
a failure. With --free every layout uses its own choices.

A comparison is evidence only if training changes something. So the reference's figures are printed:
how much of the first step's routing the training changed, the number of steps with a clipped norm,
noise, dropout and drops. The column idle counts steps in which a rank had only padding and sent no
row: half the samples are padding in one step for each number in --accumulation.
"""

import argparse
import itertools
import json
import math
import sys

import torch

from moe_dist.config.arg_parser import Parser, path_argument
from moe_dist.config.messages import shorten
from moe_dist.config.overrides import keys_of
from moe_dist.config.schema import Config, moe_section
from moe_dist.config.validate import MAX_STEPS
from moe_dist.distributed import batch_layout
from moe_dist.engine.ds_config import read_ds_config
from moe_dist.tasks.registry import task_of
from moe_dist.training.errors import plain_errors
from moe_dist.training.run_spec import named_config
from moe_dist.verify.certificate import (
    ACCUMULATIONS,
    MAX_PROCESSES,
    MIN_ROUTING_CHANGE,
    REFERENCE,
    TABLE_HEADER,
    Certificate,
    ParallelConfig,
    ReferenceActivity,
    legal_layouts,
    verify,
)


def main(argv: list[str]) -> int:
    """Runs the command.

    Args:
        argv: Command-line arguments.

    Returns:
        The exit status: 0, or 1 if a layout deviates from the reference.
    """
    args = _parser().parse_args(argv)
    with plain_errors():
        _check_args(args)
        config, notes = named_config(args.name, args.set)
        explicit = keys_of(args.set)
        _check_config(config, explicit)
        layouts, illegal = _choose_layouts(config, args)
    for note in notes:
        print(f"note: {note}")
    print(
        "largest relative deviations from one rank; flips, signs, gap: choices replayed; "
        "idle: steps without a row"
    )
    print(f"{TABLE_HEADER}  tensor with the largest deviation", flush=True)
    with plain_errors():
        certificate = verify(config, layouts, args.steps, replay=not args.free, explicit=explicit)
    num_within = _print_result(config, certificate, illegal, args.tolerance)
    if args.json:
        args.json.write_text(json.dumps(certificate.to_json(), indent=2) + "\n")
    return 0 if num_within == len(certificate.layouts) else 1


def _parser() -> Parser:
    """Returns the command line's parser."""
    parser = Parser("python -m moe_dist.verify", description=__doc__)
    add = parser.add_argument
    add("name", help="a named config; train.py --list shows them")
    add(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="overrides a field of the config",
    )
    add(
        "--worlds",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        help="numbers of ranks, all on this machine (1 2 4)",
    )
    add("--zero", type=int, nargs="+", default=[0, 1, 2, 3], help="ZeRO stages (0 1 2 3)")
    add(
        "--accumulation",
        type=int,
        nargs="+",
        default=list(ACCUMULATIONS),
        help="micro-batches per step (1 2)",
    )
    add("--steps", type=int, default=20, help="optimizer steps (20)")
    add(
        "--tolerance",
        type=float,
        default=1e-5,
        help="largest relative deviation that counts as rounding (1e-5)",
    )
    add("--free", action="store_true", help="no replay: every layout uses its own choices")
    add("--json", type=path_argument, metavar="FILE", help="also writes the figures to a file")
    return parser


def _check_args(args: argparse.Namespace) -> None:
    """Raises ValueError for options out of range."""
    for key, numbers, largest in (
        ("steps", [args.steps], MAX_STEPS),
        ("worlds", args.worlds, MAX_PROCESSES),
        ("accumulation", args.accumulation, MAX_STEPS),
    ):
        for number in numbers:
            if not 1 <= number <= largest:
                raise ValueError(
                    f"--{key} {shorten(number)} is out of range; use a number from 1 to {largest}"
                )
    if not 0 <= args.tolerance < math.inf:
        raise ValueError(
            f"--tolerance {args.tolerance:g} is out of range; use a finite number from 0 on"
        )
    if args.json and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: {args.json.parent} is not a folder; create it first")


def _check_config(config: Config, explicit: frozenset[str]) -> None:
    """Raises ValueError if the data is not on this machine or the model cannot be built."""
    task = task_of(config)
    task.check_data(config, True, explicit)
    task.build_model(config)


def _choose_layouts(
    config: Config, args: argparse.Namespace
) -> tuple[list[ParallelConfig], list[str]]:
    """Combines the options into layouts; returns the legal ones, and reasons against the others.

    Raises ValueError if no layout is legal, or if this machine has too few GPUs.
    """
    candidates = []
    for world, zero_stage, accumulation in itertools.product(
        args.worlds, args.zero, args.accumulation
    ):
        for ep in range(1, world + 1):
            layout = ParallelConfig(world, ep, zero_stage, accumulation)
            if world % ep == 0 and layout != REFERENCE:
                candidates.append(layout)
    layouts, illegal = legal_layouts(config, candidates)
    for layout in layouts:
        read_ds_config(layout.apply_to(config))
    batch_layout.make_batch_layout(REFERENCE.apply_to(config), 1)
    if not layouts:
        raise ValueError(f"no layout to verify: {'; '.join(dict.fromkeys(illegal))}")
    if torch.cuda.is_available() and max(args.worlds) > torch.cuda.device_count():
        raise ValueError(
            f"--worlds {max(args.worlds)} is too large; "
            f"use at most {torch.cuda.device_count()}, the GPUs of this machine"
        )
    return layouts, illegal


def _print_result(
    config: Config, certificate: Certificate, illegal: list[str], tolerance: float
) -> int:
    """Prints the summary below the table. Returns how many layouts are within the tolerance."""
    for reason in dict.fromkeys(illegal):
        print(f"not a layout of this config: {reason}")
    if not _is_live(config, certificate.reference):
        print(
            "note: this run is too quiet to prove much: use more --steps, a higher optim.lr or a "
            "lower optim.max_grad_norm"
        )
    figures = [f"{name} {value}" for name, value in certificate.reference.by_name().items()]
    print("the reference: " + ", ".join(figures))
    num_within = sum(deviation.is_within(tolerance) for deviation in certificate.layouts)
    print(f"{num_within} of {len(certificate.layouts)} layouts within {tolerance:g} of one rank")
    return num_within


def _is_live(config: Config, reference: ReferenceActivity) -> bool:
    """Returns True if training changed enough of the routing and clipped some norms."""
    routes = moe_section(config) is not None
    if routes and reference.routing_changed < MIN_ROUTING_CHANGE:
        return False
    return reference.steps_clipped > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
