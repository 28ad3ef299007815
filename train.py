"""Trains a named config: config -> mesh -> task -> parallelize -> engine -> the loop.

    python train.py --list                                                    names of configs
    python train.py lstm_moe_demo                                             one process
    torchrun --nproc-per-node 2 train.py lstm_moe_demo --set mesh.ep=2        two ranks, experts spread over both
    torchrun --nproc-per-node 2 train.py lstm_moe_demo --set zero_stage=3 --set optim.lr=1e-3
    python train.py lstm_moe_demo --dry-run                                   the layout, and nothing else
    python train.py lstm_moe_demo --profile                                   with a trace of its third to fifth step
    torchrun --nproc-per-node 2 train.py --resume runs/NAME                   goes on where the run stopped
    torchrun ... train.py NAME --folder runs/NAME --resume auto               begins, or goes on: for launch/
    python train.py --resume runs/NAME --grow 2                               with two experts for each, as a new run
    python train.py --evaluate runs/NAME                                      test metrics of its newest checkpoint

CPU with gloo or CUDA with NCCL, whatever is there.
"""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from moe_dist.distributed import rendezvous_port

rendezvous_port.reserve()  # before torch is imported: that takes seconds, in which another process may get the port

from moe_dist.training import args as training_args

if __name__ == "__main__":  # for what is answered here torch is not imported
    training_args.parse_args(sys.argv[1:], __doc__)

from moe_dist.checkpoint.distributed import Saver, load
from moe_dist.config.overrides import to_json
from moe_dist.config.schema import FaultInjectionConfig
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.collectives import barrier_without_timeout
from moe_dist.distributed.preemption import EXIT_STATUS, GRACE_S, PreemptionHandler
from moe_dist.monitoring.console import print_on_main
from moe_dist.monitoring.metric_keys import GRAD_NORM, LEARNING_RATE, SKIPPED_STEPS
from moe_dist.monitoring.metrics_logger import MetricsLogger
from moe_dist.optim.lr_schedule import learning_rate
from moe_dist.report import files as report_files
from moe_dist.training import fault_injection
from moe_dist.training.errors import plain_errors
from moe_dist.training.evaluate import evaluate, evaluate_test
from moe_dist.training.metric_accumulator import MetricAccumulator
from moe_dist.training.nan_detector import divergence_reason
from moe_dist.training.profiler import profile_steps
from moe_dist.training.run import TrainingRun, parse_run, result_lines
from moe_dist.training.setup import Training, set_up, train_step


def main(run: TrainingRun) -> None:
    config = run.config
    with plain_errors():
        mesh = meshes.init_distributed(config.mesh.ep, config.mesh.timeout_s)
        run.find_checkpoint(mesh)
        training = set_up(
            config,
            run.ds_config,
            mesh,
            run.task_metadata(),
            resumed=run.checkpoint is not None,
            explicit=run.explicit_keys,
            allow_changed_data=run.allow_changed_data,
            on_config=run.adopt_config,
        )
        task, engine = training.task, training.engine
        if run.checkpoint:
            load(run.checkpoint, engine, task, mesh, run.growth)
        folder = run.open_folder()
        if config.fault_injection != FaultInjectionConfig() and not (run.evaluate or run.finished):
            fault_injection.inject(training, folder, new_run=run.checkpoint is None)

    trains = None if run.evaluate or run.finished else folder
    with plain_errors(
        OSError, FloatingPointError, run=trains
    ):  # a disk may fill, a gradient be infinite
        if run.evaluate or run.finished:
            result = evaluate_test(engine, task, mesh)
            status = tell(run, training, run.last_losses() | result)
            meshes.shutdown()
            if mesh.is_main and config.write_report and not run.evaluate:
                report_files.try_to_write_all(folder)
        else:
            status = train(run, folder, training)
    sys.exit(status)


