"""Measures this machine with short runs, and computes every layout's cost from them.

No layout is trained as a whole. Four kinds of short runs, each with a dataclass for its result,
represent all layouts:

  links        As many processes as a node has ranks time all-reduce and all-to-all on a small and a
               large tensor (`Links`).
  single rank  For each expert-parallel degree, a world of one trains on one rank's share of the
               batch and the experts (`ShortRun`). In loopback (`distributed.loopback`) it receives
               the rows it sends, so it does a rank's work in this layout without communication. As
               many such worlds as a node has ranks run at the same time, because real ranks also
               share the machine's caches and memory.
  ZeRO stage   For each stage, single ranks of the largest degree form one data-parallel world that
               reduces gradients, each still in loopback for its rows. The time beyond the estimate
               for this world, mostly the wait for the slowest rank, is divided by the calls
               (`ZeroStageOverhead`).
  wait         The same world again, but in each all-to-all each rank waits until all ranks have
               arrived. The additional dispatch time is the wait for the slowest rank (seconds).

A layout's cost per rank (`RankCost`) is then, by part of the step:

  gate, experts     as measured by the single rank
  dispatch          single rank + wait - calls x all-to-all latency (already counted in the traffic
                    estimate)
  rest              single rank + stage overhead per call x the layout's calls
  optimizer         single rank x (bytes moved by the layout's update / bytes moved by the single
                    rank's update) + stage overhead per call x the layout's calls

Worked example: lstm_moe_demo on two ranks, ep 1 and ep 2, ZeRO 1; the measured seconds are made up.
  single rank, ep 2    experts 4.0, rest 9.0, optimizer 0.8
  single rank, ep 1    experts 6.0, rest 10.0, optimizer 1.0 (it holds twice the experts)
  ZeRO 1 world         two ranks with 32 experts each: rest 11.0, optimizer 9.0 more than estimated.
                       rest is 2.0 above 9.0. The update makes 9 calls (dense weights once; 2 expert
                       matrices' gradients and weights in 2 replicas, 8 times), so the overhead is
                       9.0 / 9 = 1.0 per call.
  layout ep 2, ZeRO 1  experts 4.0; rest 9.0 + 2.0 = 11.0; optimizer 0.8 x (moved bytes' ratio) + 1
                       call x 1.0
  layout ep 1, ZeRO 1  experts 6.0; rest 10.0 + 2.0 = 12.0; optimizer 1.0 x (ratio) + 9 calls x 1.0
(`test_measured_parts_are_combined_by_layout` in tests/unit/planner checks these numbers.)
"""

import contextlib
import io
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from moe_dist.config.overrides import override
from moe_dist.config.schema import Config, MoEConfig, moe_section
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.batch_layout import BatchLayout, make_batch_layout
from moe_dist.distributed.chunked_all_to_all import all_to_all_rows
from moe_dist.distributed.collectives import all_reduce_sum
from moe_dist.distributed.labels import CommLabel
from moe_dist.distributed.loopback import loopback_mesh
from moe_dist.distributed.spawn import run_distributed
from moe_dist.engine.deepspeed import import_deepspeed
from moe_dist.engine.ds_config import read_ds_config
from moe_dist.monitoring.metric_format import format_bytes
from moe_dist.monitoring.metric_keys import PARTS
from moe_dist.planner.cost_model import (
    Link,
    Machine,
    RankCost,
    rank_memory,
    step_seconds,
    step_traffic,
    update_bytes,
)
from moe_dist.planner.search import LayoutKey
from moe_dist.tasks.registry import task_of
from moe_dist.training.metric_accumulator import peak_memory
from moe_dist.training.model_stats import activation_bytes, bytes_per_element, layout_dispatcher
from moe_dist.training.setup import set_up
from moe_dist.training.step import train_step

WARMUP_STEPS = 6
TIMED_STEPS = 18
COLLECTIVE_REPEATS = 30
LARGE_MESSAGE = 2**21  # float32 elements in a large collective
LINKS_TIMEOUT_S = 300
TRAINING_TIMEOUT_S = 600
DATA_TIMEOUT_S = 7 * 86400  # a first read of very large data may take days
OTHER_MEMORY = "activations and buffers"  # kind for all measured but not counted bytes


@dataclass(frozen=True)
class Links:
    """The links inside a node.

    Attributes:
        rows: All-to-all.
        sums: All-reduce.
    """

    rows: Link
    sums: Link


