"""Losses and gradient norms of the first 20 steps of each demo, to compare two commits bit by bit.

    .venv/bin/python experiments/kept_losses.py --write before.json       about 4 minutes on two cores
    .venv/bin/python experiments/kept_losses.py --compare before.json     on another commit, on the same machine

A CPU chooses its kernels by its instruction set, so files of two machines are not comparable. Each
demo runs on one rank and on two, with seed 0; the exit status is 1 where any number differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20
# the name of a case -> the config and its overrides
CASES = {
    "flat": ("lstm_moe_demo", ()),
    "hierarchical": ("lstm_moe_demo", ("model.moe.num_groups=8", "model.moe.k=2")),
    "sampled": ("lstm_moe_demo", ("model.softmax_samples=500",)),
    "images": ("widenet_demo", ()),
    "texts": ("widenet_text_demo", ()),
    "pretraining": ("widenet_pretraining_demo", ()),
}
LAYOUTS = {
    "1 rank": (1, ()),
    "2 ranks": (2, ("mesh.ep=2",)),
    "2 ranks, ZeRO 2": (2, ("mesh.ep=2", "zero_stage=2")),
}
KEYS = ("train/loss", "train/grad_norm")


def run(config: str, sets: tuple[str, ...], ranks: int) -> list[list[float]]:
    """Trains `STEPS` steps and returns the values of `KEYS` of each step."""
    sets = (*sets, f"steps={STEPS}", "log_every=1", "write_report=false", "wandb.mode=off")
    with tempfile.TemporaryDirectory() as folder:
        options = [option for each in sets for option in ("--set", each)]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ]
        command += ["train.py", config, "--folder", folder, *options]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(
                f"{config} on {ranks} ranks ended with "
                f"{done.returncode}:\n{done.stdout}{done.stderr}"
            )
        lines = [
            json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()
        ]
    return [[line[key] for key in KEYS] for line in lines if KEYS[0] in line]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="writes the numbers as JSON")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="compares with numbers written before"
    )
    args = parser.parse_args()
    before = json.loads(args.compare.read_text()) if args.compare else {}
    found: dict[str, list[list[float]]] = {}
    differing = []
    for case, (config, sets) in CASES.items():
        for layout, (ranks, more) in LAYOUTS.items():
            name = f"{case}, {layout}"
            found[name] = run(config, (*sets, *more), ranks)
            outcome = f"last loss {found[name][-1][0]!r}"
            if args.compare:
                same = found[name] == before.get(name)
                outcome += ", equal bit by bit" if same else ", DIFFERS"
                differing += [] if same else [name]
            print(f"{name}: {len(found[name])} steps, {outcome}", flush=True)
    if args.write:
        args.write.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(f"{len(differing)} of {len(found)} cases differ" if differing else 0)


if __name__ == "__main__":
    main()
