"""Trains a named config: config -> mesh -> task -> parallelize -> engine -> the loop.

    python train.py --list
    python train.py lstm_moe_demo
    python train.py lstm_moe_demo --dry-run
    python train.py lstm_moe_demo --profile
    torchrun --nproc-per-node 2 train.py lstm_moe_demo --set mesh.ep=2
    torchrun --nproc-per-node 2 train.py lstm_moe_demo --set zero_stage=3 --set optim.lr=1e-3
    torchrun --nproc-per-node 2 train.py --resume runs/NAME
    torchrun ... train.py NAME --folder runs/NAME --resume auto
    python train.py --resume runs/NAME --grow 2
    python train.py --evaluate runs/NAME

--dry-run prints the layout and ends; --profile traces the third to fifth step; --resume auto begins
the run or continues it, for launchers that repeat the same command; --grow N starts a new run with
N experts for each.
It runs on CPU with gloo or on CUDA with NCCL.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from moe_dist.distributed import rendezvous_port

# before torch is imported: that takes seconds, in which another process could take the port
rendezvous_port.reserve()

from moe_dist.training.args import parse_args

if __name__ == "__main__":
    parse_args(sys.argv[1:], __doc__)  # answers --help, --list and a wrong argument without torch

from moe_dist.checkpoint.loader import load
from moe_dist.config.overrides import to_json
from moe_dist.config.schema import FaultInjectionConfig
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.preemption import EXIT_STATUS, GRACE_S
from moe_dist.monitoring.console import print_on_main
from moe_dist.monitoring.metric_keys import GRAD_NORM, LEARNING_RATE, SKIPPED_STEPS
from moe_dist.report import files as report_files
from moe_dist.training import fault_injection
from moe_dist.training.errors import plain_errors
from moe_dist.training.evaluate import evaluate, evaluate_test
from moe_dist.training.nan_detector import divergence_reason
from moe_dist.training.results import result_lines
from moe_dist.training.resume import Resume, find_checkpoint, last_training_loss
from moe_dist.training.run_directory import RunDirectory, open_run_directory
from moe_dist.training.run_spec import RunSpec, parse_run
from moe_dist.training.session import TrainingSession
from moe_dist.training.setup import Training, set_up
from moe_dist.training.step import train_step


def main(spec: RunSpec) -> None:
    """Sets up the run, trains or evaluates it, and exits."""
    with plain_errors():
        mesh = meshes.init_distributed(spec.config.mesh.ep, spec.config.mesh.timeout_s)
        resume = find_checkpoint(spec, mesh)
        training = set_up(
            spec.config,
            spec.ds_config,
            mesh,
            resume.metadata,
            resumed=resume.checkpoint is not None,
            explicit=spec.explicit_keys,
            allow_changed_data=spec.allow_changed_data,
            on_config=spec.print_changes,
        )
        spec = spec.with_config(training.config)
        if resume.checkpoint:
            load(resume.checkpoint, training.engine, training.task, mesh, spec.upcycling)
        only_evaluates = spec.evaluate or resume.has_finished(spec)
        directory = open_directory(spec, resume)
        if spec.config.fault_injection != FaultInjectionConfig() and not only_evaluates:
            is_new = resume.checkpoint is None
            fault_injection.inject(training, directory.path, is_new)

    trained_folder = None if only_evaluates else directory.path
    # a disk can fill up, and a gradient can be infinite
    with plain_errors(OSError, FloatingPointError, run=trained_folder):
        if only_evaluates:
            status = evaluate_only(spec, resume, training, directory)
        else:
            status = train(spec, resume, training, directory)
    sys.exit(status)


def open_directory(spec: RunSpec, resume: Resume) -> RunDirectory:
    """Opens the run folder and writes the files that describe the run. A collective."""
    files = {
        "config.json": to_json(spec.config),
        "layout.json": json.dumps(spec.layout_report, indent=2),
    }
    return open_run_directory(
        spec.folder,
        spec.config.name,
        files,
        read_only=spec.evaluate,
        wait_for_lock=spec.auto_resume,
        keep_files=resume.has_finished(spec),
    )


def train(spec: RunSpec, resume: Resume, training: Training, directory: RunDirectory) -> int:
    """Trains a run, prints its result and draws its report.

    Args:
        spec: The run.
        resume: The checkpoint from which it continues, if there is one.
        training: Model, task and engine, with initial or loaded weights.
        directory: The run folder, locked.

    Returns:
        The exit status: 0, `EXIT_STATUS` if SIGTERM ended it before its last step, or 1 if it
        diverged or its last checkpoint could not be written.
    """
    with TrainingSession(spec, resume, training, directory) as session:
        with session.recording():
            last_step, preempted = run_steps(session)
        return end_run(session, last_step, preempted)


def run_steps(session: TrainingSession) -> tuple[int, bool]:
    """Runs the training loop.

    Args:
        session: The run's services, entered.

    Returns:
        The number of the last step, and whether SIGTERM ended the loop before the run's last step.
    """
    config = session.spec.config
    step = session.resume.step
    preempted = False
    if session.spec.upcycling:
        session.save(step)  # --resume of the new run finds it
    while step < config.steps and not preempted:
        step += 1
        with session.accumulator.step():
            for _, sums, stats in train_step(session.training, step):
                session.accumulator.add(sums, stats)
        session.end_step()

        is_last = step == config.steps
        preempted = session.preemption.requested() and not is_last
        if step % config.log_every == 0 or is_last or preempted:
            log_step(session, step)
        if (step % config.eval_every == 0 or is_last) and not preempted:
            evaluate_step(session, step, is_last)
        if step % config.save_every == 0 or is_last or preempted:
            session.save(step)
    session.saver.finish()
    return step, preempted


def log_step(session: TrainingSession, step: int) -> None:
    """Writes a line of training metrics. A collective."""
    optimizer = session.training.engine.optimizer
    line: dict[str, Any] = dict(session.accumulator.reduce_and_reset())
    line[LEARNING_RATE] = optimizer.lr
    line[GRAD_NORM] = optimizer.norm
    line[SKIPPED_STEPS] = step - optimizer.updates
    line |= session.training.nan_detector.read_and_reset()
    session.metrics.log(step, line)
    session.last_metrics = line


def evaluate_step(session: TrainingSession, step: int, is_last: bool) -> None:
    """Evaluates the validation split, and the test splits after the last step. A collective."""
    training = session.training
    engine = training.engine
    task = training.task
    values = evaluate(engine, task, "valid", training.mesh) | task.weight_metrics(engine)
    session.metrics.log(step, values)
    if is_last:
        test_values = evaluate_test(engine, task, training.mesh)
        session.metrics.log(step, test_values)
        session.last_metrics |= test_values
    else:
        draw_loads = partial(report_files.write_report, session.folder, only_loads=True)
        session.metrics.log_images(step, draw_loads)


def end_run(session: TrainingSession, step: int, preempted: bool) -> int:
    """Prints the result, leaves the process group, and draws the report.

    Args:
        session: The run's services, entered.
        step: The number of the last step.
        preempted: Whether SIGTERM ended the loop before the run's last step.

    Returns:
        The exit status, as of `train`.
    """
    mesh = session.training.mesh
    folder = session.folder
    save_failed = session.saver.failed
    session.metrics.end_progress()
    if preempted:
        status = EXIT_STATUS
        outcome = "not saved" if save_failed else f"train.py --resume {folder} goes on"
        print_on_main(f"stopped after step {step} of {session.spec.config.steps}: {outcome}")
    else:
        diverged = print_result(session.spec, session.training, folder, session.last_metrics)
        status = 1 if diverged or save_failed else 0
        if save_failed:
            print_on_main("error: the last checkpoint could not be written", sys.stderr)
    meshes.shutdown()

    wandb_status = 0 if preempted else status  # a preempted run will continue

    def draw() -> None:
        """Draws the report, in this thread for wandb as well, and waits for wandb."""
        mesh.flight_recorder.enter_phase("report")
        if mesh.is_main and session.spec.config.write_report:
            files = report_files.try_to_write_all(folder)
            session.metrics.log_images(step, lambda: files)
        elif mesh.is_main:
            draw_loads = partial(report_files.write_report, folder, only_loads=True)
            session.metrics.log_images(step, draw_loads)
        mesh.flight_recorder.enter_phase("wandb")
        session.metrics.close(wandb_status)

    drawn = session.preemption.run_unless_preempted(draw)
    if not drawn and not preempted:
        print_on_main(
            f"note: ended by SIGTERM; python -m moe_dist.report {folder} draws the report"
        )
    session.metrics.close(wandb_status, GRACE_S)
    return status


def evaluate_only(
    spec: RunSpec, resume: Resume, training: Training, directory: RunDirectory
) -> int:
    """Evaluates the test splits of a trained run, and prints the result.

    Args:
        spec: The run.
        resume: The checkpoint that is evaluated.
        training: Model, task and engine, with the checkpoint's weights.
        directory: The run folder.

    Returns:
        The exit status: 0, or 1 if the run has diverged.
    """
    mesh = training.mesh
    test_values = evaluate_test(training.engine, training.task, mesh)
    values = last_training_loss(spec) | test_values
    diverged = print_result(spec, training, directory.path, values, num_steps=resume.step)
    meshes.shutdown()
    if mesh.is_main and spec.config.write_report and not spec.evaluate:
        report_files.try_to_write_all(directory.path)
    return int(diverged)


def print_result(
    spec: RunSpec,
    training: Training,
    folder: Path,
    values: dict[str, Any],
    num_steps: int | None = None,
) -> bool:
    """Prints the test metrics, and a warning if the run has diverged.

    Args:
        spec: The run.
        training: The trained model.
        folder: The run folder.
        values: The last training metrics and the test metrics by key.
        num_steps: Steps that were trained. None: all steps of the config.

    Returns:
        Whether the run has diverged, on every rank.
    """
    task = training.task
    if training.mesh.is_main:
        lines = result_lines(
            spec.config,
            folder,
            task.format_result(values),
            num_steps=spec.config.steps if num_steps is None else num_steps,
            num_updates=training.engine.optimizer.updates,
            baseline_is_explicit="baseline" in spec.explicit_keys,
        )
        print_on_main(lines)
    reason = divergence_reason(values, task.uniform_loss)
    if reason:
        print_on_main(
            f"warning: the run has diverged: {reason}; a lower optim.lr may help", sys.stderr
        )
    return bool(reason)


if __name__ == "__main__":
    main(parse_run(sys.argv[1:], __doc__))
