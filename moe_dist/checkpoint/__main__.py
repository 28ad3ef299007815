"""What is in a checkpoint, and its weights in one file.

    python -m moe_dist.checkpoint inspect RUN                      what is in the newest one
    python -m moe_dist.checkpoint export RUN model.safetensors     its weights, for use elsewhere

A checkpoint that is torn or altered is refused, by the name of the file, and the newest whole one is named.
"""

import json
import math
import sys
from typing import Any

from moe_dist.config.arg_parser import Parser, path_argument
from moe_dist.config.messages import one_line


def _table(told: dict[str, Any]) -> str:
    """What `inspect` tells, for people."""
    lines = [f"{told['checkpoint']}: whole, step {told['step']}, {told['updates']} updates"]
    lines += [f"  {'weights':<42} {'kind':<8} {'shape':<22} {'numbers':>15} {'optimizer':>15}"]
    for name, each in told["weights"].items():
        shape, state = (
            " x ".join(map(str, each["shape"])),
            sum(math.prod(s) for s in each["optimizer"].values()),
        )
        lines += [
            f"  {name:<42} {each['kind']:<8} {shape:<22} {math.prod(each['shape']):>15,} {state:>15,}"
        ]
    lines += [
        f"  {name:<42} {'task':<8} {' x '.join(map(str, each['shape']))}"
        for name, each in told["task"].items()
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = Parser("python -m moe_dist.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("inspect", "export"):
        commands.add_parser(name).add_argument(
            "path", type=path_argument, help="a run folder, or one of its checkpoints"
        )
    commands.choices["inspect"].add_argument("--json", action="store_true", help="one JSON object")
    commands.choices["export"].add_argument(
        "file", type=path_argument, help="the safetensors file to be written"
    )
    args = parser.parse_args(argv)
    from moe_dist.checkpoint import (
        manifest,
    )  # here, for they import torch, which --help does not need
    from moe_dist.checkpoint.sealed_config import read_config
    from moe_dist.checkpoint.single_process import export, inspect

    try:
        in_run = (args.path / "checkpoints").is_dir()
        checkpoint = manifest.require_checkpoints(args.path)[-1] if in_run else args.path
        if not (checkpoint / manifest.NAME).is_file() and not any(checkpoint.glob("*.safetensors")):
            raise ValueError(f"{checkpoint}: neither a run folder nor a checkpoint")
        if args.command == "inspect":
            told = inspect(checkpoint)
            print(json.dumps(told) if args.json else _table(told))
        else:
            if in_run:
                _, note = read_config(args.path)
                print(f"note: {note}\n" if note else "", end="", file=sys.stderr)
            print(f"{checkpoint} -> {args.file}: {export(checkpoint, args.file):,} parameters")
    except (ValueError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
