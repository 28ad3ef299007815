"""What a user sees of a run: the curves on disk, on the terminal, in wandb and as pictures."""

import math
import pathlib
import threading
import time

import matplotlib.image
import pytest
import wandb
from wandb_file import wandb_log

from moe_dist import metrics, report
from moe_dist.metrics import Metrics, read_metrics

CONFIG = {"experts": 4, "lr": 0.5, "data": {"name": "tiny"}}


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path_factory):
    """Keeps the login, settings and caches of whoever runs the tests out of them."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(home))


def make(run: pathlib.Path, **options) -> Metrics:
    return Metrics(run, CONFIG, **{"enabled": True, "wandb_mode": "off", "total_steps": 10} | options)


def values(step: int) -> dict:
    return {"train/loss": 1 / (step + 2), "moe/1/load": [step, 2 * step, 0.1, 0.0]}


def test_lines_come_back_as_logged(tmp_path):
    lines = [{"step": 0, "valid/loss": 0.1 + 0.2}, {"step": 1, **values(1)}, {"step": 1, "train/perplexity": math.inf}]
    with make(tmp_path) as log:
        for line in lines:
            log.log(line["step"], {key: value for key, value in line.items() if key != "step"})
            assert read_metrics(tmp_path)[-1] == line  # on disk at once
        log.log(2, {"train/loss": math.nan})
    assert read_metrics(tmp_path)[:3] == lines
    assert math.isnan(read_metrics(tmp_path)[3]["train/loss"])


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


def test_disabled_does_nothing(tmp_path, capfd):
    with make(tmp_path / "run", enabled=False, wandb_mode="offline", wandb_id="kept") as log:
        log.log(1, values(1))
        log.progress(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")
    assert log.wandb_id == "kept"


@pytest.mark.parametrize("enabled", [True, False])
def test_an_unknown_wandb_mode_is_refused(tmp_path, enabled):
    with pytest.raises(ValueError, match="'disabled' is unknown: use one of online, offline, off"):
        make(tmp_path, wandb_mode="disabled", enabled=enabled)


def test_without_a_terminal_progress_is_plain_lines_at_a_sensible_rate(tmp_path, capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    with make(tmp_path, total_steps=50, start_step=10) as log:
        for step in range(11, 51):
            clock[0] += 0.5
            log.progress(step, {"loss": 5.1234, "perplexity": 167.92, "words/s": 21034.4})
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "step 11/50  loss 5.123  perplexity 167.9  words/s 21034  eta 00:19"
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [*range(11, 48, 4), 50]


def test_on_a_terminal_progress_is_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics.sys.stderr, "isatty", lambda: True)
    with make(tmp_path, start_step=4) as log:
        for step in range(5, 11):
            log.progress(step, {"loss": 5.1234})
    last = capsys.readouterr().err.split("\r")[-1]
    assert "step 10/10 |" in last and "loss 5.123  eta" in last


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", ["offline", "online"])  # online without a login is offline
def test_the_wandb_log_holds_the_config_and_the_same_curves(tmp_path, capfd, mode):
    with make(tmp_path, wandb_mode=mode) as log:
        for step in range(600):  # more than one block of the log
            log.log(step, values(step) | {"train/perplexity": math.exp(step)})
        log.log(600, {"train/loss": math.inf})
        log.log(600, {"valid/loss": 2.5})
    assert capfd.readouterr() == ("", "")
    run_id, config, history = wandb_log(tmp_path)
    assert run_id == log.wandb_id
    assert {key: config[key] for key in CONFIG} == CONFIG
    curves: dict[int, dict] = {}
    for line in read_metrics(tmp_path):
        curves.setdefault(line["step"], {}).update({k: v for k, v in line.items() if isinstance(v, float)})
    logged = {line["_step"]: {k: float(v) for k, v in line.items() if not k.startswith("_")} for line in history}
    assert logged == curves
    assert len(curves) == 601


@pytest.mark.timeout(120)
def test_a_resumed_run_keeps_its_wandb_id(tmp_path):
    with make(tmp_path, wandb_mode="offline", wandb_id="abcd1234", start_step=2) as log:
        log.log(3, values(3))
    assert log.wandb_id == "abcd1234"
    assert wandb_log(tmp_path)[0] == "abcd1234"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("broken", [(wandb, "init"), (wandb, "login"), (wandb.Run, "log"), (wandb.Run, "finish")])
def test_a_failing_wandb_is_one_warning(tmp_path, capsys, monkeypatch, broken):
    def fail(*_, **__):
        raise RuntimeError("wandb is broken")

    monkeypatch.setattr(*broken, fail)
    with make(tmp_path, wandb_mode="online") as log:
        for step in range(5):
            log.log(step, values(step))
    assert len(read_metrics(tmp_path)) == 5
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: wandb is off") and "wandb is broken" in warning


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("backlog", "reason"), [(100, "does not finish"), (3, "lies 3 lines behind")])
def test_a_stuck_wandb_does_not_hold_the_run_up(tmp_path, capsys, monkeypatch, backlog, reason):
    monkeypatch.setattr(metrics, "_WANDB_INIT_SECONDS", 0.2)
    monkeypatch.setattr(metrics, "_WANDB_FINISH_SECONDS", 0.2)
    monkeypatch.setattr(metrics, "_WANDB_QUEUE", backlog)
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
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: wandb is off") and reason in warning


def write_run(run: pathlib.Path, layers: dict[str, list[float]], evaluate: bool = True) -> None:
    with make(run) as log:
        for step in range(1, 11):
            loads = {f"moe/{layer}/load": load for layer, load in layers.items()}
            log.log(step, {"train/loss": 9 / step, "train/perplexity": math.exp(9 / step), **loads})
            if evaluate and step % 5 == 0:
                log.log(step, {"valid/loss": 10 / step, "valid/perplexity": math.exp(10 / step)})


def picture(path: pathlib.Path):
    """Returns the pixels of a PNG, of shape [height, width, 4] in 0..1."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return matplotlib.image.imread(path)


