"""Trains a few steps of a config on many layouts and compares each layout with one rank.

The reference is one rank at ZeRO 0 with one micro-batch. The first world writes the reference to a
file: each step's loss and gradient norm, all weights after the last step, and its discrete
choices (`choice_replay`). Each further world trains on its layouts in turn, replays those choices,
and computes its deviations from the file. One world with N processes runs all layouts with N ranks.

A comparison is evidence only if training changes something, so the reference also reports its
activity (`ReferenceActivity`), and `pad_half` removes whole ranks' samples in some steps.
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
from moe_dist.training.setup import Training, set_up
from moe_dist.training.step import train_step
from moe_dist.verify.choice_replay import RecordedChoices, Recording

# rounding can order two scores, or a hidden unit's input and zero, either way if their relative
# distance is at most this
MAX_ROUNDING_GAP = 1e-5
ACCUMULATIONS = (1, 2)  # micro-batches per step, by default
FIRST_PADDED_STEP = 3
MIN_ROUTING_CHANGE = 0.2  # fraction of the first step's words, in a live run
MAX_PROCESSES = 1024  # on one machine
MAX_HOURS = 24  # per world


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """A run's layout.

    Attributes:
        world: Rank count.
        ep: Expert-parallel degree.
        zero_stage: ZeRO stage.
        grad_accum_steps: Micro-batches per step.
    """

    world: int
    ep: int
    zero_stage: int
    grad_accum_steps: int

    def apply_to(self, config: Config) -> Config:
        """Returns the config on this layout."""
        sets = [
            f"mesh.ep={self.ep}",
            f"zero_stage={self.zero_stage}",
            f"batch.grad_accum_steps={self.grad_accum_steps}",
        ]
        return override(config, sets)


REFERENCE = ParallelConfig(1, 1, 0, 1)


@dataclasses.dataclass(frozen=True)
class ReferenceActivity:
    """Figures about the reference run's activity: how much training changed.

    Attributes:
        steps_clipped: Number of steps with a clipped gradient norm.
        noise: True if the gates have noise.
        dropout: The model's dropout probability.
        dropped: Assignments dropped over capacity.
        routing_changed: Fraction of the first step's words that the trained weights send to other
            experts.
    """

    steps_clipped: int
    noise: bool
    dropout: float
    dropped: int
    routing_changed: float

    def by_name(self) -> dict[str, Any]:
        """Returns the figures by their names in the output and in JSON."""
        return {name.replace("_", " "): value for name, value in vars(self).items()}


@dataclasses.dataclass(frozen=True)
class Deviation:
    """One layout's largest deviation from the reference, over all ranks.

    Attributes:
        world: Rank count.
        ep: Expert-parallel degree.
        zero_stage: ZeRO stage.
        grad_accum_steps: Micro-batches per step.
        loss: The largest relative loss deviation in any step.
        norm: The largest relative gradient-norm deviation in any step.
        weights: The largest relative deviation in any weight tensor, ||difference|| /
            ||reference||.
        tensor: The tensor with this deviation.
        flips: Words with another expert ranking than in the reference, summed over ranks.
        signs: Hidden units that are on in one run and off in the other.
        widest_gap: The widest relative gap for these choices (`RecordedChoices.max_gap`).
        idle: Number of (step, rank) pairs without a sent row.
    """

    world: int
    ep: int
    zero_stage: int
    grad_accum_steps: int
    loss: float
    norm: float
    weights: float
    tensor: str
    flips: int
    signs: int
    widest_gap: float
    idle: int

    def is_within(self, tolerance: float) -> bool:
        """Returns True if all deviations are at most `tolerance` and all flips are rounding."""
        largest = max(self.loss, self.norm, self.weights)
        return largest <= tolerance and self.widest_gap <= MAX_ROUNDING_GAP


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The result of `verify`.

    Attributes:
        reference: The reference run's activity.
        layouts: Each layout's deviation.
    """

    reference: ReferenceActivity
    layouts: list[Deviation]

    def to_json(self) -> dict[str, Any]:
        """Returns the values for the --json file."""
        return {
            "live": self.reference.by_name(),
            "layouts": [dataclasses.asdict(deviation) for deviation in self.layouts],
        }


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A short training.

    Attributes:
        loss: Loss by step.
        norm: Gradient norm by step.
        weights: Whole weights by name after the last step, on CPU.
        idle: Number of (step, rank) pairs without a row.
        dropped: Dropped assignments, over all ranks.
        first_batches: The first step's micro-batches.
    """

    loss: list[float]
    norm: list[float]
    weights: dict[str, torch.Tensor]
    idle: int
    dropped: int
    first_batches: list[Batch]


@dataclasses.dataclass(frozen=True)
class Reference:
    """The reference file's content.

    Attributes:
        loss: Loss by step.
        norm: Gradient norm by step.
        weights: Whole weights by name after the last step.
        choices: The discrete choices.
    """

    loss: list[float]
    norm: list[float]
    weights: dict[str, torch.Tensor]
    choices: Recording

    def save(self, path: Path) -> None:
        """Writes the file with plain containers: `torch.load` then unpickles no classes."""
        torch.save(vars(self) | {"choices": vars(self.choices)}, path)

    @staticmethod
    def load(path: Path) -> "Reference":
        """Reads a file written by `save`."""
        content = torch.load(path, weights_only=True)
        return Reference(**content | {"choices": Recording(**content["choices"])})


# The comparison of all layouts


def verify(
    config: Config,
    layouts: list[ParallelConfig],
    steps: int,
    replay: bool,
    explicit: Collection[str] = (),
) -> Certificate:
    """Trains the reference and every layout, and compares them.

    Args:
        config: The config.
        layouts: The layouts to compare with the reference.
        steps: Optimizer steps.
        replay: If True, layouts replay the reference's discrete choices.
        explicit: Dotted keys that keep their values, as in `set_up`.

    Returns:
        The deviations, by rank count.
    """
    reference: ReferenceActivity | None = None
    deviations: list[Deviation] = []
    worlds = sorted({1} | {layout.world for layout in layouts})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.pt"
        for world in worlds:
            layouts_of_world = [layout for layout in layouts if layout.world == world]
            if world == 1:
                layouts_of_world.insert(0, REFERENCE)
            results = run_distributed(
                run_layouts,
                world,
                config,
                layouts_of_world,
                steps,
                path,
                replay,
                explicit,
                timeout=MAX_HOURS * 3600,
            )[0]
            for result in results:
                if isinstance(result, ReferenceActivity):
                    reference = result
                else:
                    deviations.append(result)
    assert reference is not None
    return Certificate(reference, deviations)


def legal_layouts(
    config: Config, candidates: list[ParallelConfig]
) -> tuple[list[ParallelConfig], list[str]]:
    """Splits candidates into legal layouts and reasons against the others.

    Args:
        config: The config.
        candidates: Layouts.

    Returns:
        The legal layouts, and a reason for each illegal one.
    """
    legal = []
    reasons = []
    for layout in candidates:
        try:
            batch_layout.make_batch_layout(layout.apply_to(config), layout.world)
        except ValueError as error:
            reasons.append(
                f"{layout.world} ranks, ep {layout.ep}, accumulation {layout.grad_accum_steps}: "
                f"{error}"
            )
        else:
            legal.append(layout)
    return legal, reasons


TABLE_HEADER = (
    f"{'ranks':>5} {'ep':>4} {'ZeRO':>5} {'micro':>6}  {'loss':>8} {'norm':>8} {'weights':>8} "
    f"{'flips':>6} {'signs':>6} {'gap':>8} {'idle':>5}"
)


def format_row(row: Deviation) -> str:
    """Returns a line for the table under `TABLE_HEADER`."""
    layout = f"{row.world:>5} {row.ep:>4} {row.zero_stage:>5} {row.grad_accum_steps:>6}"
    figures = f"{row.loss:>8.1e} {row.norm:>8.1e} {row.weights:>8.1e}"
    choices = f"{row.flips:>6} {row.signs:>6} {row.widest_gap:>8.1e}"
    return f"{layout}  {figures} {choices} {row.idle:>5}  {row.tensor}"


# The work of each rank


def run_layouts(
    config: Config,
    layouts: list[ParallelConfig],
    steps: int,
    path: Path,
    replay: bool,
    explicit: Collection[str],
) -> list[ReferenceActivity | Deviation]:
    """Trains on each layout in turn. Every rank in one world calls it.

    Args:
        config: The config.
        layouts: Layouts with this world's rank count.
        steps: Optimizer steps.
        path: The reference file. If it does not exist, the first layout writes it.
        replay: If True, layouts replay the reference's discrete choices.
        explicit: Dotted keys that keep their values, as in `set_up`.

    Returns:
        For the layout that writes the reference its activity, for each other layout its deviation.
    """
    meshes.init_process_group()
    results: list[ReferenceActivity | Deviation] = []
    metadata = None
    for layout in layouts:
        reference = Reference.load(path) if path.exists() else None
        choices = RecordedChoices(reference.choices if reference else None)
        on_layout = layout.apply_to(config)
        mesh = meshes.build_mesh(layout.ep)
        ds = read_ds_config(on_layout)
        training = set_up(on_layout, ds, mesh, metadata, explicit=explicit)
        metadata = training.metadata  # so the data is opened and counted once
        if reference is None or replay:
            choices.attach(training.model.module, mesh)
        run = train(training, steps)
        if reference is None:
            results.append(_activity(training, run, choices))
            Reference(run.loss, run.norm, run.weights, choices.recorded).save(path)
        else:
            deviation = compare(layout, run, reference, choices, mesh)
            results.append(deviation)
            if mesh.is_main:
                print(format_row(deviation), flush=True)
    meshes.shutdown()
    return results


def train(training: Training, steps: int) -> TrainedRun:
    """Trains some steps; in a few, half the samples are padding. A collective.

    Args:
        training: A training before its first step.
        steps: Optimizer steps.

    Returns:
        The results, equal on all ranks.
    """
    task: Any = training.task
    mesh = training.mesh
    losses: list[float] = []
    norms: list[float] = []
    first_batches: list[Batch] = []
    idle = torch.zeros((), dtype=torch.int64, device=mesh.device)
    dropped = torch.zeros((), dtype=torch.int64, device=mesh.device)
    _pad_batches(training)
    for step in range(1, steps + 1):
        meter = MetricAccumulator(mesh, task)
        rows = torch.zeros_like(idle)
        for batch, sums, stats in train_step(training, step):
            meter.add(sums, stats)
            dropped += sum(layer.dropped for layer in stats.values())
            rows += batch.ctx.valid_T.sum()
            if step == 1:
                first_batches.append(batch)
        idle += rows == 0
        losses.append(float(meter.reduce_and_reset()["train/loss"]))  # type: ignore[arg-type]
        norms.append(training.engine.optimizer.norm)
    total_dropped = all_reduce_sum(dropped, mesh.dp).item()
    weights = {name: t.cpu() for name, t in whole_weights(training).items()}
    total_idle = all_reduce_sum(idle, mesh.dp).item()
    return TrainedRun(losses, norms, weights, int(total_idle), int(total_dropped), first_batches)


def _pad_batches(training: Training) -> None:
    """Makes a training's task return batches padded by `pad_half`."""
    task: Any = training.task
    batches_without_padding = task.batches
    samples = training.layout.global_batch_size

    def padded_batches(step: int) -> Any:
        return (pad_half(batch, step + 1, samples) for batch in batches_without_padding(step))

    task.batches = padded_batches


