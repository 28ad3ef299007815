"""train.py as a user starts it: its command line in this process, or the whole program in processes
of its own.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from paths import ROOT

from moe_dist.training.run_spec import parse_run


def check_one_line(stderr: str, says: str) -> None:
    lines = [line for line in stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error") and says in lines[0], stderr


def check_plan(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_run(args, None)
    check_one_line(capsys.readouterr().err, says)
    assert exit_.value.code == 2


def set_(*assignments: str) -> list[str]:
    return [part for each in assignments for part in ("--set", each)]


def start(*args: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "MOE_DIST_JOIN_SECONDS": "20"} | environment
    command = [sys.executable, str(ROOT / "train.py"), *args]
    return subprocess.Popen(
        command,
        env=env,
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell's background jobs ignore SIGINT, and so would theirs
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def end(process: subprocess.Popen[str], timeout: float = 100) -> tuple[int, str]:
    """Waits for the process and returns (exit status, stderr)."""
    try:
        stderr = process.communicate(timeout=timeout)[1]
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in stderr, stderr
    return process.returncode, stderr


def ranks(port: int, *args: str, **environment: str) -> list[tuple[int, str]]:
    """Starts two ranks by hand and returns (exit status, stderr) of each."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | environment
    started = [start(*args, RANK=str(rank), LOCAL_RANK=str(rank), **world) for rank in range(2)]
    return [end(process) for process in started]


def train_forked(*args: str, timeout: float = 100) -> tuple[int, str, str]:
    """Runs train.py in a process that is forked with torch imported, which saves the seconds that a
    start takes.

    Returns (exit status, stdout, stderr). Fails when there is a traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = multiprocessing.get_context("forkserver").Process(
            target=_train, args=(args, *files)
        )
        process.start()
        try:
            process.join(timeout)
            assert process.exitcode is not None, f"not done after {timeout} s"
        finally:
            process.kill()
            process.join()
        stdout, stderr = (file.read_text() for file in files)
    assert "Traceback" not in stderr, stderr
    return process.exitcode, stdout, stderr


def _train(args: tuple[str, ...], stdout: Path, stderr: Path) -> None:
    for descriptor, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ |= {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    import train

    train.main(parse_run(list(args), train.__doc__))
