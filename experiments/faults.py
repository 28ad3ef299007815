"""Signals to a random rank or agent at a random moment of a run: SIGKILL, SIGTERM and SIGSTOP, and
their results.

    .venv/bin/python experiments/faults.py              30 runs, 30 minutes on two cores; status 1 where one is off
    .venv/bin/python experiments/faults.py --runs 3

Each run is one `launch/multinode.sh` with two ranks and RESTARTS=1, a checkpoint every 5 of its 20
steps and an evaluation every 10. `fault_injection` in the config stops a rank where a phase begins; it gets
the signal there, or is continued and gets it up to a second later. The phases are the start, those
of a step, evaluation, saving, the report and the end of wandb. A rank that is stopped for good is
ended by torchrun; one that pauses goes on. Where SIGTERM to the agent ends a run, which then has
status 1, the same command is started again.

A run holds when it ends with status 0, its result is printed, the losses of every step are those of
the unbroken run (1e-5, at a learning rate of 1e-4), the last checkpoint is whole, the report is
drawn, no file is half written, and it has gone on from the newest checkpoint that was whole.
"""

import argparse
import contextlib
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.elastic import Nodes, alone, losses
from moe_dist.checkpoint import manifest
from moe_dist.config.run_folder import PARTIAL

STEPS, SAVE_EVERY, RANKS = 20, 5, 2
OF_A_STEP = ("forward", "dispatch", "backward", "step", "evaluation", "save")
AT_THE_END = ("report", "wandb")
PHASES = ("start", *OF_A_STEP, *AT_THE_END)
FAULTS = ("kill", "kill_agent", "terminate", "terminate_agent", "stop", "pause")
EVALUATE_EVERY = 10
SETS = (
    "optim.lr=1e-4",
    "optim.warmup_steps=1",
    f"steps={STEPS}",
    f"save_every={SAVE_EVERY}",
    "log_every=1",
    f"eval_every={EVALUATE_EVERY}",
    "write_report=true",
    "wandb.mode=offline",
    "mesh.timeout_s=6",
)


@dataclass(frozen=True)
class Fault:
    fault: str
    rank: int
    step: int
    phase: str
    seconds: float = 0.0  # after the phase has begun, or the run, until the signal

    @property
    def whole(self) -> int:
        """The step of the newest whole checkpoint when the phase begins."""
        return STEPS if self.phase in AT_THE_END else (self.step - 1) // SAVE_EVERY * SAVE_EVERY


@dataclass(frozen=True)
class Outcome:
    fault: Fault
    status: int
    after: int | None  # the step that it went on from; None where it was not started twice
    off: float  # the largest difference of a loss
    missing: list[str]  # files that should be there or not, and lines
    seconds: float

    @property
    def holds(self) -> bool:
        if self.status != 0 or self.off > 1e-5 or self.missing:
            return False
        if self.fault.fault == "pause":
            return self.after is None
        if self.fault.phase == "start" or self.after is None:
            # a run that has done all its steps when the signal comes need not be started again
            return self.fault.phase == "start" or self.fault.step == STEPS or self.fault.seconds > 0
        first = (
            self.fault.step if self.fault.fault.startswith("terminate") else self.fault.whole
        )  # SIGTERM saves
        return (
            self.after == first
            if self.fault.seconds == 0 and first == self.fault.whole
            else self.after >= first
        )