def pad_half(batch: Any, step: int, samples: int) -> Any:
    """Makes half the samples padding in one step for each number `a` of `ACCUMULATIONS`.

    The global batch is cut into `a` parts, and each part's second half becomes padding. If the
    step has `a` micro-batches on two ranks or more, some rank then has only padding.

    Args:
        batch: A micro-batch.
        step: The step, from 1 on.
        samples: The global batch's samples.

    Returns:
        The micro-batch, with fewer valid tokens in the chosen steps.
    """
    accumulation = step - FIRST_PADDED_STEP + 1
    if accumulation not in ACCUMULATIONS:
        return batch
    samples_per_part = samples // accumulation
    ctx = batch.ctx
    in_first_half_T = ctx.sample_T % samples_per_part < samples_per_part // 2
    padded = dataclasses.replace(ctx, valid_T=ctx.valid_T & in_first_half_T)
    return dataclasses.replace(batch, ctx=padded)


def whole_weights(training: Training) -> dict[str, torch.Tensor]:
    """Returns all weights' float32 masters by name, with all ranks' experts.

    A collective.
    """
    optimizer = training.engine.optimizer
    weights = {}
    for name, t in training.engine.dense_state():
        if not name.endswith(("exp_avg", "exp_avg_sq")):
            weights[name] = t.clone()
    for table in optimizer.row_tables.values():
        for name, matrix in table.named.items():
            weights[name] = matrix.master
    for name, state in (optimizer.experts | optimizer.group_gates).items():
        weights[name] = all_gather(state.whole_master(), training.mesh.ep)
    return weights