@dataclass(frozen=True)
class ShortRun:
    """One rank's measurement of a short training.

    Attributes:
        seconds: Median seconds per step by part.
        step_s: Median seconds per whole step.
        library_bytes: Peak memory after all imports, before the training.
        training_bytes: Peak memory beyond `library_bytes`. On CUDA torch's allocator counts both.
    """

    seconds: dict[str, float]
    step_s: float
    library_bytes: float
    training_bytes: float


@dataclass(frozen=True)
class ZeroStageOverhead:
    """A ZeRO stage's cost beyond the estimate.

    Attributes:
        seconds_per_call: Seconds for each call by part, without parts that make no calls.
        memory_bytes: Bytes per rank.
    """

    seconds_per_call: dict[str, float]
    memory_bytes: int


@dataclass(frozen=True)
class SingleRank:
    """A world of one that represents one rank at an expert-parallel degree.

    Attributes:
        ep: The expert-parallel degree.
        config: Its config for training in loopback, with a rank's share of the batch and all
            experts; the loopback mesh keeps one rank's share of the experts.
    """

    ep: int
    config: Config

    @property
    def counted_config(self) -> Config:
        """The config with this rank's counts: its share of the experts, and k = 1."""
        return _shrink_experts(self.config, self.ep)

    def repeated(self, ranks: int, zero_stage: int) -> Config:
        """Returns the config for a world of `ranks` such ranks, with the same share per rank."""
        global_batch_size = self.config.batch.global_batch_size * ranks
        return override(
            self.config,
            [f"zero_stage={zero_stage}", f"batch.global_batch_size={global_batch_size}"],
        )


def run_short_training(
    config: Config, loopback_ep: int | None = None, first_rank: int = 0, waits: bool = False
) -> ShortRun:
    """Trains a few steps and measures them. Every rank in a world calls it.

    Args:
        config: The config; its expert-parallel ranks exist unless `loopback_ep` is given.
        loopback_ep: An expert-parallel degree whose other ranks do not exist: this rank sends rows
            to itself.
        first_rank: In loopback, the expert-parallel rank represented by the world's rank 0.
        waits: In loopback, if True, each all-to-all waits until all ranks in the world have
            arrived.

    Returns:
        This rank's measurement.
    """
    import_deepspeed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    library_bytes = peak_memory(device)
    mesh = meshes.init_distributed(config.mesh.ep)
    if loopback_ep is not None:
        ep_rank = (first_rank + mesh.dp.index) % loopback_ep
        mesh = loopback_mesh(mesh, loopback_ep, ep_rank, waits)
    with contextlib.redirect_stdout(io.StringIO()):  # the plan prints the same notes once
        training = set_up(config, read_ds_config(config), mesh)
    step_parts = []
    for step in range(1, WARMUP_STEPS + TIMED_STEPS + 1):
        with mesh.step_timer.step():
            for _ in train_step(training, step):
                pass
        step_parts.append(mesh.step_timer.read_and_reset())
    training_bytes = peak_memory(device) - library_bytes
    meshes.shutdown()
    timed = step_parts[WARMUP_STEPS:]
    seconds = {part: statistics.median(parts[part] for parts in timed) for part in PARTS}
    step_s = statistics.median(sum(parts.values()) for parts in timed)
    return ShortRun(seconds, step_s, library_bytes, training_bytes)


def adopt_data_sizes(config: Config, explicit: Collection[str]) -> Config:
    """Returns the config with data-determined sizes.

    A separate process opens the data.

    Args:
        config: The config.
        explicit: Dotted keys that keep their values, as in `set_up`.

    Returns:
        The config with the same expert-parallel degree.

    Raises:
        ValueError: The data is not on this machine, or cannot be used.
    """
    task_of(config).check_data(config, True, explicit)
    on_one_rank = override(config, ["mesh.ep=1"])
    (adopted,) = run_distributed(
        _adopt_data_sizes, 1, on_one_rank, explicit, timeout=DATA_TIMEOUT_S
    )
    return override(adopted, [f"mesh.ep={config.mesh.ep}"])


def _adopt_data_sizes(config: Config, explicit: Collection[str]) -> Config:
    """Opens the data in a world of one."""
    mesh = meshes.init_distributed(1)
    task = task_of(config)(config, make_batch_layout(config, 1), mesh, None, explicit)
    meshes.shutdown()
    for note in task.notes:
        print(f"note: {note}", flush=True)
    return task.config


