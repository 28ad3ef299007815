"""The page of runs in a browser, and its counterpart in wandb."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from made_up_runs import a_run, line
from runs import tiny
from wandb_file import wandb_records

from moe_dist.config.overrides import to_json
from moe_dist.monitoring.metrics_logger import MetricsLogger
from moe_dist.report import files as report_files
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


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.mark.timeout(200)
def test_browser_shows_the_page_without_errors_or_requests(
    of_one: str, of_both: str, tmp_path: Path
) -> None:
    """What a page asks for has an initiator in the browser's record of its network; what the
    browser asks for itself
    (its own updates, say) has none. A proxy that is not there keeps both from the network."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser at hand: none of {', '.join(BROWSERS)}")

    def opened(text: str) -> tuple[str, str, set[str]]:
        """The page as the browser has it, what its console says, and the addresses that it asked
        for.
        """
        file, log = tmp_path / "page.html", tmp_path / "net.json"
        file.write_text(text)
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--dump-dom",
        ]
        options += ["--no-first-run", "--proxy-server=127.0.0.1:9"]
        options += [f"--user-data-dir={tmp_path / 'user'}", f"--log-net-log={log}", file.as_uri()]
        done = subprocess.run([browser, *options], capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr
        console = "\n".join(row for row in done.stderr.splitlines() if "CONSOLE" in row)
        asked = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
        of_page = {
            each["url"]
            for each in asked
            if each.get("initiator", "not an origin") != "not an origin"
        }
        return (
            done.stdout,
            console,
            {url for url in of_page if not url.startswith(("file:", "data:"))},
        )

    bad = '<html><img src="http://outside.example/a.png"><script>console.error("loud"); nothing()</script></html>'
    _, console, asked = opened(bad)  # what is looked for can be found
    assert "loud" in console and "nothing is not defined" in console
    assert asked == {"http://outside.example/a.png"}
    for text, num_pictures in ((of_one, 8), (of_both, 2 * 8 + 6)):  # of each, and of both
        dom, console, asked = opened(text)
        assert console == "" and asked == set()
        assert dom.count("<svg") == num_pictures and "Bytes by link" in dom


@pytest.mark.timeout(120)
def test_wandb_panels_have_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / name))
    run = tmp_path / "run"
    with MetricsLogger(run, {}, enabled=True, wandb_mode="offline", total_steps=5) as log:
        for step in range(1, 4):
            log.log(step, {key: value for key, value in line(step).items() if key != "step"})
        log.log_images(3, lambda: [report_files.write_page([run], run / "report.html")])
    (path,) = (run / "wandb").glob("offline-run-*/*.wandb")
    records = wandb_records(path)
    hidden = {
        record.metric.name
        for record in records
        if record.HasField("metric") and record.metric.options.hidden
    }
    assert hidden == {
        *(f"moe/middle/load_p{p}_over_mean" for p in (10, 50, 90)),
        "comm/experts/gradients/intra_node_bytes",
        "comm/middle/dispatch/intra_node_bytes",
        "comm/middle/dispatch/inter_node_bytes",
    }
    updates = [
        update
        for record in records
        for update in record.config.update
        if len(update.nested_key) == 3
    ]
    panels = {
        update.nested_key[2]: json.loads(update.value_json)["panel_config"] for update in updates
    }
    assert {key: panel["stringSettings"]["title"] for key, panel in panels.items()} == {
        "charts/step_time": "milliseconds of a training step by part",
        "charts/bytes_by_link": "bytes sent per step by all ranks",
        "charts/load_middle": "load of an expert / mean load, layer middle",
    }
    rows = {
        path.name.partition("_table")[0]: json.loads(path.read_text())["data"]
        for path in (run / "wandb").glob("offline-run-*/files/media/table/charts/*.json")
    }
    assert [3, "experts", 12.0] in rows["step_time"] and len(
        rows["step_time"]
    ) == 3 * 5  # steps and parts
    assert [2, "dispatch, between nodes", 6e6] in rows["bytes_by_link"]
    assert [1, "max", 2.5] in rows["load_middle"] and [1, "p10", 0.2] in rows["load_middle"]
    (sent,) = (run / "wandb").glob("offline-run-*/files/media/html/report/*.html")
    assert sent.read_text() == (run / "report.html").read_text()
