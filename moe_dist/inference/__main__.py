"""A trained run in use.

    python -m moe_dist.inference generate RUN ...    continues a text; shows which experts its words visit
    python -m moe_dist.inference classify RUN ...    classes of images and sentences

`--help` behind either command lists its options.
"""

import sys

from moe_dist.config.arg_parser import Parser


def main(argv: list[str]) -> None:
    """Runs one of the commands with the arguments that follow its name."""
    parser = Parser("python -m moe_dist.inference", description=__doc__)
    parser.add_argument("command", choices=("generate", "classify"), help="what to do with the run")
    command = parser.parse_args(argv[:1]).command
    if command == "generate":
        from moe_dist.inference import (
            generate,
        )  # here, for it imports torch, which --help does not need

        generate.main(argv[1:])
    else:
        from moe_dist.inference import classify

        classify.main(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
