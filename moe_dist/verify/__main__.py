"""A certificate that the layout is not part of the result: trains a few steps of a config on every layout asked for.

    python -m moe_dist.verify lstm_moe_demo                                one rank against 1, 2, 4 at every ep and ZeRO
    python -m moe_dist.verify lstm_wide_demo --set model.dim=64 --worlds 2 --zero 0 3 --json FILE

One rank at ZeRO 0 is the reference. Of every other layout it prints the largest relative deviation, of any rank, of the
loss and the gradient norm of any step and of any weight tensor after the last, ||difference|| / ||reference||, and
exits with 1 where one is above --tolerance.

Two scores that differ by rounding may be ranked either way, and a word then visits another expert; a hidden unit whose
input is zero to rounding may be on or off, and its gradient is then whole or none: that is chance, not a fault. So the
reference's ranking and the signs of its hidden units are recorded, and a layout that would choose otherwise goes on
with the recorded ones. Such flips and signs are counted, and the widest gap among them is printed: the distance of two
scores over their size, of a unit's input from zero over the largest of its row. A gap above 1e-5 is no rounding, and a
failure. --free lets every layout choose for itself.

To be worth its name a run must be live, and the figures that say so are printed: how much of the routing of the first
step's words the training changed, in how many steps the norm was clipped, noise and dropout, and in how many steps a
rank had nothing but padding and sent no row (half of the samples are made padding in one step for each accumulation).
"""

import itertools
import json
import math
import sys

import torch

from moe_dist.config.arg_parser import Parser, path_argument
from moe_dist.config.messages import shorten
from moe_dist.config.overrides import keys_of
from moe_dist.config.schema import moe_section
from moe_dist.config.validate import MAX_STEPS
from moe_dist.distributed import batch_layout
from moe_dist.engine.ds_config import read_ds_config
from moe_dist.tasks.registry import task_of
from moe_dist.training.errors import plain_errors
from moe_dist.training.run_spec import named_config
from moe_dist.verify.certificate import (
    ACCUMULATIONS,
    MAX_PROCESSES,
    MAX_ROUNDING_GAP,
    MIN_ROUTING_CHANGE,
    REFERENCE,
    TABLE_HEADER,
    ParallelConfig,
    legal_layouts,
    verify,
)


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("name", help="a named config (train.py --list)")
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
        help="micro-batches a step (1 2)",
    )
    add("--steps", type=int, default=20, help="optimizer steps (20)")
    add(
        "--tolerance",
        type=float,
        default=1e-5,
        help="largest relative deviation that is rounding (1e-5)",
    )
    add("--free", action="store_true", help="no replay: every layout chooses for itself")
    add("--json", type=path_argument, metavar="FILE", help="writes the figures there")
    args = parser.parse_args(argv)
    with plain_errors():
        for key, numbers, most in (
            ("steps", [args.steps], MAX_STEPS),
            ("worlds", args.worlds, MAX_PROCESSES),
            ("accumulation", args.accumulation, MAX_STEPS),
        ):
            if wrong := [number for number in numbers if not 1 <= number <= most]:
                raise ValueError(f"--{key} {shorten(wrong[0])}: from 1 to {most}")
        if not 0 <= args.tolerance < math.inf:
            raise ValueError(f"--tolerance {args.tolerance:g}: a number from 0 on")
        if args.json and not args.json.absolute().parent.is_dir():
            raise ValueError(f"--json {args.json}: {args.json.parent} is no folder")
        config, notes = named_config(args.name, args.set)
        explicit = keys_of(args.set)
        task = task_of(config)
        task.check_data(config, True, explicit)
        task.build_model(config)
        asked = [
            ParallelConfig(world, ep, zero, accumulation)
            for world, zero, accumulation in itertools.product(
                args.worlds, args.zero, args.accumulation
            )
            for ep in range(1, world + 1)
            if world % ep == 0
        ]
        layouts, refused = legal_layouts(
            config, [layout for layout in asked if layout != REFERENCE]
        )
        for layout in layouts:
            read_ds_config(layout.apply_to(config))
        batch_layout.make_batch_layout(REFERENCE.apply_to(config), 1)
        if not layouts:
            raise ValueError(f"no layout to verify: {'; '.join(dict.fromkeys(refused))}")
        if torch.cuda.is_available() and max(args.worlds) > torch.cuda.device_count():
            raise ValueError(
                f"--worlds {max(args.worlds)}: this machine has {torch.cuda.device_count()} GPUs"
            )
    for note in notes:
        print(f"note: {note}")
    print(
        "largest relative deviations from one rank; flips, signs, gap: choices replayed; idle: steps without a row"
    )
    print(f"{TABLE_HEADER}  tensor that is farthest off", flush=True)
    with plain_errors():
        told = verify(config, layouts, args.steps, replay=not args.free, explicit=explicit)
    bad = [
        t
        for t in told["layouts"]
        if not max(t["loss"], t["norm"], t["weights"]) <= args.tolerance
        or t["widest_gap"] > MAX_ROUNDING_GAP
    ]
    for reason in dict.fromkeys(refused):
        print(f"not a layout of this config: {reason}")
    live = told["live"]
    if (moe_section(config) and live["routing changed"] < MIN_ROUTING_CHANGE) or not live[
        "steps clipped"
    ]:
        print(
            "note: a quiet run proves less: more --steps, a higher optim.lr or a lower optim.max_grad_norm would stir it"
        )
    print("the reference: " + ", ".join(f"{name} {value}" for name, value in live.items()))
    print(
        f"{len(told['layouts']) - len(bad)} of {len(told['layouts'])} layouts within {args.tolerance:g} of one rank"
    )
    if args.json:
        args.json.write_text(json.dumps(told, indent=2) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
