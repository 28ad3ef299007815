"""The command line of train.py. It imports no torch, so that --help and errors are fast."""

import argparse
import sys

from moe_dist.config import papers
from moe_dist.config.arg_parser import Parser, path_argument
from moe_dist.config.overrides import dotted_keys
from moe_dist.config.schema import Config
from moe_dist.monitoring.console import print_on_main


def parse_args(argv: list[str], doc: str | None) -> argparse.Namespace:
    """Returns the arguments. Prints and exits for --help, --list and a wrong argument."""
    parser = Parser(description=doc)
    parser.add_argument("name", nargs="?", help="a named config; --list shows them")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="overrides a field of the config",
    )
    parser.add_argument(
        "--folder",
        type=path_argument,
        metavar="PATH",
        help="run folder of a new run (default: runs/NAME-TIME)",
    )
    parser.add_argument(
        "--resume",
        type=path_argument,
        metavar="RUN|auto",
        help="continues from the newest checkpoint of a run; auto "
        "(with NAME and --folder): continues that folder's run, or begins one there",
    )
    parser.add_argument(
        "--grow",
        type=int,
        metavar="N",
        help="with --resume: N experts for each, in a new run folder",
    )
    parser.add_argument(
        "--grow-noise",
        type=float,
        metavar="X",
        help="largest change of a copied weight (0.01 of it)",
    )
    parser.add_argument(
        "--evaluate",
        type=path_argument,
        metavar="RUN",
        help="test metrics of the newest checkpoint",
    )
    parser.add_argument(
        "--allow-changed-data",
        action="store_true",
        help="goes on, or evaluates, where the data is another than before",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="traces a few steps with torch's profiler: RUN/profile/",
    )
    parser.add_argument("--list", action="store_true", help="lists the named configs")
    parser.add_argument("--dry-run", action="store_true", help="prints the layout and ends")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="with --dry-run: as if started on N ranks"
    )
    parser.add_argument(
        "--nodes",
        type=int,
        metavar="N",
        help="with --ranks: as if they were on N nodes, not on one",
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: one JSON object")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_field_meant(unknown)}")
    if args.list:
        for name, make in sorted(papers.CONFIGS.items()):
            print_on_main(f"{name:<26}{(make.__doc__ or '').splitlines()[0]}")
        sys.exit(0)
    return args


def _field_meant(unknown: list[str]) -> str:
    """Returns a hint if the first argument names a config field, with its value or before it."""
    key, equals, value = unknown[0].lstrip("-").partition("=")
    if key not in dotted_keys(Config(name="")):
        return ""
    return f"; did you mean --set {key}={value if equals else (unknown[1:] or ['...'])[0]}?"
