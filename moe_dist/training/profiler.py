"""A trace of a few training steps by torch's profiler, a file for each rank: train.py --profile.

Its ranges are those of `clock`, with the layer in their name and "(backward)" where they are of backward, and those of
`training.train_step`: data, forward, and backward with the update.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from moe_dist.config import run_folder
from moe_dist.distributed.mesh import Mesh

BEFORE, STEPS = 2, 3  # steps that are not traced, for the first ones differ, and that are


@contextlib.contextmanager
def profile_steps(folder: Path, mesh: Mesh, wanted: bool) -> Iterator[Callable[[], None]]:
    """Gives what is to be called after each step. The third to fifth step of this process are traced, where they are
    `wanted`, to folder/profile/rank*.json.gz, which the main rank says; a run that ends before has a shorter trace, or
    none."""
    if not wanted:
        yield lambda: None
        return
    name = f"profile/rank{mesh.dp.index}.json.gz"

    def write(trace: profile) -> None:
        mesh.step_timer.annotate_profile = False
        try:
            with run_folder.atomic_write(folder, name) as file:
                trace.export_chrome_trace(file.name)
        except OSError as error:  # a full disk costs the trace, not the run
            print(
                f"warning: {folder / name} cannot be written ({error.strerror})",
                file=sys.stderr,
                flush=True,
            )
            return
        if mesh.is_main:
            files = f"{folder}/profile/rank*.json.gz"
            print(f"profile: {files} (open one in ui.perfetto.dev or chrome://tracing)", flush=True)

    activities = [
        ProfilerActivity.CPU,
        *([ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
    ]
    plan = schedule(wait=BEFORE - 1, warmup=1, active=STEPS, repeat=1)
    mesh.step_timer.annotate_profile = True
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as trace:
        yield trace.step
