"""Finds the checkpoint to resume a run from."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_dist.checkpoint import manifest
from moe_dist.checkpoint.format import read_state
from moe_dist.distributed.collectives import run_on_main
from moe_dist.distributed.mesh import Mesh
from moe_dist.monitoring.console import print_on_main
from moe_dist.monitoring.metrics_file import read_metrics
from moe_dist.training.run_spec import RunSpec


@dataclass(frozen=True)
class Resume:
    """The checkpoint to resume a run from, if there is one.

    Attributes:
        checkpoint: The newest complete checkpoint; None for a run that begins.
        refused: Newer, damaged checkpoints, with the reasons.
        state: The checkpoint's JSON state (`checkpoint.format`).
    """

    checkpoint: Path | None = None
    refused: dict[Path, str] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=lambda: {"step": 0})

    @property
    def step(self) -> int:
        """Returns the number of finished steps."""
        return self.state["step"]

    @property
    def metadata(self) -> dict[str, Any] | None:
        """Returns the task's and data's checkpoint metadata, None for a run that begins."""
        return self.state if self.checkpoint else None

    def has_finished(self, spec: RunSpec) -> bool:
        """Returns True if no step is left."""
        return self.step >= spec.config.steps


def find_checkpoint(spec: RunSpec, mesh: Mesh) -> Resume:
    """Finds the newest complete checkpoint, and prints the refused ones. A collective.

    Args:
        spec: The run.
        mesh: The ranks; they share the file reads.

    Returns:
        The checkpoint with its state, and the newer, refused ones. There is no checkpoint for a new
        run, or for --resume auto if the folder has none.

    Raises:
        ValueError: On every rank, no checkpoint is complete, or no step is left to train.
    """
    source_run = spec.source_run
    if source_run is None:
        return Resume()
    if spec.auto_resume and not run_on_main(lambda: manifest.list_checkpoints(source_run)):
        return Resume()
    checkpoint, refused = manifest.newest_complete(source_run, mesh.checkpoint_group)
    for reason in refused.values():
        print_on_main(f"warning: {reason}. Refused; using {checkpoint.name}", sys.stderr)
    resume = Resume(checkpoint, refused, read_state(checkpoint))
    finished = resume.has_finished(spec)
    message = f"{source_run}: has done {resume.step} steps"
    message += (
        f", and steps={spec.config.steps} is fewer"
        if spec.config.steps < resume.step
        else ", all of them"
    )
    message += "; --set steps=N with more steps continues it"
    if spec.auto_resume:
        print_on_main(f"note: {message}" if finished else f"goes on from {checkpoint}")
    elif finished and not spec.evaluate:
        raise ValueError(message)
    return resume


def last_training_loss(spec: RunSpec) -> dict[str, float]:
    """Returns {"train/loss": value} from a resumed run's last line, or {}. A collective."""

    def read() -> dict[str, float]:
        if spec.source_run is None:
            return {}
        try:
            lines = read_metrics(spec.source_run)
        except (ValueError, OSError):
            return {}
        for line in reversed(lines):
            if "train/loss" in line:
                return {"train/loss": line["train/loss"]}
        return {}

    return run_on_main(read)
