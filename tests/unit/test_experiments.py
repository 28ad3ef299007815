"""Published tables equal the saved metrics."""

import importlib
import json
import sys

import pytest
from paths import ROOT

from moe_dist.config.papers import get
from moe_dist.tasks.registry import task_of

RESULTS = ROOT / "experiments" / "results"


def test_widenet_tables_equal_the_kept_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "widenet"))
    report = importlib.import_module("report")
    try:
        assert report.report() == (RESULTS / "widenet" / "README.md").read_text()
    finally:
        for name in ("report", "run"):
            sys.modules.pop(name, None)


def test_widenet_arms_are_configs_of_today_and_their_kept_runs_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "widenet"))
    run = importlib.import_module("run")
    try:
        for name, arm in run.ARMS.items():
            assert arm.config().name == arm.base
            assert run.kept(name, 0) is not None, name
    finally:
        sys.modules.pop("run", None)


@pytest.mark.parametrize("name", ["lstm_moe_demo", "widenet_demo", "widenet_text_demo"])
def test_demo_results_have_the_same_data_and_steps(name: str) -> None:
    """Otherwise they are not comparable; docs/results.md has their means."""
    config, kept = get(name), json.loads((RESULTS / f"{name}.json").read_text())
    task = task_of(config)
    assert config.baseline == name
    assert json.loads(json.dumps(task.comparison_key(config))) == kept["given"]
    assert name in kept["arms"] and len(kept["arms"]) == 2
    for arm in kept["arms"].values():
        values = arm[f"test_{task.primary_metric}"]
        mean = sum(values) / len(values)
        told = f"{100 * mean:.1f}" if task.primary_metric == "accuracy" else f"{mean:.2f}"
        assert f"| {told} |" in (ROOT / "docs" / "results.md").read_text().replace("**", "")
