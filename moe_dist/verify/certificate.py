"""A certificate that the layout is not part of the result: trains a few steps of a config on every layout asked for.

    python -m moe_dist.verify lstm_moe_demo                                one rank against 1, 2, 4 at every ep and ZeRO
    python -m moe_dist.verify lstm_wide_demo --set model.dim=64 --worlds 2 --zero 0 3 --json FILE

One rank at ZeRO 0 is the reference. Of every other layout it prints the largest relative deviation, of any rank, of the
loss and the gradient norm of any step and of any weight tensor after the last, ||difference|| / ||reference||, and
exits with 1 where one is above --tolerance.

Two scores that differ by rounding may be ranked either way, and a word then visits another expert; a hidden unit whose
input is zero to rounding may be on or off, and its gradient is then whole or none: that is chance, not a fault. So the
reference's ranking and the signs of its hidden units are recorded, and a layout that would choose otherwise goes on
with the recorded ones. Such flips and signs are counted, and the widest gap among them is printed: the distance of two
scores over their size, of a unit's input from zero over the largest of its row. A gap above 1e-5 is no rounding, and a
failure. --free lets every layout choose for itself.

To be worth its name a run must be live, and the figures that say so are printed: how much of the routing of the first
step's words the training changed, in how many steps the norm was clipped, noise and dropout, and in how many steps a
rank had nothing but padding and sent no row (half of the samples are made padding in one step for each accumulation).
"""

import dataclasses
import math
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from moe_dist.config.overrides import override
from moe_dist.config.schema import Config, model_dropout, moe_section
from moe_dist.distributed import batch_layout
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.collectives import all_gather, all_reduce_sum
from moe_dist.distributed.spawn import run_distributed
from moe_dist.engine.ds_config import compute_dtype, read_ds_config
from moe_dist.tasks.task import Batch
from moe_dist.training.metric_accumulator import MetricAccumulator
from moe_dist.training.setup import Training, set_up, train_step
from moe_dist.verify.choice_replay import RecordedChoices

MAX_ROUNDING_GAP = 1e-5  # of their size: two scores this near, or a hidden unit and zero, may fall either way by rounding
ACCUMULATIONS = (1, 2)
FIRST_PADDED_STEP = 3
MIN_ROUTING_CHANGE = 0.2  # of the first step's words change their experts
MAX_PROCESSES = 1024  # of one machine
MAX_HOURS = 24  # that one world may take


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """One way to lay out a run."""

    world: int
    ep: int
    zero_stage: int
    grad_accum_steps: int

    def apply_to(self, config: Config) -> Config:
        sets = [
            f"mesh.ep={self.ep}",
            f"zero_stage={self.zero_stage}",
            f"batch.grad_accum_steps={self.grad_accum_steps}",
        ]
        return override(config, sets)


REFERENCE = ParallelConfig(1, 1, 0, 1)


def run_layouts(
    config: Config,
    layouts: list[ParallelConfig],
    steps: int,
    reference: Path,
    replay: bool,
    explicit: Collection[str],
) -> list[dict[str, Any]]:
    """Run by every rank of one world: trains on each layout in turn, and tells how far it ends from the reference, a
    file that the first layout of all writes."""
    meshes.init_process_group()
    told, known = [], None
    for layout in layouts:
        kept = torch.load(reference, weights_only=True) if reference.exists() else None
        choices = RecordedChoices(kept["choices"] if kept else None)
        on_layout = layout.apply_to(config)
        training = set_up(
            on_layout,
            read_ds_config(on_layout),
            meshes.build_mesh(layout.ep),
            known,
            explicit=explicit,
        )
        known = training.metadata  # counted once
        if kept is None or replay:
            choices.attach(training.model.module, training.mesh)
        run = train(training, steps)
        if kept is None:
            told.append(
                {
                    **run["live"],
                    "routing changed": routing_changed(training, run.pop("first"), choices),
                }
            )
            torch.save({"choices": choices.recorded, **run}, reference)
        else:
            told.append(dataclasses.asdict(layout) | compare(run, kept, choices, training.mesh))
            if training.mesh.is_main:
                print(format_row(told[-1]), flush=True)
    meshes.shutdown()
    return told