def draw(number: int, seed: int = 0) -> list[Fault]:
    """Every phase as often, and every fault; half of the signals come as soon as the phase has
    begun.
    """
    rng = random.Random(seed)
    faults = []
    for i in range(number):
        phase, fault = PHASES[i % len(PHASES)], FAULTS[(i + i // len(PHASES)) % len(FAULTS)]
        if fault == "stop" and phase in ("start", *AT_THE_END):
            fault = "pause"  # nobody waits for this rank
        every = {"save": SAVE_EVERY, "evaluation": EVALUATE_EVERY}.get(phase, 1)
        step = STEPS if phase in AT_THE_END else rng.randrange(every, STEPS + 1, every)
        seconds = rng.uniform(0, 8) if phase == "start" else rng.choice((0.0, rng.uniform(0, 1)))
        faults.append(Fault(fault, rng.randrange(RANKS), step, phase, round(seconds, 2)))
    return faults


def survive(fault: Fault, folder: Path, whole: dict[int, float], name: str, *sets: str) -> Outcome:
    """One run in a folder of its own. `whole`: losses of the unbroken run, by step."""
    began = time.monotonic()
    if fault.phase != "start":
        sets += (
            "fault_injection.fault=stop",
            f"fault_injection.rank={fault.rank}",
            f"fault_injection.step={fault.step}",
            f"fault_injection.phase={fault.phase}",
        )
    with Nodes(folder, name, RANKS, *sets) as nodes:
        nodes.environment |= {"NODES": "1", "RESTARTS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "30"}
        node = nodes.start()
        strike(fault, node, folder)
        status = node.wait(300)
        if fault.fault == "terminate_agent" and status != 0:
            status = nodes.start().wait(300)
    found = losses(folder)
    off = (
        max(abs(found[step] - whole[step]) for step in whole)
        if found.keys() == whole.keys()
        else float("inf")
    )
    starts, log = nodes.starts(), nodes.log.read_text()
    after = starts[1][1] if len(starts) == 2 else None
    if f"has done {STEPS} steps, all of them" in log:
        after = STEPS
    return Outcome(fault, status, after, off, missing(folder, log), time.monotonic() - began)


def strike(fault: Fault, node: psutil.Popen, folder: Path) -> None:
    """Waits for the moment, and sends the signal."""
    ranks = wait_for(lambda: ranks_of(node), node)
    rank = ranks[fault.rank]
    if fault.phase != "start":
        wait_for(
            lambda: (
                (folder / "fault_injection").exists() and rank.status() == psutil.STATUS_STOPPED
            ),
            node,
        )
        if fault.seconds:
            rank.resume()
    victim = rank.parent() if fault.fault.endswith("_agent") else rank
    time.sleep(fault.seconds)
    with contextlib.suppress(psutil.NoSuchProcess):  # it may have done all its steps
        if fault.fault.startswith("kill"):
            victim.kill()
        elif fault.fault.startswith("terminate"):
            victim.terminate()
            rank.resume()
        else:
            rank.suspend()
        if fault.fault == "pause":
            time.sleep(2)
            rank.resume()


def ranks_of(node: psutil.Popen) -> dict[int, psutil.Process]:
    """Those of a launch script, by number, when all are there."""
    found = {}
    for each in node.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if each.cmdline()[1:2] == ["train.py"] and each.parent().cmdline()[1:2] != ["train.py"]:
                found[int(each.environ()["RANK"])] = each
    return found if len(found) == RANKS else {}


def wait_for(condition: Callable[[], Any], node: psutil.Popen) -> Any:
    deadline = time.monotonic() + 180
    while not (value := condition()):
        if time.monotonic() > deadline or node.poll() is not None:
            raise RuntimeError("the moment of the fault never came")
        time.sleep(0.02)
    return value


def missing(folder: Path, log: str) -> list[str]:
    """What a run that has ended should have, or should not have, by name."""
    found = []
    newest, refused = manifest.newest_complete(folder)
    if newest != manifest.folder(folder, STEPS) or refused:
        found.append(f"whole checkpoint of step {STEPS}")
    if (
        not (folder / "report.html").is_file()
        and json.loads((folder / "config.json").read_text())["write_report"]
    ):
        found.append("report.html")
    found += [f"no {path.name}" for path in folder.rglob(f"{PARTIAL}*")]
    for picture in folder.glob("report/*.png"):
        if not picture.read_bytes().endswith(b"IEND\xaeB`\x82"):
            found.append(f"a whole {picture.name}")
    if "test perplexity" not in log:
        found.append("the result")
    if re.search(
        r'File "[^"]*(/train\.py|/moe_dist/[^"]*)", line', log
    ):  # torchrun's own are not ours
        found.append("no traceback")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", default="lstm_moe_demo")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="more of the config"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the outcomes there")
    args = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="faults-"))
    whole = alone(base / "whole", args.config, *SETS, *args.set)
    print(
        f"{'':>4}{'fault':>17}{'rank':>6}{'step':>6}{'phase':>12}{'after':>7}{'went on after':>15}"
        f"{'loss is off by':>17}{'seconds':>9}"
    )
    outcomes = []
    for i, fault in enumerate(draw(args.runs, args.seed), 1):
        folder = base / f"{i:02d}"
        outcomes.append(outcome := survive(fault, folder, whole, args.config, *SETS, *args.set))
        wrong = (
            ""
            if outcome.holds
            else f"   does not hold: {folder}.log, status {outcome.status}; {outcome.missing}"
        )
        print(
            f"{i:>4}{fault.fault:>17}{fault.rank:>6}{fault.step:>6}{fault.phase:>12}{fault.seconds:>7}"
            f"{outcome.after!s:>15}{outcome.off:>17.1e}{outcome.seconds:>9.0f}{wrong}",
            flush=True,
        )
    good = sum(outcome.holds for outcome in outcomes)
    print(
        f"{good} of {len(outcomes)} hold; largest difference "
        f"{max(outcome.off for outcome in outcomes):.1e}"
    )
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    sys.exit(good < len(outcomes))


if __name__ == "__main__":
    main()
