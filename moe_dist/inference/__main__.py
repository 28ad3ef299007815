"""Uses a trained run.

    python -m moe_dist.inference generate RUN ...    continues a text, lists experts of its words
    python -m moe_dist.inference classify RUN ...    classifies images and sentences

`--help` after either command lists its options.
"""

import sys

from moe_dist.config.arg_parser import Parser


def main(argv: list[str]) -> None:
    """Runs the command in the first argument with the other arguments."""
    parser = Parser("python -m moe_dist.inference", description=__doc__)
    parser.add_argument("command", choices=("generate", "classify"), help="the use of the run")
    command = parser.parse_args(argv[:1]).command
    # imported here because --help does not need torch
    if command == "generate":
        from moe_dist.inference import generate

        generate.main(argv[1:])
    else:
        from moe_dist.inference import classify

        classify.main(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
