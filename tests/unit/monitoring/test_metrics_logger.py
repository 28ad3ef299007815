"""Metrics on disk and on the terminal, and the choice of the wandb mode."""

import json
import math
import os

import numpy as np
import pytest
from loggers import make, warnings_in
from processes import check_plan

from moe_dist.monitoring import metrics_logger, wandb_logger
from moe_dist.monitoring.metrics_file import read_metrics


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path_factory):
    """Hides the user's wandb login, settings and caches from the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(home))


def values(step: int) -> dict:
    return {"train/loss": 1 / (step + 2), "moe/1/tokens_per_expert": [step, 2 * step, 0.1, 0.0]}


def test_logged_lines_are_read_back(tmp_path):
    lines = [{"step": 0, "valid/loss": 0.1 + 0.2}, {"step": 1, **values(1)}]
    with make(tmp_path) as log:
        for line in lines:
            log.log(line["step"], {key: value for key, value in line.items() if key != "step"})
            np.testing.assert_equal(read_metrics(tmp_path)[-1], in_arrays(line))  # on disk at once


def in_arrays(line: dict) -> dict:
    return {k: np.array(v, dtype=np.float32) if isinstance(v, list) else v for k, v in line.items()}


def test_nonfinite_values_are_null_in_the_file_and_nan_when_read(tmp_path):
    with make(tmp_path) as log:
        log.log(
            1,
            {
                "train/loss": math.nan,
                "train/perplexity": math.inf,
                "moe/1/importance_per_expert": [1.5, math.nan],
            },
        )

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    path = tmp_path / "metrics.jsonl"
    null = {
        "step": 1,
        "train/loss": None,
        "train/perplexity": None,
        "moe/1/importance_per_expert": [1.5, None],
    }
    assert json.loads(path.read_text(), parse_constant=refuse) == null
    with path.open("a") as file:
        file.write(
            '{"step": 2, "train/loss": NaN, "train/perplexity": Infinity, "moe/1/importance_per_expert": [1.5, NaN]}\n'
        )
    first, second = read_metrics(tmp_path)
    assert math.isnan(first["train/loss"]) and math.isnan(first["train/perplexity"])
    assert math.isnan(second["train/loss"]) and math.isinf(second["train/perplexity"])
    for line in (first, second):
        np.testing.assert_equal(
            line["moe/1/importance_per_expert"], np.array([1.5, math.nan], dtype=np.float32)
        )


def test_resumed_file_equals_an_uninterrupted_one(tmp_path):
    with make(tmp_path / "whole") as log:
        for step in range(1, 11):
            log.log(step, values(step))
    killed = make(tmp_path / "killed")
    for step in range(1, 8):
        killed.log(step, values(step))
    path = tmp_path / "killed" / "metrics.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"step": 8, "train/lo')
    assert [line["step"] for line in read_metrics(tmp_path / "killed")] == list(range(1, 8))
    with make(tmp_path / "killed", start_step=5) as log:
        for step in range(6, 11):
            log.log(step, values(step))
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_torn_line_is_removed_even_if_no_step_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2')
    make(tmp_path, start_step=2).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


def test_run_from_step_0_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n{"step": 1}\n')
    make(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_resume_accepts_a_missing_file(tmp_path):
    make(tmp_path, start_step=2).close()
    assert read_metrics(tmp_path) == []


def test_damaged_line_and_missing_file_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no metrics file .*metrics\.jsonl"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\nspoilt\n')
    with pytest.raises(ValueError, match=r"line 2 is not JSON.*spoilt"):
        read_metrics(tmp_path)
    for strange in (
        '"train/loss": "abc"',
        '"moe/middle/tokens_per_expert": 1',
        '"memory/peak_bytes_by_rank": []',
        '"moe/1/tokens_per_expert": ["a"]',
    ):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, {strange}}}\n')
        with pytest.raises(ValueError, match=r"line 1 has an unexpected key or type: '.*'"):
            read_metrics(tmp_path)
    for step in ("-1", "1.5", "true", "99999999999999999999"):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
        with pytest.raises(ValueError, match=r"line 1 has no step"):
            read_metrics(tmp_path)


def test_restarted_run_drops_damaged_lines(tmp_path, capfd):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 2}\n[3]\n')
    make(tmp_path, start_step=2).close()
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    first, second = warnings_in(capfd.readouterr().err)
    assert "line 2 is not JSON" in first and "line 4 has no step" in second and "dropped" in first


def test_disabled_logger_does_nothing(tmp_path, capfd):
    with make(tmp_path / "run", enabled=False, wandb_mode="offline", wandb_id="kept") as log:
        log.log(1, values(1))
        log.log_images(1, lambda: pytest.fail("drawn where nothing is logged"))
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")
    assert log.wandb_id == "kept"


@pytest.mark.parametrize("enabled", [True, False])
def test_unknown_wandb_mode_is_rejected(tmp_path, enabled):
    with pytest.raises(ValueError, match="'disabled' is unknown: use one of online, offline, off"):
        make(tmp_path, wandb_mode="disabled", enabled=enabled)


@pytest.mark.parametrize(
    ("mode", "asked", "expected"),
    [
        ("online", "", "online"),
        ("online", "disabled", "off"),
        ("online", "dryrun", "offline"),
        ("online", "offline", "offline"),
        ("online", "run", "online"),
        ("online", "shared", "shared"),
        ("offline", "online", "offline"),
        ("offline", "disabled", "offline"),
        ("off", "online", "off"),
    ],
)
def test_wandb_mode_comes_from_the_config_or_the_environment(monkeypatch, mode, asked, expected):
    monkeypatch.setenv("WANDB_MODE", asked)
    assert wandb_logger.wandb_mode_of(mode) == expected


@pytest.mark.parametrize("asked", ["offlin", "OFF", "1", "false"])
def test_invalid_wandb_mode_in_the_environment_is_named_before_any_work(monkeypatch, capsys, asked):
    monkeypatch.setenv("WANDB_MODE", asked)
    check_plan(
        ["lstm_moe_demo"],
        f"WANDB_MODE='{asked}' in the environment is unknown: use one of online",
        capsys,
    )


def test_progress_without_a_terminal_is_plain_lines(tmp_path, capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics_logger.time, "monotonic", lambda: clock[0])
    with make(tmp_path, total_steps=50, start_step=10) as log:
        for step in range(11, 51):
            clock[0] += 0.5
            log.log(
                step,
                {
                    "train/loss": 5.1234,
                    "train/perplexity": 167.92,
                    "throughput/tokens_per_sec": 21034.4,
                },
            )
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "step 11/50  loss 5.123  perplexity 167.9  tokens/s 21034  eta 00:19"
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [*range(11, 48, 4), 50]


def test_evaluation_stays_in_the_progress_line(tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics_logger.time, "monotonic", lambda: clock[0])
    with make(tmp_path, total_steps=3) as log:
        for step in (1, 2, 3):
            for line in (
                {"train/loss": 9.0 / step},
                {"valid/perplexity": 170.0 + step},
                {"test/loss": 5.0},
            ):
                if step > 1 or "train/loss" in line:
                    clock[0] += 2.0 if step < 3 else 0.0
                    log.log(step, line)
    assert [line.partition("  eta")[0] for line in capsys.readouterr().err.splitlines()] == [
        "step 1/3  loss 9.000",
        "step 2/3  loss 4.500",
        "step 2/3  loss 4.500  valid 172.0",
        "step 3/3  loss 3.000  valid 172.0",  # the last step is told at once, and what is new of it
        "step 3/3  loss 3.000  valid 173.0",
    ]


def test_progress_on_a_terminal_is_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics_logger.sys.stderr, "isatty", lambda: True)
    with make(tmp_path, start_step=4) as log:
        for step in range(5, 11):
            log.log(step, {"train/loss": 5.1234})
            log.log(step, {"valid/perplexity": 100.0 + step})
            last = capsys.readouterr().err.split("\r")[-1]
            assert f"step {step}/10 |" in last and f"loss 5.123  valid {100 + step}.0  eta" in last
