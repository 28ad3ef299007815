"""SIGTERM after the last step of a run: the result is printed and the exit status is 0."""

import contextlib
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import set_
from runs import TINY

from moe_dist.distributed.preemption import GRACE_S, PreemptionHandler
from moe_dist.distributed.spawn import run_distributed
from moe_dist.monitoring import metrics_logger, wandb_logger
from moe_dist.monitoring.metrics_logger import MetricsLogger
from moe_dist.report import files as report_files
from moe_dist.training.run_spec import parse_run


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """Restores the signal handler of the test process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def after(seconds: float) -> threading.Timer:
    """Sends SIGTERM to this process after some seconds."""
    timer = threading.Timer(seconds, sigterm)
    timer.start()
    return timer


@pytest.mark.parametrize("when", [0.0, 0.2])
def test_optional_work_is_ended_by_sigterm(when: float) -> None:
    """At its start, or while it waits; a second SIGTERM does nothing."""
    began, done = time.monotonic(), []

    def work() -> None:
        after(when) if when else sigterm()
        time.sleep(30)
        done.append(1)

    with PreemptionHandler(None) as stop:  # type: ignore[arg-type]
        assert not stop.run_unless_preempted(work) and stop.received
        sigterm()
    sigterm()
    assert time.monotonic() - began < 10 and not done


def test_optional_work_is_skipped_only_after_sigterm() -> None:
    done = []
    with PreemptionHandler(None) as stop:  # type: ignore[arg-type]
        assert stop.run_unless_preempted(lambda: done.append(1)) and done == [1]
        sigterm()  # too late to matter
    with PreemptionHandler(None) as stop:  # type: ignore[arg-type]
        sigterm()
        assert not stop.run_unless_preempted(lambda: done.append(2)) and done == [1]


def test_error_in_optional_work_is_raised() -> None:
    with pytest.raises(RuntimeError, match="no ink"), PreemptionHandler(None) as stop:  # type: ignore[arg-type]

        def work() -> None:
            raise RuntimeError("no ink")

        stop.run_unless_preempted(work)


def stuck(self: Any) -> None:
    threading.Event().wait(60)


def test_hanging_wandb_is_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once after SIGTERM; otherwise, also if the run fails, within the grace period of
    launchers."""
    monkeypatch.setattr(wandb_logger.WandbLogger, "run", stuck)
    monkeypatch.setattr(metrics_logger, "_FAILED_CLOSE_TIMEOUT_S", 0.3)

    def log() -> MetricsLogger:
        return MetricsLogger(tmp_path, {}, enabled=True, wandb_mode="offline", total_steps=1)

    def seconds(work: Callable[[], Any]) -> float:
        began = time.monotonic()
        work()
        return time.monotonic() - began

    with PreemptionHandler(None) as stop:  # type: ignore[arg-type]
        each = log()
        after(0.3)
        assert seconds(lambda: stop.run_unless_preempted(each.close)) < 8 and stop.received
        assert seconds(each.close) < 0.1, "it is closed"
    each = log()
    assert 0.3 < seconds(lambda: each.close(0, 0.3)) < 8

    def fail() -> None:
        with contextlib.suppress(FloatingPointError), log():
            raise FloatingPointError

    assert seconds(fail) < 8
    assert GRACE_S < 10


@pytest.mark.timeout(200)
def test_finished_run_exits_with_0_after_sigterm(small_text: Path, tmp_path: Path) -> None:
    """SIGTERM arrives while the run draws its report, and wandb hangs."""
    ((status, out, seconds),) = run_distributed(
        finishes, 1, str(small_text), tmp_path / "run", timeout=180
    )
    assert status == 0 and seconds < 2 * GRACE_S + 5
    assert out.count("test perplexity") == 1 and f"run folder: {tmp_path}/run" in out
    assert "note: ended by SIGTERM; python -m moe_dist.report" in out
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]


def finishes(text: str, folder: Path) -> tuple[int, str, float]:
    """Returns the status, the output, and the seconds after the SIGTERM."""
    import train

    began = []

    def draws(run: Path) -> None:
        began.append(time.monotonic())
        sigterm()
        time.sleep(60)

    report_files.try_to_write_all = draws
    wandb_logger.WandbLogger.run = stuck  # type: ignore[method-assign]
    sets = (
        *TINY,
        "steps=2",
        f"data.text={text}",
        "write_report=true",
        "wandb.mode=offline",
        "baseline=none",
    )
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            train.main(parse_run(["lstm_moe_demo", "--folder", str(folder), *set_(*sets)], None))
        except SystemExit as end:
            status = end.code
    return int(status or 0), out.getvalue(), time.monotonic() - began[0]
