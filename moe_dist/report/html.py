"""Runs side by side on one HTML page that needs nothing else: pictures are in it, SVG or PNG, and no script."""

import base64
import io
import re
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from moe_dist.monitoring.metric_format import METRIC_FORMATS
from moe_dist.report import plots
from moe_dist.report.run_summary import (
    RunSummary,
    describe_ranks,
    headline_rows,
    memory_rows,
    step_time_rows,
    traffic_rows,
)

_MAX_SVG_CHARS = 300_000  # characters of SVG beyond which a picture is a PNG
_GRID_RANKS = 64  # most that the layout is drawn for
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; margin: 0;
  color: #1c2733; background: #f4f6f8; }
main { margin: 0 auto; padding: 24px 28px 60px; }
h1 { font-size: 26px; margin: 8px 0 2px; } h2 { font-size: 20px; margin: 36px 0 10px; }
h3 { font-size: 15px; margin: 14px 0 6px; }
p { margin: 4px 0 10px; max-width: 80em; color: #47566a; }
nav a { margin-right: 16px; color: #1f5fa8; text-decoration: none; }
.runs { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 560px), 1fr)); }
.one { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)); }
.one { align-items: start; } .one > *, .run { min-width: 0; }
figure, .card { margin: 0 0 16px; background: #fff; border: 1px solid #dce2e9; border-radius: 8px; padding: 10px; }
.one > figure { margin: 0; }
figure svg, figure img { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; width: fit-content; max-width: 100%; box-sizing: border-box; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 4px; text-align: left; border-bottom: 1px solid #e7ebf0; vertical-align: top; }
th { font-weight: 600; }
.ranks td { border: 1px solid #c9d3de; padding: 6px 10px; font-size: 13px; }
summary { cursor: pointer; }
"""


def render_html(runs: list[RunSummary]) -> str:
    """The HTML of one run, or of several: what they come to in one table, a column each, then their curves on the same
    axes, then the pictures of each beside those of the others."""
    title = ", ".join(run.name for run in runs)
    drawn = [plots.all_plots(run.lines, run.name) for run in runs]
    together = plots.overlay_runs({run.name: run.lines for run in runs}) if len(runs) > 1 else {}
    parts: list[tuple[str, str]] = [("In short", _table(runs, headline_rows))]
    if differing := _differing(runs):
        parts.append(("What differs", differing))
    if together:
        parts.append(("Side by side", f'<div class="one">{_figures(together)}</div>'))
    for section, (stems, note, rows_of) in _SECTIONS.items():
        figures = [
            {s: figure for s, figure in each.items() if s.startswith(stems)} for each in drawn
        ]
        if any(figures):
            head, table = f"<p>{note}</p>" if note else "", _table(runs, rows_of) if rows_of else ""
            columns = [_figures(each) for each in figures]
            if len(runs) == 1:
                columns, table = [table + columns[0]], ""
            parts.append((section, head + table + _columns(columns, runs)))
    parts.append(("Layout", _columns([_layout_of(run) for run in runs], runs)))
    parts.append(("Config", _columns([_config_of(run) for run in runs], runs)))
    nav = " ".join(f'<a href="#{_anchor(name)}">{name}</a>' for name, _ in parts)
    body = "\n".join(f'<h2 id="{_anchor(name)}">{name}</h2>\n{html}' for name, html in parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE} main {{ max-width: {max(1500, 640 * len(runs))}px; }}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>\n<nav>{nav}</nav>\n{body}\n</main></body></html>\n"
    )


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _figures(figures: dict[str, Figure]) -> str:
    """What there is of one layer stays together."""
    layers = list(dict.fromkeys(_layer(stem) for stem in figures))
    ordered = sorted(figures.items(), key=lambda item: layers.index(_layer(item[0])))
    return "".join(f"<figure>{_inline(stem, figure)}</figure>" for stem, figure in ordered)


def _layer(stem: str) -> str:
    return stem.removeprefix("load_").removeprefix("balance_")


def _inline(stem: str, figure: Figure) -> str:
    """An <svg> of the page's own, without the names of namespaces and standards, which look like addresses; where that
    would be heavy, as a map of loads is, a PNG."""
    file, title = io.BytesIO(), figure.axes[0].get_title()
    if not stem.startswith("load_"):
        # a salt of its own, for all of them share the page's names
        with matplotlib.rc_context({"svg.hashsalt": title + stem, "svg.fonttype": "path"}):
            figure.savefig(file, format="svg", metadata={"Date": None})
        svg = re.sub(
            r"<metadata>.*?</metadata>|\sxmlns(:\w+)?=\"[^\"]*\"",
            "",
            file.getvalue().decode(),
            flags=re.S,
        )
        svg = svg[svg.index("<svg") :].replace(
            "<svg", f'<svg role="img" aria-label="{escape(title)}"', 1
        )
        if len(svg) <= _MAX_SVG_CHARS:
            return svg
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'


def _columns(htmls: list[str], runs: list[RunSummary]) -> str:
    """One run has the width of the page, several have a column each."""
    if len(runs) == 1:
        return f'<div class="one">{htmls[0]}</div>'
    each = zip(runs, htmls, strict=True)
    columns = (f'<div class="run"><h3>{escape(run.name)}</h3>{html}</div>' for run, html in each)
    return f'<div class="runs">{"".join(columns)}</div>'


def _table(
    runs: list[RunSummary], rows_of: Callable[[RunSummary], Iterator[tuple[str, str]]]
) -> str:
    """A column for each run, a row for each thing that some run tells."""
    told = [dict(rows_of(run)) for run in runs]
    names = dict.fromkeys(name for each in told for name in each)
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = [
        f"<tr><th>{escape(name)}</th>"
        + "".join(f"<td>{escape(each.get(name, ''))}</td>" for each in told)
        + "</tr>"
        for name in names
    ]
    return (
        f'<div class="card wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'
        if rows
        else ""
    )


def _layout_of(run: RunSummary) -> str:
    """Which rank lies where and holds what."""
    layout = run.layout
    if not layout:
        return "<p>The run folder has no layout.json: it is of an earlier version.</p>"
    rows = [
        ("ranks", describe_ranks(layout)),
        (
            "samples of a step",
            f"{layout['global_batch_size']}, micro-batches: {layout['grad_accum_steps']}",
        ),
        ("samples of a rank", f"{layout['samples_per_rank']} in each micro-batch"),
        ("parameters of a rank", f"{layout.get('per_rank', {}).get('parameters', 0):,}"),
    ]
    told = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows
    )
    num_ranks, in_row = layout["world"], layout["ep"]
    holds = ""
    if num_ranks <= _GRID_RANKS:
        cells = [f"<td>{_rank(rank, layout)}</td>" for rank in range(num_ranks)]
        grid = "".join(
            f"<tr>{''.join(cells[i : i + in_row])}</tr>" for i in range(0, num_ranks, in_row)
        )
        holds = (
            "<h3>Who holds what</h3><p>Ranks of a row share one set of experts; those of a column hold the same.</p>"
            f'<table class="ranks">{grid}</table>'
        )
    return f'<div class="card wide"><table>{told}</table>{holds}</div>'


def _rank(rank: int, layout: dict[str, Any]) -> str:
    per_node = max(1, layout["world"] // max(1, layout.get("nodes", 1)))
    lines = [f"<b>rank {rank}</b>, node {rank // per_node}"]
    if "num_experts" in layout:
        mine = layout["num_experts"] // layout["ep"]
        first = rank % layout["ep"] * mine
        lines.append(f"experts {first} to {first + mine - 1}" if mine > 1 else f"expert {first}")
    return "<br>".join(lines)


def _differing(runs: list[RunSummary]) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.config)
    differing = [key for key in keys if len({str(run.config.get(key)) for run in runs}) > 1]

    def rows(run: RunSummary) -> Iterator[tuple[str, str]]:
        yield from ((key, str(run.config[key])) for key in differing if key in run.config)

    return _table(runs, rows) if differing else ""


def _config_of(run: RunSummary) -> str:
    if not run.config:
        return "<p>The run folder has no config.json of this version.</p>"
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>"
        for key, value in run.config.items()
    )
    return f'<details class="card wide"><summary>{len(run.config)} fields</summary><table>{rows}</table></details>'


# sections of pictures: the beginnings of their names, a note, and the rows of a table
_SECTIONS: dict[
    str, tuple[tuple[str, ...], str, Callable[[RunSummary], Iterator[tuple[str, str]]] | None]
] = {
    "Curves": (("loss", *METRIC_FORMATS, "optimizer", "norms"), "", None),
    "Load of experts": (("load_", "balance_"), "", None),
    "Time of a step": (
        ("step_time", "speed"),
        "Each part with its forward and its backward. Dispatch: rows on their way to the experts and back, and "
        "the wait for slower ranks there. Optimizer: gradients of experts summed over ranks, norm, update, and "
        "what ZeRO does around it. Rest: data, other layers, loss, and dense gradients summed over ranks.",
        step_time_rows,
    ),
    "Bytes by link": (
        ("traffic",),
        "Rows of the exchange, and of experts and vocabularies the gradients and weights; dense gradients, which "
        "DeepSpeed sends, are not counted.",
        traffic_rows,
    ),
    "Memory": (
        ("memory",),
        "The most that a rank has held so far: on CUDA tensors on the device; on CPU the whole process with its "
        "libraries, of which the estimate counts what the model and its training take alone.",
        memory_rows,
    ),
}
