"""wandb and its processes: labels, curves, pictures, and what a run does when wandb fails."""

import contextlib
import functools
import http.server
import math
import pathlib
import threading
import time

import pytest
import wandb
from loggers import CONFIG, make, warnings_in
from wandb_file import records_of, wandb_log

from moe_dist.monitoring import wandb_logger
from moe_dist.monitoring.metrics_file import read_metrics
from moe_dist.report import files as report_files


def values(step: int) -> dict:
    return {"train/loss": 1 / (step + 2), "moe/1/tokens_per_expert": [step, 2 * step, 0.1, 0.0]}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("by_config", [False, True])
def test_labels_come_from_the_config_or_the_environment(tmp_path, monkeypatch, capfd, by_config):
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
def test_unusable_server_leaves_an_offline_run_with_all_curves(
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


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", ["offline", "online"])  # online without a login is offline
def test_wandb_log_has_the_config_and_the_same_curves(tmp_path, capfd, mode):
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
    """The picture is logged at its step between other lines; a NaN does not end the logging."""
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
def test_pictures_are_drawn_only_in_the_wandb_thread(tmp_path, capsys):
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
def test_resumed_run_keeps_its_wandb_id(tmp_path):
    with make(tmp_path, wandb_mode="offline", wandb_id="abcd1234", start_step=2) as log:
        log.log(3, values(3))
    assert log.wandb_id == "abcd1234"
    assert wandb_log(tmp_path)[0] == "abcd1234"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("broken", [(wandb, "init"), (wandb.Run, "log"), (wandb.Run, "finish")])
def test_failing_wandb_prints_one_warning(tmp_path, capsys, monkeypatch, broken):
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
def test_stuck_wandb_does_not_delay_the_run(tmp_path, capsys, monkeypatch, backlog, reason):
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
