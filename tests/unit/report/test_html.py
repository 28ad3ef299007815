"""The HTML page of runs: it shows the numbers of the metrics, loads nothing from a network, and
contains no secret."""

import dataclasses
import html
import json
import re
from pathlib import Path

import pytest
from made_up_runs import a_run
from runs import tiny

from moe_dist.config.overrides import to_json
from moe_dist.monitoring.metric_format import format_bytes
from moe_dist.report import __main__ as report_command
from moe_dist.report import files as report_files
from moe_dist.report import plots
from moe_dist.report.html import render_html
from moe_dist.report.run_summary import read_run


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs, the second of another seed and half as fast."""
    folder = tmp_path_factory.mktemp("runs")
    other = to_json(dataclasses.replace(tiny(), seed=7))
    return [a_run(folder / "one"), a_run(folder / "two", slow=2.0, config=other)]


@pytest.fixture(scope="module")
def of_one(both: list[Path]) -> str:
    return render_html([read_run(both[0])])


@pytest.fixture(scope="module")
def of_both(both: list[Path]) -> str:
    return render_html([read_run(run) for run in both])


def cells(text: str) -> dict[str, list[str]]:
    """Returns the rows of the page's tables by their first cell; of several the first."""
    rows = re.findall(r"<tr><th>([^<]+)</th>((?:<td>[^<]*</td>)+)</tr>", text)
    return {
        html.unescape(name): re.findall(r"<td>([^<]*)</td>", told) for name, told in reversed(rows)
    }


def test_page_has_the_numbers_of_the_metrics(of_one: str) -> None:
    found = {key: told for key, (told, *_) in cells(of_one).items()}
    expected = {
        "steps": "5 of 20",
        "train loss, last": "1.8",  # 9 / 5
        "valid perplexity, last": "12.18",
        "test loss, last": "2.75",
        "ranks": "4 on 2 nodes: edp 2 x ep 2",
        "ZeRO stage, precision": "1, bf16",
        "parameters": "12,345",
        "tokens per second, median": "3,000",  # of 1,000 to 5,000
        "milliseconds per step, median": "40.0",
        # dispatch: 1 MB x (1 + ... + 5) / 5 = 3 MB inside a node and three times that between them;
        # 0.5 MB of gradients
        "sent per step by all ranks": "12.50 MB",
        "inside a node, per step": "3.50 MB",
        "between nodes, per step": "9.00 MB",
        "dispatch, between nodes": "9.00 MB",
        "experts: gradients, inside a node": "500.00 kB",
        "gate, median": "4.00 ms  (10.0 %)",
        "dispatch, median": "8.00 ms  (20.0 %)",
        "experts, median": "12.00 ms  (30.0 %)",
        "optimizer, median": "6.00 ms  (15.0 %)",
        "rest, median": "10.00 ms  (25.0 %)",
        "measured, largest rank": "3.00 GB",
        "measured, smallest rank": "1.00 GB",
        "estimated": "3.50 MB",
        "estimated: activations": "500.00 kB",
        "largest load over the mean, last": "2.5",
        "dead experts, last": "1",
        "drop rate, last": "12.50 %",
        "skipped steps": "3",
        "samples of a rank": "1 in each micro-batch",
        "model.dim": "16",
    }
    assert {key: found.get(key) for key in expected} == expected


def test_page_has_every_picture_and_the_layout(of_one: str) -> None:
    titles = re.findall(r'<svg role="img" aria-label="one: ([^"]+)"', of_one)
    assert titles == [
        "loss",
        "perplexity",
        "optimizer",
        "balance of MoE layer middle",
        "time of a training step by part",
        "speed of training steps",
        "sent to other ranks",
        "memory of a rank",
    ]
    assert '<img alt="one: load of MoE layer middle" src="data:image/png;base64,' in of_one
    # experts 0 to 3 on even ranks, of which rank 2 is on the second node
    assert (
        "<b>rank 2</b>, node 1<br>experts 0 to 3" in of_one
        and "<b>rank 3</b>, node 1<br>experts 4 to 7" in of_one
    )


