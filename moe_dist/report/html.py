"""A self-contained HTML page about one or several runs, with inline SVG or PNG and no scripts."""

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from moe_dist.monitoring.metric_format import METRIC_FORMATS
from moe_dist.report import plots
from moe_dist.report.run_summary import (
    Rows,
    RunSummary,
    describe_ranks,
    headline_rows,
    memory_rows,
    step_time_rows,
    traffic_rows,
)

_MAX_SVG_CHARS = 300_000  # a larger plot is a PNG
_MAX_GRID_RANKS = 64  # more ranks are not shown as a grid
_MIN_WIDTH_PX = 1500
_RUN_WIDTH_PX = 640
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; margin: 0;
  color: #1c2733; background: #f4f6f8; }
main { margin: 0 auto; padding: 24px 28px 60px; }
h1 { font-size: 26px; margin: 8px 0 2px; } h2 { font-size: 20px; margin: 36px 0 10px; }
h3 { font-size: 15px; margin: 14px 0 6px; }
p { margin: 4px 0 10px; max-width: 80em; color: #47566a; }
nav a { margin-right: 16px; color: #1f5fa8; text-decoration: none; }
.runs { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 560px), 1fr)); }
.one { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)); }
.one { align-items: start; } .one > *, .run { min-width: 0; }
figure, .card { margin: 0 0 16px; background: #fff; border: 1px solid #dce2e9;
  border-radius: 8px; padding: 10px; }
.one > figure { margin: 0; }
figure svg, figure img { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; width: fit-content; max-width: 100%; box-sizing: border-box; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 4px; text-align: left; border-bottom: 1px solid #e7ebf0;
  vertical-align: top; }