def calibrate(
    layouts: list[tuple[Config, BatchLayout]],
    ranks_per_node: int,
    memory_per_rank: int,
    inter_node: Link,
) -> tuple[Machine, dict[LayoutKey, RankCost]]:
    """Measures this machine and computes one rank's cost for each layout.

    Args:
        layouts: All legal layouts of one config, by degree, then by stage.
        ranks_per_node: Ranks on a node; as many run here.
        memory_per_rank: Bytes.
        inter_node: The link between nodes; it cannot be measured on one machine.

    Returns:
        This machine, and one rank's cost by expert-parallel degree and ZeRO stage. If a degree's
        share does not fit, it has the times of the nearest degree that fits.

    Raises:
        ValueError: No degree's share fits into the memory.
    """
    singles = _single_ranks_that_fit(layouts, ranks_per_node, memory_per_rank)
    stages = {_zero_stage(config) for config, _ in layouts}
    progress = _Progress(2 + len(singles) + len(stages))

    progress.begin("reductions and all-to-alls")
    links = run_distributed(
        benchmark_collectives, ranks_per_node, ranks_per_node, timeout=LINKS_TIMEOUT_S
    )[0]
    machine = Machine("this machine", memory_per_rank, links.rows, links.sums, inter_node)

    runs: dict[int, ShortRun] = {}
    for ep, single in singles.items():
        progress.begin(f"single ranks of mesh.ep={ep}")
        runs[ep] = _run_single_ranks(single, ranks_per_node)

    largest = singles[max(singles)]
    overheads: dict[int, ZeroStageOverhead] = {}
    for stage in stages:
        progress.begin(f"ZeRO stage {stage}")
        overheads[stage] = _zero_stage_overhead(
            largest, runs[largest.ep], stage, ranks_per_node, machine
        )
    progress.begin("waiting for the slowest rank")
    wait_s = _wait_overhead(largest, runs[largest.ep], ranks_per_node)

    costs = {}
    for config, layout in layouts:
        ep = config.mesh.ep
        stage = _zero_stage(config)
        nearest = min(singles, key=lambda measured_ep: abs(math.log(measured_ep / ep)))
        alone = _rank_cost(config, layout, singles[nearest].counted_config, runs[nearest])
        calls = _calls_by_part(config, layout, ranks_per_node)
        costs[ep, stage] = _with_overheads(
            alone, calls, overheads[stage], wait_s, links.rows.latency
        )
    return machine, costs


class _Progress:
    """Prints the next run's name on stderr."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.started = 0

    def begin(self, name: str) -> None:
        self.started += 1
        print(f"measuring, run {self.started} of {self.total}: {name}", file=sys.stderr, flush=True)


# The single rank


def _single_ranks_that_fit(
    layouts: list[tuple[Config, BatchLayout]], ranks_per_node: int, memory_per_rank: int
) -> dict[int, SingleRank]:
    """Returns a world of one for each degree whose share fits, the largest degree first."""
    by_ep: dict[int, SingleRank] = {}
    for config, layout in reversed(layouts):  # reversed, so each degree keeps its lowest stage
        ep = config.mesh.ep
        by_ep[ep] = SingleRank(ep, _single_rank_config(config, layout, ranks_per_node))
    fitting = {}
    for ep, single in by_ep.items():
        if _min_bytes(single.counted_config) < memory_per_rank:
            fitting[ep] = single
    if not fitting:
        config, _ = layouts[0]
        raise ValueError(
            f"{config.name}: one rank's share needs more than {format_bytes(memory_per_rank)} at "
            "any mesh.ep, so it cannot be trained here alone; use --gpu"
        )
    return fitting


def _single_rank_config(config: Config, layout: BatchLayout, ranks_per_node: int) -> Config:
    """Returns the config for a world of one with a rank's share of the batch."""
    samples = layout.samples_per_rank
    # a world of one has no nodes: loopback replaces dedup_node by dedup_rank
    is_all_to_all = layout_dispatcher(config, ranks_per_node) == "all_to_all"
    return override(
        config,
        [
            "mesh.ep=1",
            f"batch.global_batch_size={samples * layout.grad_accum_steps}",
            f"mesh.dispatcher={'all_to_all' if is_all_to_all else 'dedup_rank'}",
            f"batch.balance_loss_group_size={math.gcd(samples, layout.balance_loss_group_size)}",
        ],
    )


