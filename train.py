"""Trains a named config: config -> mesh -> task -> parallelize -> engine -> the loop.

    python train.py --list                                                    names of configs
    python train.py lstm_moe_demo                                             one process
    torchrun --nproc-per-node 2 train.py lstm_moe_demo --set mesh.ep=2        two ranks, experts spread over both
    torchrun --nproc-per-node 2 train.py lstm_moe_demo --set zero=3 --set optim.lr=1e-3
    python train.py lstm_moe_demo --dry-run                                   the layout, and nothing else
    torchrun --nproc-per-node 2 train.py --resume runs/NAME                   goes on where the run stopped
    python train.py --evaluate runs/NAME                                      test perplexity of its newest checkpoint

CPU with gloo or CUDA with NCCL, whatever is there.
"""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from moe_dist import checkpoint, report
from moe_dist.cli import Run, plain_errors, plan, result_lines
from moe_dist.evaluate import evaluate
from moe_dist.meter import Meter
from moe_dist.metrics import Metrics
from moe_dist.optim import learning_rate
from moe_dist.parallel import mesh as meshes
from moe_dist.training import Training, set_up, train_step


def main(run: Run) -> None:
    config = run.config
    with plain_errors():
        mesh = meshes.start(config.mesh.ep)
        training = set_up(config, run.ds_config, mesh, run.vocabulary())
        task, engine = training.task, training.engine
        if run.checkpoint:
            checkpoint.load(run.checkpoint, engine, task, mesh)
        folder = run.open()

    with plain_errors(OSError):  # a disk may fill
        if run.evaluate:
            result = evaluate(engine, task, "test", mesh)
        else:
            result = train(run, folder, training)
            if mesh.is_main:
                report.write_report(folder)
        if mesh.is_main:
            print(result_lines(run, result, task.unigram_perplexity(), engine.optimizer.updates))
        meshes.stop()


def train(run: Run, folder: Path, training: Training) -> dict[str, float]:
    config, mesh, task, engine = run.config, training.mesh, training.task, training.engine
    meter, optimizer, result = Meter(mesh, training.layout, run.flops_per_word), engine.optimizer, {}
    with Metrics(folder, asdict(config), enabled=mesh.is_main, wandb_mode=config.wandb.mode, total_steps=config.steps,
                 start_step=run.first_step, wandb_id=run.wandb_id) as metrics:  # fmt: skip
        for step in range(run.first_step + 1, config.steps + 1):
            with meter.step():
                for batch, nll, stats in train_step(training, step):
                    meter.add(nll, batch.ctx.valid_T.sum(), stats)
            last = step == config.steps
            if step % config.log_every == 0 or last:
                line = meter.read() | {"train/lr": learning_rate(config.optim, step), "train/grad_norm": optimizer.norm}
                metrics.log(step, line | {"train/skipped_steps": step - optimizer.updates})
            if step % config.eval_every == 0 or last:
                metrics.log(step, evaluate(engine, task, "valid", mesh))
                metrics.pictures(step, partial(report.write_report, folder, only_loads=True))
            if last:
                result = evaluate(engine, task, "test", mesh)
                metrics.log(step, result)
            if step % config.save_every == 0 or last:
                state = {"wandb_id": metrics.wandb_id, "vocabulary": asdict(task.vocabulary)}
                checkpoint.save(folder, step, engine, task, mesh, state, config.keep_checkpoints)
    return result


if __name__ == "__main__":
    main(plan(sys.argv[1:], __doc__))