def _activity(training: Training, run: TrainedRun, choices: RecordedChoices) -> ReferenceActivity:
    """Returns a training run's activity."""
    config = training.config
    experts = moe_section(config)
    max_norm = config.optim.max_grad_norm
    # the previous step's norm may determine if a step is clipped
    norms = run.norm[:-1] if config.optim.clip_norm_source == "previous" else run.norm
    return ReferenceActivity(
        steps_clipped=sum(norm > max_norm for norm in norms) if max_norm else 0,
        noise=bool(experts and experts[1].noise),
        dropout=model_dropout(config),
        dropped=run.dropped,
        routing_changed=routing_changed(training, run.first_batches, choices),
    )


@torch.no_grad()
def routing_changed(
    training: Training, first_batches: list[Batch], before: RecordedChoices
) -> float:
    """Returns the fraction of the first step's words that the final weights send to other experts.

    The gate noise is the same in both. A collective.

    Args:
        training: The training after its last step.
        first_batches: The first step's micro-batches.
        before: The run's choices.

    Returns:
        A fraction over all words in all MoE layer calls; 0 without experts.
    """
    after = RecordedChoices()
    after.attach(training.model.module, training.mesh)
    task = training.task
    task.reset_state(compute_dtype(read_ds_config(training.config)))
    denominator = task.loss_denominator(first_batches)
    for batch in first_batches:
        task.loss(training.engine, batch, denominator)
    num_changed = 0
    num_words = 0
    for layer_call in after.innermost_calls():
        old = before.visited_experts(layer_call)
        new = after.visited_experts(layer_call)
        for word, experts in old.items():
            num_changed += new[word] != experts
            num_words += 1
    return num_changed / num_words if num_words else 0.0