th { font-weight: 600; }
.ranks td { border: 1px solid #c9d3de; padding: 6px 10px; font-size: 13px; }
summary { cursor: pointer; }
"""


@dataclass(frozen=True)
class _Section:
    """A section of plots.

    Attributes:
        title: Its heading.
        stems: Beginnings of its file names (without suffix).
        note: Text below the heading.
        rows: Rows of its table; None for no table.
    """

    title: str
    stems: tuple[str, ...]
    note: str = ""
    rows: Callable[[RunSummary], Rows] | None = None


_SECTIONS = (
    _Section("Curves", ("loss", *METRIC_FORMATS, "optimizer", "norms")),
    _Section("Load of experts", ("load_", "balance_")),
    _Section(
        "Time of a step",
        ("step_time", "speed"),
        "Each part includes its forward and its backward. Dispatch: tokens to the experts and "
        "back, including the wait for slower ranks. Optimizer: reduction of expert gradients, "
        "norm, update, and ZeRO's work around it. Rest: data, other layers, loss, and the "
        "reduction of dense gradients.",
        step_time_rows,
    ),
    _Section(
        "Bytes by link",
        ("traffic",),
        "Tokens sent to experts and back, and the gradients and weights of experts and of "
        "row-sparse vocabularies. Dense gradients, which DeepSpeed sends, are not counted.",
        traffic_rows,
    ),
    _Section(
        "Memory",
        ("memory",),
        "Peak memory of a rank so far. On CUDA: tensors on the device. On CPU: the whole process "
        "with its libraries; the estimate counts only the model and its training.",
        memory_rows,
    ),
)


def render_html(runs: list[RunSummary]) -> str:
    """Renders one page for one or several runs.

    Several runs share one table with a column for each run; their curves are first drawn on the
    same axes, then each run's plots in columns.

    Args:
        runs: The runs.

    Returns:
        The page as HTML text.
    """
    parts = [("Summary", _table(runs, headline_rows))]
    differences = _differences(runs)
    if differences:
        parts.append(("Differences", differences))
    if len(runs) > 1:
        overlays = plots.overlay_runs({run.name: run.lines for run in runs})
        if overlays:
            parts.append(("Side by side", f'<div class="one">{_figures(overlays)}</div>'))
    plots_by_run = [plots.all_plots(run.lines, run.name) for run in runs]
    for section in _SECTIONS:
        html = _render_section(section, runs, plots_by_run)
        if html:
            parts.append((section.title, html))
    parts.append(("Layout", _columns([_layout_table(run) for run in runs], runs)))
    parts.append(("Config", _columns([_config_table(run) for run in runs], runs)))
    return _page(", ".join(run.name for run in runs), parts, len(runs))


def _page(title: str, parts: list[tuple[str, str]], num_runs: int) -> str:
    """Returns the page of sections, given by (heading, HTML)."""
    links = [f'<a href="#{_anchor(name)}">{name}</a>' for name, _ in parts]
    sections = [f'<h2 id="{_anchor(name)}">{name}</h2>\n{html}' for name, html in parts]
    width = max(_MIN_WIDTH_PX, _RUN_WIDTH_PX * num_runs)
    body = "\n".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE} main {{ max-width: {width}px; }}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>\n<nav>{' '.join(links)}</nav>\n{body}\n"
        "</main></body></html>\n"
    )


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _render_section(
    section: _Section, runs: list[RunSummary], plots_by_run: list[dict[str, Figure]]
) -> str:
    """Returns note, table and plots; empty if no run has a plot of the section."""
    columns = []
    for figures in plots_by_run:
        selected = {}
        for stem, figure in figures.items():
            if stem.startswith(section.stems):
                selected[stem] = figure
        columns.append(_figures(selected))
    if not any(columns):
        return ""
    note = f"<p>{section.note}</p>" if section.note else ""
    table = _table(runs, section.rows) if section.rows else ""
    if len(runs) == 1:  # the table is an element of the plots' grid
        return note + _columns([table + columns[0]], runs)
    return note + table + _columns(columns, runs)


def _figures(figures: dict[str, Figure]) -> str:
    """Returns the plots; those for one layer are adjacent."""
    layers = list(dict.fromkeys(_layer(stem) for stem in figures))
    ordered = sorted(figures.items(), key=lambda item: layers.index(_layer(item[0])))
    return "".join(f"<figure>{_inline(stem, figure)}</figure>" for stem, figure in ordered)


def _layer(stem: str) -> str:
    return stem.removeprefix("load_").removeprefix("balance_")


def _inline(stem: str, figure: Figure) -> str:
    """Returns a plot as an inline SVG; a load heat map or a large plot as a PNG."""
    title = figure.axes[0].get_title()
    if not stem.startswith("load_"):
        svg = _svg(figure, title, salt=title + stem)
        if len(svg) <= _MAX_SVG_CHARS:
            return svg
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'


def _svg(figure: Figure, title: str, salt: str) -> str:
    """Returns an <svg> element without metadata and namespaces, which look like addresses.

    Ids inside the SVG derive from `salt`, which must be unique in the page.
    """
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue().decode()
    svg = re.sub(r"<metadata>.*?</metadata>|\sxmlns(:\w+)?=\"[^\"]*\"", "", svg, flags=re.S)
    svg = svg[svg.index("<svg") :]
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def _columns(htmls: list[str], runs: list[RunSummary]) -> str:
    """Returns one column per run; a single run is as wide as the page."""
    if len(runs) == 1:
        return f'<div class="one">{htmls[0]}</div>'
    columns = []
    for run, html in zip(runs, htmls, strict=True):
        columns.append(f'<div class="run"><h3>{escape(run.name)}</h3>{html}</div>')
    return f'<div class="runs">{"".join(columns)}</div>'


def _table(runs: list[RunSummary], rows_of: Callable[[RunSummary], Rows]) -> str:
    """Returns a table with one column per run, and one row per name that some run has."""
    values_by_run = [dict(rows_of(run)) for run in runs]
    names: dict[str, None] = {}
    for values in values_by_run:
        names |= dict.fromkeys(values)
    if not names:
        return ""
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    body = ""
    for name in names:
        cells = "".join(f"<td>{escape(values.get(name, ''))}</td>" for values in values_by_run)
        body += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    return f'<div class="card wide"><table><tr><th></th>{head}</tr>{body}</table></div>'


def _two_columns(rows: list[tuple[str, str]]) -> str:
    """Returns a table of names and values."""
    html = ""
    for name, value in rows:
        html += f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
    return f"<table>{html}</table>"


def _layout_table(run: RunSummary) -> str:
    """Returns the batch, the ranks, and a grid that shows each rank."""
    layout = run.layout
    if not layout:
        return "<p>The run folder has no layout.json.</p>"
    num_params = layout.get("per_rank", {}).get("parameters", 0)
    table = _two_columns(
        [
            ("ranks", describe_ranks(layout)),
            (
                "samples of a step",
                f"{layout['global_batch_size']}, micro-batches: {layout['grad_accum_steps']}",
            ),
            ("samples of a rank", f"{layout['samples_per_rank']} in each micro-batch"),
            ("parameters of a rank", f"{num_params:,}"),
        ]
    )
    grid = _rank_grid(layout) if layout["world"] <= _MAX_GRID_RANKS else ""
    return f'<div class="card wide">{table}{grid}</div>'


def _rank_grid(layout: dict[str, Any]) -> str:
    """Returns a table of all ranks: a row per expert-parallel group, a column per expert shard."""
    html = ""
    for first in range(0, layout["world"], layout["ep"]):
        ranks = range(first, first + layout["ep"])
        cells = "".join(f"<td>{_describe_rank(rank, layout)}</td>" for rank in ranks)
        html += f"<tr>{cells}</tr>"
    return (
        "<h3>Ranks and experts</h3><p>The ranks of a row share one set of experts; the ranks of a "
        f'column hold the same experts.</p><table class="ranks">{html}</table>'
    )


def _describe_rank(rank: int, layout: dict[str, Any]) -> str:
    """Returns a rank's node and experts, as HTML."""
    ranks_per_node = max(1, layout["world"] // max(1, layout.get("nodes", 1)))
    html = f"<b>rank {rank}</b>, node {rank // ranks_per_node}"
    if "num_experts" in layout:
        num_local = layout["num_experts"] // layout["ep"]
        first = rank % layout["ep"] * num_local
        last = first + num_local - 1
        html += f"<br>experts {first} to {last}" if num_local > 1 else f"<br>expert {first}"
    return html


def _differences(runs: list[RunSummary]) -> str:
    """Returns a table of the config fields that differ between runs; empty if there are none."""
    keys: dict[str, None] = {}
    for run in runs:
        keys |= dict.fromkeys(run.config)
    differing = []
    for key in keys:
        values = {str(run.config.get(key)) for run in runs}
        if len(values) > 1:
            differing.append(key)

    def rows(run: RunSummary) -> Rows:
        for key in differing:
            if key in run.config:
                yield key, str(run.config[key])

    return _table(runs, rows)


def _config_table(run: RunSummary) -> str:
    """Returns all config fields, folded."""
    if not run.config:
        return "<p>The run folder has no config.json of this version.</p>"
    table = _two_columns([(key, str(value)) for key, value in run.config.items()])
    fields = f"{len(run.config)} fields"
    return f'<details class="card wide"><summary>{fields}</summary>{table}</details>'