def _shrink_experts(config: Config, ep: int) -> Config:
    """Returns the config with num_experts / ep experts, num_groups / ep groups, and k = 1."""
    experts = moe_section(config)
    if not experts:
        return config
    section, moe = experts
    sets = [f"{section}.num_experts={moe.num_experts // ep}", f"{section}.k=1"]
    if isinstance(moe, MoEConfig) and moe.num_groups is not None:
        sets.append(f"{section}.num_groups={moe.num_groups // ep}")
    return override(config, sets)


def _run_single_ranks(single: SingleRank, ranks: int) -> ShortRun:
    """Runs `ranks` worlds of one at the same time and returns the slowest.

    On CUDA only one world runs, because each rank has its own GPU.
    """
    num_worlds = 1 if torch.cuda.is_available() else ranks

    def run_world(index: int) -> ShortRun:
        return run_distributed(
            run_short_training, 1, single.config, single.ep, index, timeout=TRAINING_TIMEOUT_S
        )[0]

    with ThreadPoolExecutor(num_worlds) as threads:
        runs = list(threads.map(run_world, range(num_worlds)))
    return max(runs, key=lambda run: run.step_s)


def _rank_cost(
    config: Config, layout: BatchLayout, measured: Config, short_run: ShortRun
) -> RankCost:
    """Returns one rank's cost on a layout from a single rank's short run, without overheads.

    The update's time is scaled by its moved bytes; everything else is as measured.

    Args:
        config: The config on the layout.
        layout: The layout.
        measured: The config with the single rank's counts.
        short_run: The single rank's measurement.

    Returns:
        Seconds by part, and measured but not counted bytes.
    """
    measured_layout = make_batch_layout(measured, 1)
    layout_bytes = _update_bytes(config, layout)
    measured_bytes = _update_bytes(measured, measured_layout)
    optimizer_s = short_run.seconds["optimizer"] * layout_bytes / measured_bytes
    other_bytes = int(short_run.training_bytes) - _counted_bytes(measured, measured_layout)
    return RankCost(
        short_run.seconds | {"optimizer": optimizer_s},
        {OTHER_MEMORY: other_bytes, "libraries": int(short_run.library_bytes)},
    )


# Overheads with many ranks


def _zero_stage_overhead(
    single: SingleRank, short_run: ShortRun, stage: int, ranks: int, machine: Machine
) -> ZeroStageOverhead:
    """Measures a world of `ranks` single ranks at a ZeRO stage and subtracts its estimate.

    Each rank has different experts, but in this world they count as replicas, and their gradients
    are reduced.
    """
    config = single.repeated(ranks, stage)
    runs = run_distributed(run_short_training, ranks, config, single.ep, timeout=TRAINING_TIMEOUT_S)
    counted = _shrink_experts(config, single.ep)
    layout = make_batch_layout(counted, ranks)
    ds = read_ds_config(counted)
    plain = task_of(counted).build_model(counted)
    alone = _rank_cost(counted, layout, single.counted_config, short_run)
    estimated, _ = step_seconds(plain, counted, layout, ranks, ds, alone, machine)
    calls = _calls_by_part(counted, layout, ranks)
    seconds_per_call = {}
    for part in ("rest", "optimizer"):
        if calls[part]:
            slowest_s = max(run.seconds[part] for run in runs)
            seconds_per_call[part] = (slowest_s - estimated[part]) / calls[part]
    most_bytes = max(run.training_bytes for run in runs)
    added_bytes = most_bytes - _counted_bytes(counted, layout) - alone.memory_bytes[OTHER_MEMORY]
    return ZeroStageOverhead(seconds_per_call, int(added_bytes))


def _wait_overhead(single: SingleRank, short_run: ShortRun, ranks: int) -> float:
    """Measures how long all-to-alls wait for the slowest of `ranks` ranks, in seconds per step."""
    config = single.repeated(ranks, _zero_stage(single.config))
    runs = run_distributed(
        run_short_training, ranks, config, single.ep, 0, True, timeout=TRAINING_TIMEOUT_S
    )
    slowest_s = max(run.seconds["dispatch"] for run in runs)
    return slowest_s - short_run.seconds["dispatch"]


