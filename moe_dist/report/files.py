"""Draws runs: PNG pictures of each in RUN/report, and one HTML page of them all.

python -m moe_dist.report RUN                             RUN/report/*.png and RUN/report.html, also while it runs
python -m moe_dist.report RUN RUN ... --html FILE         the runs side by side
"""

import pathlib
import sys
import threading

from moe_dist.config import run_folder
from moe_dist.monitoring.metrics_file import FILE_NAME, read_metrics

PAGE_NAME = "report.html"
_DRAWING = threading.Lock()  # matplotlib is not thread-safe, and wandb's thread draws too


def write_report(run: pathlib.Path, only_loads: bool = False) -> list[pathlib.Path]:
    """Draws the metrics of a run (`only_loads`: the load maps alone) to `run/report`, and returns the files.

    Raises ValueError if the run has no metrics yet, OSError if the pictures cannot be written.
    """
    from moe_dist.report import (
        plots,  # here, for matplotlib takes half a second that a rank that draws nothing can save
    )
    from moe_dist.report.run_summary import name_of

    lines = read_metrics(run)
    if not lines:
        raise ValueError(
            f"metrics file {run / FILE_NAME} is empty: wait until the run has logged a step"
        )
    draw = plots.load_maps if only_loads else plots.all_plots
    paths = []
    with _DRAWING:
        for stem, figure in draw(lines, name_of(run)).items():
            name = f"report/{stem}.png"
            with run_folder.atomic_write(run, name) as file:
                figure.savefig(file, format="png")
            paths.append(run / name)
    return paths


def write_all(run: pathlib.Path) -> list[pathlib.Path]:
    """The pictures of a run and its page, `run/report.html`. Raises as they do."""
    return [*write_report(run), write_page([run], run / PAGE_NAME)]


def try_to_write_all(run: pathlib.Path) -> list[pathlib.Path]:
    """Does as `write_all`, but reports an error (a full disk, a damaged line) as a warning, for the run is whole.

    Returns:
        The files that were written; none after an error.
    """
    try:
        return write_all(run)
    except (
        Exception
    ) as error:  # whatever it is: the next start would train nothing and end here again
        print(
            f"warning: {run / PAGE_NAME} and its pictures cannot be written ({getattr(error, 'strerror', None) or error}); "
            f"python -m moe_dist.report {run} draws them later",
            file=sys.stderr,
            flush=True,
        )
        return []


def write_page(runs: list[pathlib.Path], file: pathlib.Path) -> pathlib.Path:
    """Writes the HTML page of the runs to `file`, whole or not at all, and returns it.

    Raises ValueError if one of them has no metrics yet, OSError if the page cannot be written.
    """
    from moe_dist.report.html import render_html
    from moe_dist.report.run_summary import name_of, read_run

    alike = len({name_of(run) for run in runs}) < len(runs)
    with _DRAWING:
        html = render_html([read_run(run, str(run) if alike else None) for run in runs])
        return run_folder.write(file.parent, file.name, html)
