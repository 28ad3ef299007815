"""Shows a checkpoint's content, or exports its weights to one file.

    python -m moe_dist.checkpoint inspect RUN                     content of the newest checkpoint
    python -m moe_dist.checkpoint export RUN model.safetensors    its weights, for use elsewhere

For a damaged checkpoint, the error contains the damaged file and the newest complete checkpoint.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from moe_dist.config.arg_parser import Parser, path_argument
from moe_dist.config.messages import one_line


def _format_shape(shape: tuple[int, ...]) -> str:
    """Returns a shape such as "8 x 16"."""
    return " x ".join(map(str, shape))


def _format_summary(summary: dict[str, Any]) -> str:
    """Formats the result of `single_process.inspect` as a table."""
    lines = [
        f"{summary['checkpoint']}: complete, step {summary['step']}, {summary['updates']} updates",
        f"  {'weights':<42} {'kind':<8} {'shape':<22} {'numbers':>15} {'optimizer':>15}",
    ]
    for name, weight in summary["weights"].items():
        shape = _format_shape(weight["shape"])
        num_weights = math.prod(weight["shape"])
        num_state = sum(math.prod(state) for state in weight["optimizer"].values())
        lines.append(
            f"  {name:<42} {weight['kind']:<8} {shape:<22} {num_weights:>15,} {num_state:>15,}"
        )
    for name, tensor in summary["task"].items():
        lines.append(f"  {name:<42} {'task':<8} {_format_shape(tensor['shape'])}")
    return "\n".join(lines)


def _parse_args(argv: list[str]) -> argparse.Namespace:
    """Parses the command line; errors end the process with status 2."""
    parser = Parser("python -m moe_dist.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("inspect", "export"):
        commands.add_parser(name).add_argument(
            "path", type=path_argument, help="a run folder, or one of its checkpoints"
        )
    commands.choices["inspect"].add_argument(
        "--json", action="store_true", help="print one JSON object"
    )
    commands.choices["export"].add_argument(
        "file", type=path_argument, help="the safetensors file to write"
    )
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> None:
    """Runs a command; raises ValueError or OSError if it fails."""
    # imported in the call: --help does not need torch
    from moe_dist.checkpoint import manifest
    from moe_dist.checkpoint.sealed_config import read_config
    from moe_dist.checkpoint.single_process import export, inspect

    path: Path = args.path
    is_run = (path / "checkpoints").is_dir()
    checkpoint = manifest.require_checkpoints(path)[-1] if is_run else path
    if not (checkpoint / manifest.NAME).is_file() and not any(checkpoint.glob("*.safetensors")):
        raise ValueError(f"{checkpoint}: neither a run folder nor a checkpoint")
    if args.command == "inspect":
        summary = inspect(checkpoint)
        print(json.dumps(summary) if args.json else _format_summary(summary))
        return
    if is_run:
        _, note = read_config(path)
        if note:
            print(f"note: {note}", file=sys.stderr)
    print(f"{checkpoint} -> {args.file}: {export(checkpoint, args.file):,} parameters")


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit status."""
    args = _parse_args(argv)
    try:
        _run(args)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