def train(training: Training, steps: int) -> dict[str, Any]:
    """Loss and norm of each step, whole weights by name after the last, the first step's micro-batches, and what says
    whether the run was live."""
    task: Any = training.task
    mesh, config = training.mesh, training.config
    losses: list[float] = []
    norms: list[float] = []
    first: list[Batch] = []
    idle, dropped = torch.zeros(2, dtype=torch.int64, device=mesh.device)
    batches_of = task.batches
    task.batches = lambda step: (
        pad_half(batch, step + 1, training.layout.global_batch_size) for batch in batches_of(step)
    )
    for step in range(1, steps + 1):
        meter, rows = MetricAccumulator(mesh, task), torch.zeros_like(idle)
        for batch, sums, stats in train_step(training, step):
            meter.add(sums, stats)
            dropped += sum(layer.dropped for layer in stats.values())
            rows += batch.ctx.valid_T.sum()
            first += [batch] if step == 1 else []
        idle += rows == 0
        losses.append(float(meter.reduce_and_reset()["train/loss"]))  # type: ignore[arg-type]
        norms.append(training.engine.optimizer.norm)
    clip = config.optim.max_grad_norm
    by = norms[:-1] if config.optim.clip_norm_source == "previous" else norms
    experts = moe_section(config)
    live = {
        "steps clipped": sum(norm > clip for norm in by) if clip else 0,
        "noise": bool(experts and experts[1].noise),
        "dropout": model_dropout(config),
        "dropped": all_reduce_sum(dropped, mesh.dp).item(),
    }
    weights = {name: t.cpu() for name, t in whole_weights(training).items()}
    return {
        "loss": losses,
        "norm": norms,
        "weights": weights,
        "idle": all_reduce_sum(idle, mesh.dp).item(),
        "live": live,
        "first": first,
    }


