"""Draws runs: PNG plots of each run in RUN/report, and one HTML page of all runs.

python -m moe_dist.report RUN                      RUN/report/*.png and RUN/report.html, also while
                                                   the run is training
python -m moe_dist.report RUN RUN ... --html FILE  one page that compares the runs
"""

import sys

from moe_dist.config.arg_parser import Parser, path_argument
from moe_dist.report.files import PAGE_NAME, write_all, write_page


def main() -> None:
    """Runs the command line. A run that cannot be drawn is one line on stderr and exit status 2."""
    parser = Parser("python -m moe_dist.report", description=__doc__)
    parser.add_argument(
        "runs", metavar="RUN", type=path_argument, nargs="+", help="folder of a run"
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        type=path_argument,
        help=f"file of the page (default for a single run: RUN/{PAGE_NAME})",
    )
    args = parser.parse_args()
    try:
        if len(args.runs) > 1 and args.html is None:
            raise ValueError(f"{len(args.runs)} runs need a file for their page: add --html FILE")
        files = [write_page(args.runs, args.html)] if args.html else write_all(args.runs[0])
        for file in files:
            print(file)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
