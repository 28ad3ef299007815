"""What a user sees of a run: the curves on disk, on the terminal and in wandb."""

import contextlib
import functools
import http.server
import json
import math
import os
import pathlib
import threading
import time

import numpy as np
import pytest
import wandb
from processes import check_plan
from wandb_file import records_of, wandb_log

from moe_dist.monitoring import metrics_logger, wandb_logger
from moe_dist.monitoring.metrics_file import read_metrics
from moe_dist.monitoring.metrics_logger import MetricsLogger
from moe_dist.report import files as report_files

CONFIG = {"experts": 4, "lr": 0.5, "data": {"name": "tiny"}}


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path_factory):
    """Keeps the login, settings and caches of whoever runs the tests out of them."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(home))


def make(run: pathlib.Path, **options) -> MetricsLogger:
    return MetricsLogger(
        run, CONFIG, **{"enabled": True, "wandb_mode": "off", "total_steps": 10} | options
    )


def values(step: int) -> dict:
    return {"train/loss": 1 / (step + 2), "moe/1/tokens_per_expert": [step, 2 * step, 0.1, 0.0]}


def warnings_in(err: str) -> list[str]:
    return [
        line
        for line in err.splitlines()
        if not line.startswith(("step ", "note: nobody is logged in to wandb"))
    ]


def test_lines_come_back_as_logged(tmp_path):
    lines = [{"step": 0, "valid/loss": 0.1 + 0.2}, {"step": 1, **values(1)}]
    with make(tmp_path) as log:
        for line in lines:
            log.log(line["step"], {key: value for key, value in line.items() if key != "step"})
            np.testing.assert_equal(read_metrics(tmp_path)[-1], in_arrays(line))  # on disk at once


def in_arrays(line: dict) -> dict:
    return {k: np.array(v, dtype=np.float32) if isinstance(v, list) else v for k, v in line.items()}


def test_what_is_not_finite_is_null_in_the_file_and_not_a_number_when_read(tmp_path):
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


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
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


def test_a_torn_line_goes_even_where_no_step_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2')
    make(tmp_path, start_step=2).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


def test_a_run_from_step_0_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n{"step": 1}\n')
    make(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_resume_copes_with_a_lost_file(tmp_path):
    make(tmp_path, start_step=2).close()
    assert read_metrics(tmp_path) == []


def test_a_spoilt_line_and_a_missing_file_are_named(tmp_path):
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


def test_a_run_that_is_started_again_goes_on_without_spoilt_lines(tmp_path, capfd):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 2}\n[3]\n')
    make(tmp_path, start_step=2).close()
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    first, second = warnings_in(capfd.readouterr().err)
    assert "line 2 is not JSON" in first and "line 4 has no step" in second and "dropped" in first


def test_disabled_does_nothing(tmp_path, capfd):
    with make(tmp_path / "run", enabled=False, wandb_mode="offline", wandb_id="kept") as log:
        log.log(1, values(1))
        log.log_images(1, lambda: pytest.fail("drawn where nothing is logged"))
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")
    assert log.wandb_id == "kept"


@pytest.mark.parametrize("enabled", [True, False])
def test_an_unknown_wandb_mode_is_refused(tmp_path, enabled):
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
def test_the_mode_is_the_configs_or_else_the_environments(monkeypatch, mode, asked, expected):
    monkeypatch.setenv("WANDB_MODE", asked)
    assert wandb_logger.wandb_mode_of(mode) == expected


@pytest.mark.parametrize("asked", ["offlin", "OFF", "1", "false"])
def test_a_mode_of_the_environment_that_is_none_is_named_before_any_work(
    monkeypatch, capsys, asked
):
    monkeypatch.setenv("WANDB_MODE", asked)
    check_plan(
        ["lstm_moe_demo"],
        f"WANDB_MODE='{asked}' in the environment is unknown: use one of online",
        capsys,
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("by_config", [False, True])
def test_labels_are_the_configs_or_else_the_environments(tmp_path, monkeypatch, capfd, by_config):
    elsewhere = tmp_path / "scratch"
    told = {
        "PROJECT": "theirs",
        "RUN_GROUP": "group-1",
        "TAGS": "a,b",
        "NOTES": "some",
        "NAME": "one",
        "DIR": elsewhere,
    }
    for name, value in told.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    labels = (
        {"project": "ours", "group": "group-2", "tags": "c, d", "notes": None} if by_config else {}
    )
    with make(tmp_path / "run", wandb_mode="offline", wandb_labels=labels) as log:
        log.log(1, values(1))
    assert warnings_in(capfd.readouterr().err) == [] and not (tmp_path / "run" / "wandb").exists()
    (first,) = [record.run for record in records_of(elsewhere) if record.HasField("run")]
    assert (first.run_id, first.display_name, first.notes) == ("abc123", "one", "some")
    expected = ("ours", "group-2", ["c", "d"]) if by_config else ("theirs", "group-1", ["a", "b"])
    assert (first.project, first.run_group, list(first.tags)) == expected


class Refuses(http.server.BaseHTTPRequestHandler):
    """Answers every request with the server's `status`, or with 0 not at all."""

    def do_POST(self) -> None:
        if self.server.status == 0:
            self.server.end.wait(60)
            return
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(b'{"errors": [{"message": "no"}]}')

    do_GET = do_POST

    def log_message(self, *_) -> None:
        """Says nothing."""


