"""Kills (-9) of a random rank or agent in a random phase of a random step: what comes of the run.

    .venv/bin/python experiments/faults.py                30 runs, 15 minutes on two cores; status 1 where one is off
    .venv/bin/python experiments/faults.py --runs 3

Each run is one `launch/multinode.sh` with two ranks, a checkpoint every 5 of its 20 steps, and one kill (`chaos` of the
config, which finds the phase): RESTARTS=1 is all that helps it. It holds when the run ends by itself with the losses of
the unbroken run in every step (1e-5, at a learning rate of 1e-4), and has gone on from the newest checkpoint that was
whole when the kill came.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.elastic import Nodes, alone, losses

STEPS, SAVE_EVERY, RANKS = 20, 5, 2
PHASES = ("forward", "dispatch", "backward", "step", "save")
VICTIMS = {"kill": "rank", "kill_agent": "agent"}  # fault of a config -> who dies of it
SETS = (
    "optim.lr=1e-4", "optim.warmup_steps=1", f"steps={STEPS}", f"save_every={SAVE_EVERY}", "log_every=1",
    "eval_every=1000", "report=false", "wandb.mode=off",
)  # fmt: skip


@dataclass(frozen=True)
class Kill:
    fault: str
    rank: int
    step: int
    phase: str

    @property
    def whole(self) -> int:
        """The step of the newest whole checkpoint when it comes."""
        return (self.step - 1) // SAVE_EVERY * SAVE_EVERY


@dataclass(frozen=True)
class Outcome:
    kill: Kill
    status: int
    after: int | None  # the step that it went on from; None where it was not started twice
    off: float  # the largest difference of a loss
    seconds: float

    @property
    def holds(self) -> bool:
        return self.status == 0 and self.after == self.kill.whole and self.off <= 1e-5


def draw(number: int, seed: int = 0) -> list[Kill]:
    """Every phase as often, with as many agents as ranks."""
    rng = random.Random(seed)
    kills = []
    for i in range(number):
        phase, fault = PHASES[i % len(PHASES)], list(VICTIMS)[i // len(PHASES) % len(VICTIMS)]
        step = rng.randrange(SAVE_EVERY, STEPS + 1, SAVE_EVERY) if phase == "save" else rng.randint(1, STEPS)
        kills.append(Kill(fault, rng.randrange(RANKS), step, phase))
    return kills


def survive(kill: Kill, folder: Path, whole: dict[int, float], name: str, *sets: str) -> Outcome:
    """One run in a folder of its own. `whole`: losses of the unbroken run, by step."""
    chaos = [f"chaos.{key}={value}" for key, value in asdict(kill).items()]
    began = time.monotonic()
    with Nodes(folder, name, RANKS, *sets, *chaos) as nodes:
        nodes.environment |= {"NODES": "1", "RESTARTS": "1"}
        nodes.start()
        (status,) = nodes.end(timeout=180)
    found = losses(folder)
    off = max(abs(found[step] - whole[step]) for step in whole) if found.keys() == whole.keys() else float("inf")
    starts = nodes.starts()
    after = starts[1][1] if len(starts) == 2 and (folder / "chaos").exists() else None
    return Outcome(kill, status, after, off, time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--config", default="lstm_moe_demo")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="more of the config")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the outcomes there")
    args = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="faults-"))
    whole = alone(base / "whole", args.config, *SETS, *args.set)
    print(f"{'':>4}{'killed':>10}{'step':>6}{'phase':>11}{'went on after':>15}{'loss is off by':>17}{'seconds':>9}")
    outcomes = []
    for i, kill in enumerate(draw(args.runs), 1):
        folder = base / f"{i:02d}"
        outcomes.append(outcome := survive(kill, folder, whole, args.config, *SETS, *args.set))
        who = f"{VICTIMS[kill.fault]} {kill.rank}" if kill.fault == "kill" else VICTIMS[kill.fault]
        print(
            f"{i:>4}{who:>10}{kill.step:>6}{kill.phase:>11}{outcome.after!s:>15}{outcome.off:>17.1e}"
            f"{outcome.seconds:>9.0f}" + ("" if outcome.holds else f"   does not hold: {folder}.log"), flush=True,
        )  # fmt: skip
    good = sum(outcome.holds for outcome in outcomes)
    print(f"{good} of {len(outcomes)} hold; largest difference {max(outcome.off for outcome in outcomes):.1e}")
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    sys.exit(good < len(outcomes))


if __name__ == "__main__":
    main()