def test_report_draws_every_curve(tmp_path):
    write_run(tmp_path, {"1": [1, 1, 1, 1], "block/3": [4, 0, 0, 0]})
    paths = report.write_report(tmp_path)
    assert [path.name for path in paths] == ["loss.png", "perplexity.png", "load_1.png", "load_block_3.png"]
    assert {path.parent for path in paths} == {tmp_path / "report"}
    pixels = [picture(path) for path in paths]
    assert all(pixel.shape == (600, 1080, 4) for pixel in pixels)

    def share(pixel, red, green, blue) -> float:
        return float((abs(pixel[..., :3] - [red, green, blue]).max(axis=-1) < 0.1).mean())

    for curves in pixels[:2]:
        assert share(curves, 0.12, 0.47, 0.71) > 1e-3  # train
        assert share(curves, 1.0, 0.5, 0.05) > 1e-3  # valid
    balanced, unbalanced = pixels[2:]
    assert share(balanced, 0.02, 0.19, 0.38) < 0.05
    assert share(unbalanced, 0.02, 0.19, 0.38) > 0.4  # three of four experts get nothing
    assert share(unbalanced, 0.4, 0.0, 0.12) > 0.1  # one gets four times the mean


def test_report_copes_without_layers_or_evaluation(tmp_path):
    write_run(tmp_path, {}, evaluate=False)
    paths = report.write_report(tmp_path)
    assert [path.name for path in paths] == ["loss.png", "perplexity.png"]
    assert all(picture(path).std() > 0 for path in paths)


@pytest.mark.filterwarnings("error")
def test_report_copes_with_one_line_of_loads_and_with_a_lost_run(tmp_path):
    with make(tmp_path) as log:
        log.log(1, {"moe/1/load": [0.0, 0.0]})
    assert len(report.write_report(tmp_path)) == 3
    with make(tmp_path) as log:
        log.log(1, {"train/loss": math.nan, "train/perplexity": math.inf})
    assert len(report.write_report(tmp_path)) == 2


def test_report_of_a_run_without_metrics_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no metrics file"):
        report.write_report(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(report.sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: metrics file .*metrics\.jsonl is empty") as end:
        report.main()
    assert "\n" not in str(end.value)