def test_several_runs_have_columns_and_differences(of_both: str) -> None:
    text, found = of_both, cells(of_both)
    assert found["milliseconds per step, median"] == ["40.0", "80.0"]
    assert found["gate, median"] == ["4.00 ms  (10.0 %)", "8.00 ms  (10.0 %)"]
    differs = text[text.index('<h2 id="differences">') : text.index('<h2 id="side-by-side">')]
    assert cells(differs) == {"seed": ["0", "7"]}
    for title in (
        "loss: train thin, valid thick",
        "time of a training step",
        "drop rate",
        "tokens per second",
    ):
        assert f'aria-label="{title}"' in text
    for picture in ("loss", "time of a training step by part", "memory of a rank"):
        assert f'aria-label="one: {picture}"' in text and f'aria-label="two: {picture}"' in text
    ids = re.findall(r'<(?:clipPath|svg|linearGradient)[^>]* id="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "two pictures name a part of theirs alike"


def outside(text: str) -> list[str]:
    """Returns everything that makes a browser load something outside the page."""
    inside = r"(?!#|data:|url\(#)"
    return re.findall(
        rf"""<(?:script|link|iframe|object|embed)\b(?! rel="icon" href="data:,")|https?:|//\w|@import"""
        rf"""|\b(?:src|href|srcset|xlink:href)\s*=\s*["']{inside}|url\((?!#|["']?#)""",
        re.sub(r"data:image/png;base64,[\w+/=]+", "data:", text),
    )


def test_page_is_self_contained(of_one: str, of_both: str) -> None:
    for bad in (
        '<img src="x.png">',
        "<script>",
        '<a href="https://a.b">',
        "url(font.woff)",
        "@import 'a.css'",
    ):
        assert outside(bad), bad
    assert outside(of_one) == [] and outside(of_both) == []


def test_page_has_no_secret_of_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "e" * 40)
    monkeypatch.setattr(plots, "all_plots", lambda *_: {})  # which take a while, and know no config
    text = to_json(
        tiny(
            "data.text=https://user:pa55word@host/a.txt",
            "init_from=hf_abcdefghijklmnop",
            "baseline=" + "0f" * 20,
        )
    )
    shown = render_html([read_run(a_run(tmp_path / "odd", config=text))])
    added = json.loads(text) | {"api_key": "s3cret-of-an-added-field"}
    added["wandb"] |= {"api_key": "s3cret-of-an-added-field"}
    hidden = render_html([read_run(a_run(tmp_path / "added", config=json.dumps(added)))])
    for secret in ("pa55word", "hf_abc", "0f" * 20, "s3cret", "e" * 40):
        assert secret not in shown + hidden
    assert cells(shown)["data.text"] == ["https://(hidden)@host/a.txt"] and cells(shown)[
        "init_from"
    ] == ["(hidden)"]
    assert "no config.json of this version" in hidden


def test_names_are_escaped_and_files_may_be_missing(tmp_path: Path) -> None:
    run = tmp_path / "<b>&amp;"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "test/loss": 4.0}\n{"step": 2, "train/loss": null}\n'
    )
    text = render_html([read_run(run)])
    assert "<b>&amp;" not in text and "&lt;b&gt;&amp;amp;" in text
    assert cells(text)["test loss, last"] == ["4"] and cells(text)["train loss, last"] == ["nan"]
    assert "gate" not in text and "no layout.json" in text


def test_run_resumed_on_other_ranks_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    peaks = [1e9, 3e9, 2e9, 1.5e9], [4e9, 5e9]
    lines = [
        {"step": step, "memory/peak_bytes_by_rank": peak}
        for step, peak in enumerate(peaks, start=1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert cells(render_html([read_run(run)]))["measured, largest rank"] == ["5.00 GB"]


def test_report_command_writes_one_page(
    both: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = map(str, both)
    drawn = plots.all_plots
    monkeypatch.setattr(plots, "all_plots", lambda *args: dict(list(drawn(*args).items())[:1]))
    monkeypatch.setattr(plots, "overlay_runs", lambda runs: {})

    def run(*args: str) -> list[str]:
        monkeypatch.setattr(report_files.sys, "argv", ["report", *args])
        report_command.main()
        return capsys.readouterr().out.split()

    assert run(one, two, "--html", str(tmp_path / "both.html")) == [str(tmp_path / "both.html")]
    assert run(one)[-1] == f"{one}/report.html" and (both[0] / "report" / "loss.png").is_file()
    assert (both[0] / "report.html").read_text().count("<h1>one</h1>") == 1
    again = a_run(tmp_path / "one")  # of the same name, elsewhere
    run(one, str(again), "--html", str(tmp_path / "alike.html"))
    assert f"<h1>{one}, {again}</h1>" in (tmp_path / "alike.html").read_text()
    for args, says in (
        ([one, two], "error: 2 runs need a file for their page: add --html FILE"),
        ([str(tmp_path), "--html", str(tmp_path / "x.html")], "error: no metrics file"),
    ):
        with pytest.raises(SystemExit) as end:
            run(*args)
        assert end.value.code == 2 and capsys.readouterr().err.startswith(says)
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    ("num_bytes", "told"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.50 kB"), (2.5e12, "2,500.00 GB")],
)
def test_bytes_as_text(num_bytes: float, told: str) -> None:
    assert format_bytes(num_bytes) == told