def compare(
    layout: ParallelConfig,
    run: TrainedRun,
    reference: Reference,
    choices: RecordedChoices,
    mesh: meshes.Mesh,
) -> Deviation:
    """Compares a run with the reference. A collective.

    Args:
        layout: The run's layout.
        run: The run.
        reference: The reference.
        choices: The discrete choices replayed in the run.
        mesh: The run's mesh.

    Returns:
        The deviation, equal on all ranks.
    """

    def largest(figures: list[float]) -> list[float]:
        """Returns each figure's maximum over ranks."""
        row = torch.tensor([figures], dtype=torch.float64, device=mesh.device)
        return all_gather(row, mesh.dp).amax(0).tolist()

    names = list(reference.weights)
    by_tensor = largest(
        [_tensor_deviation(run.weights[name], reference.weights[name]) for name in names]
    )
    loss, norm, widest_gap = largest(
        [
            _largest_deviation(run.loss, reference.loss),
            _largest_deviation(run.norm, reference.norm),
            choices.max_gap,
        ]
    )
    counts = torch.tensor([choices.rank_flips, choices.relu_sign_flips], device=mesh.device)
    flips, signs = all_reduce_sum(counts, mesh.dp).tolist()
    weights = max(by_tensor)
    return Deviation(
        **vars(layout),
        loss=loss,
        norm=norm,
        weights=weights,
        tensor=names[by_tensor.index(weights)],
        flips=flips,
        signs=signs,
        widest_gap=widest_gap,
        idle=run.idle,
    )


def _largest_deviation(values: list[float], expected: list[float]) -> float:
    """Returns the values' largest relative deviation."""
    return max(
        _or_infinity(abs(value - reference) / abs(reference))
        for value, reference in zip(values, expected, strict=True)
    )


def _tensor_deviation(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns ||value - expected|| / ||expected||, or ||value|| if the expected tensor is zero."""
    size = torch.linalg.vector_norm(expected, dtype=torch.float64)
    difference = torch.linalg.vector_norm(value.double() - expected)
    return _or_infinity((difference / torch.where(size > 0, size, 1)).item())


def _or_infinity(x: float) -> float:
    """Returns x, or infinity for NaN, because `max` could ignore a NaN."""
    return x if math.isfinite(x) else math.inf
