"""Nodes that leave and come back during a run: its losses beside those of an unbroken run.

    .venv/bin/python experiments/elastic.py            about 4 minutes on two cores; status 1 where a loss is off

Two nodes of two ranks on this machine, each a `launch/multinode.sh` with NODES=1:2. At step 10 the
second one is killed (-9), at 20 it comes back, at 30 it is told to stop (SIGTERM), at 40 it comes
back, and the run ends at 50. The unbroken run is one process. The demo, at a learning rate of 1e-4
from the first step.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from moe_dist.checkpoint import manifest
from moe_dist.distributed import rendezvous_port
from moe_dist.monitoring.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parent.parent
SETS = (
    "optim.lr=1e-4",
    "optim.warmup_steps=1",
    "log_every=1",
    "save_every=10",
    "eval_every=1000",
    "wandb.mode=off",
)
# keep-alives and the wait for more nodes, in seconds instead of torch's 15 and 30
RENDEZVOUS = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3"

# the scripts start this Python's torchrun
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


class Nodes:
    """Agents on this machine that share one run; what they print goes to FOLDER.log."""

    def __init__(self, folder: Path, name: str, ranks: int, *sets: str) -> None:
        self.environment = os.environ | {
            "NODES": "1:2",
            "NPROC_PER_NODE": str(ranks),
            "RDZV_ENDPOINT": f"localhost:{rendezvous_port.find_free_port()}",
            "RDZV_ID": folder.name,
            "CONFIG": name,
            "RESTARTS": "4",
            "ADDRESS": "localhost",
            "OMP_NUM_THREADS": "1",
            "PATH": PATH,
        }
        self.command = [
            str(ROOT / "launch" / "multinode.sh"),
            "--folder",
            str(folder),
            *set_(*sets),
        ]
        self.folder, self.log = folder, folder.with_name(f"{folder.name}.log")
        self.running: list[psutil.Popen] = []

    def start(self) -> psutil.Popen:
        with self.log.open("a") as log:
            # the first has the store, though each could here; each is in a process group of its
            # own, with its agent
            environment = self.environment | {
                "RDZV_CONF": f"{RENDEZVOUS},is_host={int(not self.running)}"
            }
            node = psutil.Popen(
                self.command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self.running.append(node)
        return node

    def kill(self, node: psutil.Popen) -> None:
        """At once, with its agent; no rank outlives that."""
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def join(self, others: psutil.Popen) -> psutil.Popen:
        """A node more; the ranks of the `others` are held meanwhile, for a start takes as long as
        many small steps.
        """
        ranks = [
            each for each in others.children(recursive=True) if each.cmdline()[1:2] == ["train.py"]
        ]
        for each in ranks:
            each.suspend()
        node = self.start()
        deadline = time.monotonic() + 60
        while not all(asked_to_stop(each) for each in ranks):  # their agent has seen the new one
            assert time.monotonic() < deadline and node.poll() is None, self.log.read_text()
            time.sleep(0.1)
        for each in ranks:
            each.resume()
        return node

    def reach(self, step: int, timeout: float = 120) -> None:
        """Waits for the checkpoint of `step` or a later one."""
        deadline = time.monotonic() + timeout
        while not any(
            path >= manifest.folder(self.folder, step)
            for path in manifest.list_checkpoints(self.folder)
        ):
            if time.monotonic() > deadline or not any(each.poll() is None for each in self.running):
                raise RuntimeError(
                    f"{self.folder}: step {step} not reached\n{self.log.read_text()}"
                )
            time.sleep(0.01)

    def end(self, timeout: float = 120) -> list[int]:
        """Statuses of all nodes that were started."""
        return [each.wait(timeout) for each in self.running]

    def starts(self) -> list[tuple[int, int]]:
        """(ranks, the step that they began after) of each start, in order."""
        found: list[tuple[int, int]] = []
        for ranks, step in re.findall(
            r"^ranks +(\d+) on|^goes on from .*step_(\d+)", self.log.read_text(), re.MULTILINE
        ):
            if ranks:
                found.append((int(ranks), 0))
            else:
                found[-1] = (found[-1][0], int(step))
        return found

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: Any) -> None:
        for each in self.running:
            if each.poll() is None:
                self.kill(each)


def set_(*assignments: str) -> list[str]:
    return [part for each in assignments for part in ("--set", each)]


def asked_to_stop(process: psutil.Process) -> bool:
    """Whether SIGTERM waits for a suspended process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return any(
        int(mask, 16) >> (signal.SIGTERM - 1) & 1
        for mask in re.findall(r"^S\w+Pnd:\s*(\w+)", status, re.M)
    )


def losses(folder: Path) -> dict[int, float]:
    """By step."""
    return {
        line["step"]: line["train/loss"] for line in read_metrics(folder) if "train/loss" in line
    }


def alone(folder: Path, name: str, *sets: str) -> dict[int, float]:
    """Losses of one process that nothing stops."""
    command = [sys.executable, "train.py", name, "--folder", str(folder), *set_(*sets)]
    subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    return losses(folder)


def coming_and_going(
    folder: Path, name: str, ranks: int, changes: tuple[int, ...], *sets: str
) -> Nodes:
    """At each of the `changes` (steps) the second node leaves or comes back; the first time it is
    killed, then it is
    told to stop."""
    with Nodes(folder, name, ranks, *sets) as nodes:
        first, second = nodes.start(), nodes.start()
        for i, step in enumerate(changes):
            nodes.reach(step)
            if i % 2:
                second = nodes.join(first)
            elif i == 0:
                nodes.kill(second)
            else:
                second.terminate()
                second.wait(60)
        nodes.end()
    return nodes


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no node behind
    shutil.rmtree(ROOT / "runs" / "elastic", ignore_errors=True)
    folder = ROOT / "runs" / "elastic"
    folder.mkdir(parents=True)
    sets = (*SETS, "steps=50")
    whole = alone(folder / "whole", "lstm_moe_demo", *sets)
    nodes = coming_and_going(folder / "broken", "lstm_moe_demo", 2, (10, 20, 30, 40), *sets)
    broken = losses(nodes.folder)
    assert whole.keys() == broken.keys() == set(range(1, 51)), "a step is missing"
    off = max(abs(whole[step] - broken[step]) for step in whole)
    print(f"(ranks, after step) of each start: {nodes.starts()}")
    print(f"statuses of the agents: {[each.returncode for each in nodes.running]}")
    print(
        f"largest difference of a loss over {len(whole)} steps: {off:.1e} (of {whole[50]:.4f} at "
        "the end)"
    )
    sys.exit(off > 1e-5)


if __name__ == "__main__":
    main()
