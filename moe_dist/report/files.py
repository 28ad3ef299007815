"""Functions that write the plots and the HTML page of runs."""

import pathlib
import sys
import threading

from moe_dist.config import run_folder
from moe_dist.monitoring.metrics_file import FILE_NAME, read_metrics

PAGE_NAME = "report.html"
_DRAWING = threading.Lock()  # matplotlib is not thread-safe, and wandb's thread also draws


def write_report(run: pathlib.Path, only_loads: bool = False) -> list[pathlib.Path]:
    """Draws a run's metrics as PNG files in `run/report`.

    Args:
        run: The run folder.
        only_loads: True to draw only heat maps of loads.

    Returns:
        The files.

    Raises:
        ValueError: The run has no metrics yet, or they are damaged.
        OSError: A file cannot be written.
    """
    # imported here because matplotlib takes half a second, and most ranks draw nothing
    from moe_dist.report import plots
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
    """Writes a run's plots and its page `run/report.html`.

    Args:
        run: The run folder.

    Returns:
        The files.

    Raises:
        ValueError: See `write_report` and `write_page`.
        OSError: A file cannot be written.
    """
    return [*write_report(run), write_page([run], run / PAGE_NAME)]


def try_to_write_all(run: pathlib.Path) -> list[pathlib.Path]:
    """Calls `write_all`; reports an error as a warning.

    Args:
        run: The run folder.

    Returns:
        The files that were written; empty after an error.
    """
    try:
        return write_all(run)
    # any error: the run itself has finished, and its next start would end here again
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        print(
            f"warning: {run / PAGE_NAME} and its plots cannot be written ({reason}); "
            f"run python -m moe_dist.report {run} to draw them later",
            file=sys.stderr,
            flush=True,
        )
        return []


def write_page(runs: list[pathlib.Path], file: pathlib.Path) -> pathlib.Path:
    """Writes an HTML page about one or several runs atomically.

    Args:
        runs: The run folders.
        file: The page.

    Returns:
        `file`.

    Raises:
        ValueError: A run has no metrics yet, or one of its files is damaged.
        OSError: The page cannot be written.
    """
    from moe_dist.report.html import render_html
    from moe_dist.report.run_summary import name_of, read_run

    # runs are shown by their paths if two folders have the same name
    names = {name_of(run) for run in runs}
    show_paths = len(names) < len(runs)
    with _DRAWING:
        html = render_html([read_run(run, str(run) if show_paths else None) for run in runs])
        return run_folder.write(file.parent, file.name, html)