def train(run: TrainingRun, folder: Path, training: Training) -> int:
    """Trains, evaluates and draws a run, and returns its exit status: `stop.STATUS` where SIGTERM ended it before its
    last step, 1 where it diverged or its last checkpoint could not be written."""
    config, mesh, task, engine = run.config, training.mesh, training.task, training.engine
    meter, optimizer, line, result = (
        MetricAccumulator(mesh, task, run.layout_report["flops_per_unit"]),
        engine.optimizer,
        {},
        {},
    )
    saver = Saver(
        folder,
        engine,
        task,
        mesh,
        config.keep_last_n,
        config.async_save,
        run.refused,
        to_json(config),
        run.restore,
    )
    with (
        saver,
        PreemptionHandler(mesh) as stop,
        profile_steps(folder, mesh, run.profile) as profile,
        MetricsLogger(
            folder,
            asdict(config),
            enabled=mesh.is_main,
            wandb_mode=config.wandb.mode,
            total_steps=config.steps,
            start_step=run.first_step,
            wandb_id=run.wandb_id,
            wandb_labels=asdict(config.wandb),
            restore=run.restore,
        ) as metrics,
    ):
        with mesh.flight_recorder.recording(folder, config.mesh.timeout_s, barrier_without_timeout):
            state = {"wandb_id": metrics.wandb_id} | training.metadata
            if run.growth:  # what --resume of the new run finds
                saver.save(run.first_step, state)
            for step in range(run.first_step + 1, config.steps + 1):
                with meter.step():
                    for _, sums, stats in train_step(training, step):
                        meter.add(sums, stats)
                profile()
                last = step == config.steps
                stopping = stop.requested() and not last
                if step % config.log_every == 0 or last or stopping:
                    lr, skipped = (
                        learning_rate(config.optim, step, config.steps),
                        step - optimizer.updates,
                    )
                    told = {
                        LEARNING_RATE: lr,
                        GRAD_NORM: optimizer.norm,
                        SKIPPED_STEPS: skipped,
                    }
                    line = meter.reduce_and_reset() | told | training.nan_detector.read_and_reset()
                    metrics.log(step, line)
                if (
                    step % config.eval_every == 0 or last
                ) and not stopping:  # a SIGTERM leaves little time
                    metrics.log(
                        step, evaluate(engine, task, "valid", mesh) | task.weight_metrics(engine)
                    )
                    if last:
                        result = evaluate_test(engine, task, mesh)
                        metrics.log(step, result)
                    else:
                        metrics.log_images(
                            step, partial(report_files.write_report, folder, only_loads=True)
                        )
                if step % config.save_every == 0 or last or stopping:
                    saver.save(step, state)
                if stopping:
                    break
            saver.finish()
        metrics.end_progress()
        status = (
            EXIT_STATUS if stopping else tell(run, training, line | result) or int(saver.failed)
        )
        if stopping:
            saved = "not saved" if saver.failed else f"train.py --resume {folder} goes on"
            print_on_main(f"stopped after step {step} of {config.steps}: {saved}")
        elif mesh.is_main and saver.failed:
            print_on_main("error: the last checkpoint could not be written", sys.stderr)
        meshes.shutdown()
        failed = 0 if stopping else status  # one that is stopped goes on, in wandb too

        def draw() -> None:
            """Draws the report, in this thread for wandb too, and waits for wandb."""
            mesh.flight_recorder.enter_phase("report")
            if mesh.is_main and config.write_report:
                files = report_files.try_to_write_all(folder)
                metrics.log_images(step, lambda: files)
            elif mesh.is_main:
                metrics.log_images(
                    step, partial(report_files.write_report, folder, only_loads=True)
                )
            mesh.flight_recorder.enter_phase("wandb")
            metrics.close(failed)

        if not stop.run_unless_preempted(draw) and last and mesh.is_main:
            print_on_main(
                f"note: ended by SIGTERM; python -m moe_dist.report {folder} draws the report"
            )
        metrics.close(failed, GRACE_S)
    return status


def tell(run: TrainingRun, training: Training, values: dict[str, Any]) -> int:
    """Prints the test metrics, and a warning where the run has diverged. Returns its exit status, on every rank.

    Args:
        run: The command line.
        training: The trained model.
        values: Of the run's last line of metrics and of its evaluation, by key.
    """
    task, diverged = training.task, divergence_reason(values, training.task.uniform_loss)
    if training.mesh.is_main:
        print_on_main(
            result_lines(run, task.format_result(values), training.engine.optimizer.updates)
        )
    if diverged:
        print_on_main(
            f"warning: the run has diverged: {diverged}; a lower optim.lr may help", sys.stderr
        )
    return int(bool(diverged))


if __name__ == "__main__":
    main(parse_run(sys.argv[1:], __doc__))
