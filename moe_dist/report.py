"""Draws a run as PNG pictures in RUN/report: `python -m moe_dist.report RUN`."""

import argparse
import pathlib
import sys

from moe_dist.metrics import FILE_NAME, read_metrics


def write_report(run: pathlib.Path, only_loads: bool = False) -> list[pathlib.Path]:
    """Draws the metrics of a run (`only_loads`: the load maps alone) to `run/report`, and returns the files.

    Raises ValueError if the run has no metrics yet, OSError if the pictures cannot be written.
    """
    from moe_dist import pictures  # here, for matplotlib takes half a second that a rank that draws nothing can save

    lines = read_metrics(run)
    if not lines:
        raise ValueError(f"metrics file {run / FILE_NAME} is empty: wait until the run has logged a step")
    draw = pictures.load_maps if only_loads else pictures.all_pictures
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    paths = []
    for stem, figure in draw(lines, run.resolve().name).items():
        paths.append(folder / f"{stem}.png")
        figure.savefig(paths[-1])
    return paths


def main() -> None:
    """Runs the command line; what is wrong with the run is one line on stderr and exit status 1."""
    parser = argparse.ArgumentParser(description="Draw the curves of a run as PNG pictures in RUN/report.")
    parser.add_argument("run", metavar="RUN", type=pathlib.Path, help="folder of the run")
    try:
        for path in write_report(parser.parse_args().run):
            print(path)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
