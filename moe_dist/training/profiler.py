"""Traces a few training steps with torch's profiler, a file for each rank: train.py --profile.

A trace has the ranges from `monitoring.step_timer`, named by layer and marked "(backward)" in
backward, and the ranges from `training.step.train_step`: data, forward, and backward with the
update.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from moe_dist.config import run_folder
from moe_dist.distributed.mesh import Mesh

SKIPPED_STEPS = 2  # the first steps are slower
TRACED_STEPS = 3


@contextlib.contextmanager
def profile_steps(folder: Path, mesh: Mesh, enabled: bool) -> Iterator[Callable[[], None]]:
    """Traces this process's third to fifth step to folder/profile/rank*.json.gz.

    A run with fewer steps has a shorter trace, or none.

    Args:
        folder: The run folder.
        mesh: The ranks.
        enabled: If False, traces nothing.

    Yields:
        A function to call after each step.
    """
    if not enabled:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)

    def write(trace: profile) -> None:
        _write(trace, folder, mesh)

    steps = schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=TRACED_STEPS, repeat=1)
    mesh.step_timer.annotate_profile = True
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as trace:
        yield trace.step


def _write(trace: profile, folder: Path, mesh: Mesh) -> None:
    """Writes this rank's trace; if it cannot be written, prints a warning and the run continues."""
    name = f"profile/rank{mesh.dp.index}.json.gz"
    mesh.step_timer.annotate_profile = False
    try:
        with run_folder.atomic_write(folder, name) as file:
            trace.export_chrome_trace(file.name)
    except OSError as error:
        warning = f"warning: {folder / name} cannot be written ({error.strerror})"
        print(warning, file=sys.stderr, flush=True)
        return
    if mesh.is_main:
        files = f"{folder}/profile/rank*.json.gz"
        print(f"profile: {files} (open one in ui.perfetto.dev or chrome://tracing)", flush=True)