def _with_overheads(
    alone: RankCost,
    calls: dict[str, float],
    overhead: ZeroStageOverhead,
    wait_s: float,
    dispatch_latency_s: float,
) -> RankCost:
    """Returns one rank's cost among other ranks; costs below zero, from noise, become zero."""
    added_s = {part: each * calls[part] for part, each in overhead.seconds_per_call.items()}
    added_s["dispatch"] = 0.0
    if calls["dispatch"]:
        added_s["dispatch"] = wait_s - calls["dispatch"] * dispatch_latency_s
    added_bytes = {OTHER_MEMORY: overhead.memory_bytes}
    seconds = {}
    for part, alone_s in alone.seconds.items():
        seconds[part] = max(0, alone_s + added_s.get(part, 0))
    memory_bytes = {}
    for kind, alone_bytes in alone.memory_bytes.items():
        memory_bytes[kind] = max(0, alone_bytes + added_bytes.get(kind, 0))
    return RankCost(seconds, memory_bytes)


# Counts


def _calls_by_part(config: Config, layout: BatchLayout, ranks_per_node: int) -> dict[str, float]:
    """Returns a step's collective calls by part."""
    plain = task_of(config).build_model(config)
    calls = dict.fromkeys(PARTS, 0.0)
    for messages in step_traffic(plain, config, layout, ranks_per_node, read_ds_config(config)):
        calls[messages.part] += messages.calls
    return calls


def _update_bytes(config: Config, layout: BatchLayout) -> float:
    """Returns the bytes moved by a rank's share of one optimizer update."""
    plain = task_of(config).build_model(config)
    return update_bytes(plain, config, layout, read_ds_config(config))


def _counted_bytes(config: Config, layout: BatchLayout) -> int:
    """Returns the bytes for a rank's weights, masters, optimizer state and gradients."""
    plain = task_of(config).build_model(config)
    nothing_else = RankCost({}, {})
    return sum(rank_memory(plain, config, layout, read_ds_config(config), nothing_else).values())


def _min_bytes(config: Config) -> int:
    """Returns the bytes needed by a world of one: the counted bytes and the activations."""
    plain = task_of(config).build_model(config)
    layout = make_batch_layout(config, 1)
    width = bytes_per_element(read_ds_config(config))
    kept_bytes = activation_bytes(plain, config, layout.samples_per_rank, width)
    return _counted_bytes(config, layout) + kept_bytes


def _zero_stage(config: Config) -> int:
    """Returns the ZeRO stage in a config's DeepSpeed file."""
    return read_ds_config(config)["zero_optimization"]["stage"]


# Links


def benchmark_collectives(ranks: int) -> Links:
    """Measures the links inside a node. Every rank in a world of `ranks` calls it."""
    mesh = meshes.init_distributed(ranks)
    axis = mesh.ep

    def all_to_all(x: torch.Tensor) -> None:
        rows_per_rank = [len(x) // ranks] * ranks
        all_to_all_rows(x, rows_per_rank, rows_per_rank, axis, CommLabel("plan", "rows"))

    def all_reduce(x: torch.Tensor) -> None:
        all_reduce_sum(x, axis)

    # a rank sends this fraction of a tensor's bytes: all but its own share, and twice as much in a
    # ring all-reduce
    rows = _measure_link(all_to_all, (ranks - 1) / ranks, ranks, mesh.device)
    sums = _measure_link(all_reduce, 2 * (ranks - 1) / ranks, ranks, mesh.device)
    meshes.shutdown()
    return Links(rows, sums)


def _measure_link(
    collective: Callable[[torch.Tensor], None],
    sent_fraction: float,
    ranks: int,
    device: torch.device,
) -> Link:
    """Returns the latency (time for a small tensor) and the bandwidth (from a large tensor).

    For example on two ranks: an all-to-all takes 0.1 ms for 2 elements, and 4.3 ms for 8.4 MB; half
    the bytes leave a rank, so the bandwidth is 4.2 MB / 4.2 ms = 1 GB/s.
    """
    small = torch.zeros(ranks, device=device)
    large = torch.zeros(LARGE_MESSAGE // ranks * ranks, device=device)
    small_s = _median_seconds(collective, small)
    large_s = _median_seconds(collective, large)
    return Link(small_s, sent_fraction * large.nbytes / max(large_s - small_s, 1e-9))


def _median_seconds(collective: Callable[[torch.Tensor], None], x: torch.Tensor) -> float:
    """Returns the median seconds per call."""
    durations_s = []
    for _ in range(COLLECTIVE_REPEATS):
        start = time.perf_counter()
        collective(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        durations_s.append(time.perf_counter() - start)
    return statistics.median(durations_s)