@contextlib.contextmanager
def server(status: int):
    """Yields the address of one on this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as http_server:
        http_server.status, http_server.end = status, threading.Event()
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.end.set()
        http_server.shutdown()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("status", "key"), [(401, "a" * 40), (500, "b" * 40), (0, "c" * 40), (404, "no key at all")]
)
def test_a_server_that_cannot_be_used_leaves_an_offline_run_with_all_curves(
    tmp_path, monkeypatch, capfd, status, key
):
    monkeypatch.setattr(wandb_logger, "INIT_TIMEOUT_S", 2.0)
    monkeypatch.setattr(
        wandb_logger, "FINISH_TIMEOUT_S", 60.0
    )  # for a busy machine; it takes one or two
    monkeypatch.setenv("WANDB_API_KEY", key)
    with server(status) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        with make(tmp_path, wandb_mode="online") as log:
            for step in range(30):
                log.log(step, values(step))
    (warning,) = warnings_in(capfd.readouterr().err)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert warning.startswith("warning: wandb is offline for this run (")
    assert warning.endswith(f"; wandb sync {folder} uploads it") and len(warning) < 600
    run_id, _, history = wandb_log(tmp_path)
    assert run_id == log.wandb_id
    assert [line["train/loss"] for line in history] == [
        values(step)["train/loss"] for step in range(30)
    ]


def test_without_a_terminal_progress_is_plain_lines_at_a_sensible_rate(
    tmp_path, capsys, monkeypatch
):
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


def test_an_evaluation_stays_in_the_progress_line(tmp_path, capsys, monkeypatch):
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


def test_on_a_terminal_progress_is_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics_logger.sys.stderr, "isatty", lambda: True)
    with make(tmp_path, start_step=4) as log:
        for step in range(5, 11):
            log.log(step, {"train/loss": 5.1234})
            log.log(step, {"valid/perplexity": 100.0 + step})
            last = capsys.readouterr().err.split("\r")[-1]
            assert f"step {step}/10 |" in last and f"loss 5.123  valid {100 + step}.0  eta" in last


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", ["offline", "online"])  # online without a login is offline
def test_the_wandb_log_holds_the_config_and_the_same_curves(tmp_path, capfd, mode):
    with make(tmp_path, wandb_mode=mode) as log:
        for step in range(600):  # more than one block of the log
            log.log(step, values(step) | {"train/perplexity": math.exp(step)})
        log.log(600, {"train/loss": math.inf})
        log.log(600, {"valid/loss": 2.5})
    out, err = capfd.readouterr()
    assert (out, warnings_in(err)) == ("", [])
    assert (
        "note: nobody is logged in to wandb, so it is offline for this run; wandb sync " in err
    ) == (mode == "online")
    run_id, config, history = wandb_log(tmp_path)
    assert run_id == log.wandb_id
    assert {key: config[key] for key in CONFIG} == CONFIG
    curves: dict[int, dict] = {}
    for line in read_metrics(tmp_path):
        curves.setdefault(line["step"], {}).update(
            {k: v for k, v in line.items() if isinstance(v, float)}
        )
    curves[600]["train/loss"] = math.inf  # which wandb has a word for
    logged = {
        line["_step"]: {k: float(v) for k, v in line.items() if "/" in k and "moe" not in k}
        for line in history
    }
    assert logged == curves
    assert len(curves) == 601
    line = history[7]
    assert (
        line["moe/1/tokens_per_expert/_type"] == "histogram"
        and sum(line["moe/1/tokens_per_expert/values"]) == 4
    )
    assert (
        line["moe/1/tokens_per_expert/bins"][0] == 0
        and line["moe/1/tokens_per_expert/bins"][-1] == 14
    )


@pytest.mark.timeout(120)
def test_wandb_gets_the_load_map_at_an_evaluation(tmp_path):
    """The picture itself, at its step, among lines that go on; and a number that is none does not end the logging."""
    with make(tmp_path, wandb_mode="offline") as log:
        for step in range(6):
            log.log(step, values(step) | {"moe/1/importance_per_expert": [1.0, math.nan]})
            if step in (2, 5):
                log.log_images(
                    step, functools.partial(report_files.write_report, tmp_path, only_loads=True)
                )
    _, _, history = wandb_log(tmp_path)
    assert [line["_step"] for line in history] == list(range(6))
    logged = {
        line["_step"]: line["report/load_1/path"]
        for line in history
        if "report/load_1/path" in line
    }
    assert list(logged) == [2, 5]
    (files,) = (tmp_path / "wandb").glob("offline-run-*/files")
    assert (files / logged[5]).read_bytes() == (tmp_path / "report" / "load_1.png").read_bytes()
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["load_1.png"]


@pytest.mark.timeout(120)
def test_pictures_are_drawn_in_wandbs_thread_and_not_without_wandb(tmp_path, capsys):
    names = []

    def draw() -> list[pathlib.Path]:
        names.append(threading.current_thread().name)
        raise RuntimeError("no ink")

    for mode in ("off", "offline"):
        with make(tmp_path / mode, wandb_mode=mode) as log:
            log.log_images(1, draw)
            log.log(1, values(1))
        assert len(read_metrics(tmp_path / mode)) == 1
    assert names == ["wandb-feed"]
    (warning,) = warnings_in(capsys.readouterr().err)
    assert warning.startswith("warning: nothing logged to wandb at step 1") and "no ink" in warning
    assert len(wandb_log(tmp_path / "offline")[2]) == 1, "curves go on"


@pytest.mark.timeout(120)
def test_a_resumed_run_keeps_its_wandb_id(tmp_path):
    with make(tmp_path, wandb_mode="offline", wandb_id="abcd1234", start_step=2) as log:
        log.log(3, values(3))
    assert log.wandb_id == "abcd1234"
    assert wandb_log(tmp_path)[0] == "abcd1234"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("broken", [(wandb, "init"), (wandb.Run, "log"), (wandb.Run, "finish")])
def test_a_failing_wandb_is_one_warning(tmp_path, capsys, monkeypatch, broken):
    def fail(*_, **__):
        raise RuntimeError("wandb is broken")

    monkeypatch.setattr(*broken, fail)
    with make(tmp_path, wandb_mode="online") as log:
        for step in range(5):
            log.log(step, values(step))
    assert len(read_metrics(tmp_path)) == 5
    (warning,) = warnings_in(capsys.readouterr().err)
    assert warning.startswith("warning: wandb is off") and "wandb is broken" in warning


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("backlog", "reason"), [(100, "does not finish"), (3, "is 3 lines behind")]
)
def test_a_stuck_wandb_does_not_hold_the_run_up(tmp_path, capsys, monkeypatch, backlog, reason):
    monkeypatch.setattr(wandb_logger, "INIT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(wandb_logger, "FINISH_TIMEOUT_S", 0.2)
    monkeypatch.setattr(wandb_logger, "_MAX_QUEUE", backlog)
    stuck = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: stuck.wait())
    start = time.monotonic()
    with make(tmp_path, wandb_mode="offline") as log:
        for step in range(10):
            log.log(step, values(step))
    assert time.monotonic() - start < 10
    stuck.set()
    log._wandb.join()  # lest it meets the next test's wandb
    assert len(read_metrics(tmp_path)) == 10
    (warning,) = warnings_in(capsys.readouterr().err)
    assert warning.startswith("warning: wandb is off") and reason in warning