def pad_half(batch: Any, step: int, samples: int) -> Any:
    """In one step for each accumulation a the second half of each of a parts of the batch's samples is padding: then
    with a micro-batches at least one rank of two or more has nothing else."""
    accumulation = step - FIRST_PADDED_STEP + 1
    if accumulation not in ACCUMULATIONS:
        return batch
    per_part, ctx = samples // accumulation, batch.ctx
    valid_T = ctx.valid_T & (ctx.sample_T % per_part < per_part // 2)
    return dataclasses.replace(batch, ctx=dataclasses.replace(ctx, valid_T=valid_T))


def whole_weights(training: Training) -> dict[str, torch.Tensor]:
    """Masters by name, stacks of experts and groups put together. A collective."""
    optimizer = training.engine.optimizer
    whole = {
        name: t.clone()
        for name, t in training.engine.dense_state()
        if not name.endswith(("exp_avg", "exp_avg_sq"))
    }
    whole |= {
        name: m.master for table in optimizer.row_tables.values() for name, m in table.named.items()
    }
    spread = optimizer.experts | optimizer.gates
    return whole | {
        name: all_gather(state.whole_master(), training.mesh.ep) for name, state in spread.items()
    }


def compare(
    run: dict[str, Any], kept: dict[str, Any], choices: RecordedChoices, mesh: meshes.Mesh
) -> dict[str, Any]:
    """Largest relative deviations of any rank from the reference, the tensor whose is the largest, and all that ranks
    would have chosen otherwise. A collective."""

    def largest(x: list[float]) -> list[float]:
        return (
            all_gather(torch.tensor([x], dtype=torch.float64, device=mesh.device), mesh.dp)
            .amax(0)
            .tolist()
        )

    weights = kept["weights"]
    off = largest([_deviation(run["weights"][name], w) for name, w in weights.items()])
    farthest = [_farthest(run[figure], kept[figure]) for figure in ("loss", "norm")]
    loss, norm, widest_gap = largest([*farthest, choices.max_gap])
    flips, signs = all_reduce_sum(
        torch.tensor([choices.rank_flips, choices.relu_sign_flips], device=mesh.device), mesh.dp
    ).tolist()
    return {
        "loss": loss,
        "norm": norm,
        "weights": max(off),
        "tensor": list(weights)[off.index(max(off))],
        "flips": flips,
        "signs": signs,
        "widest_gap": widest_gap,
        "idle": run["idle"],
    }


def _farthest(got: list[float], expected: list[float]) -> float:
    return max(_finite(abs(a - b) / abs(b)) for a, b in zip(got, expected, strict=True))


def _deviation(got: torch.Tensor, expected: torch.Tensor) -> float:
    size = torch.linalg.vector_norm(expected, dtype=torch.float64)
    difference = torch.linalg.vector_norm(got.double() - expected)
    return _finite((difference / torch.where(size > 0, size, 1)).item())


def _finite(x: float) -> float:
    """What is no number is as far off as can be: `max` would pass over it."""
    return x if math.isfinite(x) else math.inf


@torch.no_grad()
def routing_changed(training: Training, first: list[Batch], before: RecordedChoices) -> float:
    """The part of the first step's words that the final weights, with the same noise, send to other experts."""
    after = RecordedChoices()
    after.attach(training.model.module, training.mesh)
    task = training.task
    task.reset_state(compute_dtype(read_ds_config(training.config)))
    total = task.loss_denominator(first)
    for batch in first:
        task.loss(training.engine, batch, total)
    changed: list[bool] = []
    for place in after.places():
        old, new = before.visited_experts(place), after.visited_experts(place)
        changed += [new[word] != experts for word, experts in old.items()]
    return sum(changed) / len(changed) if changed else 0.0


TABLE_HEADER = (
    f"{'ranks':>5} {'ep':>4} {'ZeRO':>5} {'micro':>6}  {'loss':>8} {'norm':>8} {'weights':>8} "
    f"{'flips':>6} {'signs':>6} {'gap':>8} {'idle':>5}"
)


def format_row(told: dict[str, Any]) -> str:
    """A line of the table."""
    place = (
        f"{told['world']:>5} {told['ep']:>4} {told['zero_stage']:>5} {told['grad_accum_steps']:>6}"
    )
    figures = f"{told['loss']:>8.1e} {told['norm']:>8.1e} {told['weights']:>8.1e}"
    choices = f"{told['flips']:>6} {told['signs']:>6} {told['widest_gap']:>8.1e}"
    return f"{place}  {figures} {choices} {told['idle']:>5}  {told['tensor']}"


def legal_layouts(
    config: Config, asked: list[ParallelConfig]
) -> tuple[list[ParallelConfig], list[str]]:
    """The layouts that the config can have, and why it cannot have the others."""
    possible, refused = [], []
    for layout in asked:
        try:
            batch_layout.make_batch_layout(layout.apply_to(config), layout.world)
            possible.append(layout)
        except ValueError as error:
            refused.append(
                f"{layout.world} ranks, ep {layout.ep}, accumulation {layout.grad_accum_steps}: {error}"
            )
    return possible, refused


def verify(
    config: Config,
    layouts: list[ParallelConfig],
    steps: int,
    replay: bool,
    explicit: Collection[str] = (),
) -> dict[str, Any]:
    """Returns {"live": figures of the reference, "layouts": deviations of each}. `explicit`: as in `set_up`."""
    told: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for world in sorted({1} | {layout.world for layout in layouts}):
            here = [REFERENCE] * (world == 1) + [
                layout for layout in layouts if layout.world == world
            ]
            arguments = (config, here, steps, Path(folder) / "reference.pt", replay, explicit)
            told += run_distributed(run_layouts, world, *arguments, timeout=MAX_HOURS * 3600)[0]
    return {"live": told[0], "layouts": told[1:]}
