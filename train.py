"""Trains a named config: config -> mesh -> task -> parallelize -> engine -> the loop.

    python train.py --list                                                    names of configs
    python train.py lstm_moe_demo                                             one process
    torchrun --nproc-per-node 2 train.py lstm_moe_demo --set mesh.ep=2        two ranks, experts spread over both
    torchrun --nproc-per-node 2 train.py lstm_moe_demo --set zero=3 --set optim.lr=1e-3
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

from moe_dist.parallel import ports

ports.hold()  # before torch is imported: that takes seconds, in which another process may get the port

from moe_dist import chaos, report
from moe_dist.checkpoint.sharded import Saver, load
from moe_dist.cli import Run, plain_errors, plan, result_lines
from moe_dist.config import ChaosConfig
from moe_dist.evaluate import evaluate
from moe_dist.meter import Meter
from moe_dist.metrics import Metrics
from moe_dist.optim import learning_rate
from moe_dist.parallel import mesh as meshes
from moe_dist.parallel.collectives import meet
from moe_dist.parallel.stop import STATUS, Stop
from moe_dist.profiling import profiled
from moe_dist.training import Training, set_up, train_step


def main(run: Run) -> None:
    config = run.config
    with plain_errors():
        mesh = meshes.start(config.mesh.ep, config.mesh.patience)
        run.choose(mesh)
        training = set_up(
            config, run.ds_config, mesh, run.known(), resumed=run.checkpoint is not None, explicit=run.explicit,
            allow_changed_data=run.allow_changed_data,
        )  # fmt: skip
        run.settle(training.config)
        task, engine = training.task, training.engine
        if run.checkpoint:
            load(run.checkpoint, engine, task, mesh, run.growth)
        folder = run.open()
        if config.chaos != ChaosConfig() and not (run.evaluate or run.finished):
            chaos.make(training, folder, begins=run.checkpoint is None)

    with plain_errors(OSError), plain_errors(FloatingPointError):  # a disk may fill, a gradient be infinite
        if run.evaluate or run.finished:
            result, status = evaluate(engine, task, "test", mesh), 0
        else:
            result, status = train(run, folder, training)
        if mesh.is_main and result:
            print(result_lines(run, task.told(result), engine.optimizer.updates), flush=True)
        if mesh.is_main and config.report and not run.evaluate:
            report.try_to_write_all(folder)
        meshes.stop()
    sys.exit(status)


def train(run: Run, folder: Path, training: Training) -> tuple[dict[str, float], int]:
    """Test metrics after the last step, none where SIGTERM ended the run before, and the exit status."""
    config, mesh, task, engine = run.config, training.mesh, training.task, training.engine
    meter, optimizer, result = Meter(mesh, task, run.told["flops_per_unit"]), engine.optimizer, {}
    saver = Saver(folder, engine, task, mesh, config.keep_checkpoints, config.save_in_background, run.refused)
    with saver, Stop(mesh) as stop, profiled(folder, mesh, run.profile) as profile, Metrics(
        folder, asdict(config), enabled=mesh.is_main, wandb_mode=config.wandb.mode, total_steps=config.steps,
        start_step=run.first_step, wandb_id=run.wandb_id,
    ) as metrics, mesh.record.kept(folder, config.mesh.patience, meet):  # fmt: skip
        state = {"wandb_id": metrics.wandb_id} | training.known
        if run.growth:  # what --resume of the new run finds
            saver.save(run.first_step, state)
        for step in range(run.first_step + 1, config.steps + 1):
            with meter.step():
                for _, sums, stats in train_step(training, step):
                    meter.add(sums, stats)
            profile()
            last = step == config.steps
            stopping = stop.asked() and not last
            if step % config.log_every == 0 or last or stopping:
                lr, skipped = learning_rate(config.optim, step, config.steps), step - optimizer.updates
                told = {"train/lr": lr, "train/grad_norm": optimizer.norm, "train/skipped_steps": skipped}
                metrics.log(step, {**meter.read(), **told, **training.finite.read()})
            if (step % config.eval_every == 0 or last) and not stopping:  # who asks to stop does not wait for long
                metrics.log(step, evaluate(engine, task, "valid", mesh) | task.of_weights(engine))
                if last:
                    result = evaluate(engine, task, "test", mesh)
                    metrics.log(step, result)
                draw = partial(report.write_all, folder)
                metrics.pictures(step, draw if last else partial(report.write_report, folder, only_loads=True))
            if step % config.save_every == 0 or last or stopping:
                saver.save(step, state)
            if stopping:
                break
        saver.finish()
    if stopping and mesh.is_main:
        saved = "not saved" if saver.failed else f"train.py --resume {folder} goes on"
        print(f"stopped after step {step} of {config.steps}: {saved}", flush=True)
    if last and saver.failed and mesh.is_main:
        print("error: the last checkpoint could not be written", file=sys.stderr, flush=True)
    return result, STATUS if stopping else int(saver.failed)


if __name__ == "__main__":
    main(plan(sys.argv[1:], __doc__))
