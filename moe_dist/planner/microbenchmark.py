"""Measures what a plan needs of this machine: a rank's own work and memory, and what ranks say to each other.

No layout is run; three kinds of short runs stand for all:
  alone     for each expert-parallel degree, a world of one trains on a rank's share of the batch with a rank's share of
            the experts, as if others sent what it sends itself (`parallel.echo`). As many of them as a node has ranks
            run side by side, each as another rank, for they share the machine as ranks do
  together  for each ZeRO stage, those of the highest degree form one world, which sums gradients, and each still sends
            rows to itself. What they take beyond what is reckoned for them, mostly waiting for the slowest, is divided
            by their calls: the stage's addition to each call. Once more, each sends when all are there: an exchange's
  talk      as many processes time a sum and an all-to-all of two sizes
"""

import contextlib
import io
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
from moe_dist.tasks.registry import task_of
from moe_dist.training.metric_accumulator import peak_memory
from moe_dist.training.model_stats import activation_bytes, bytes_per_element, dispatcher_of
from moe_dist.training.setup import set_up, train_step

WARMUP_STEPS, TIMED_STEPS = 6, 18  # steps
COLLECTIVE_REPEATS = 30  # of a collective
LARGE_MESSAGE = 2**21  # elements of one
OTHER_MEMORY = "activations and buffers"  # all that a rank has held beside what counts name
Key = tuple[int, int]  # expert-parallel degree, ZeRO stage
Ran = dict[str, Any]  # of `run_short_training`


def run_short_training(
    config: Config, echo: int | None = None, first: int = 0, waits: bool = False
) -> Ran:
    """By a rank of any world: {"seconds": of a step by part, medians; "step": the median of whole ones; "libraries",
    "bytes": the most that it has held when all is imported, and beside that (on CUDA by torch's allocator)}. `echo`:
    a degree whose other ranks do not exist; this is one of them, from rank `first` on, and `waits` where it sends."""
    import_deepspeed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    libraries = peak_memory(device)
    mesh = meshes.init_distributed(config.mesh.ep)
    if echo is not None:
        mesh = loopback_mesh(mesh, echo, (first + mesh.dp.index) % echo, waits)
    with contextlib.redirect_stdout(io.StringIO()):  # its notes
        training = set_up(config, read_ds_config(config), mesh)
    steps = []
    for step in range(1, WARMUP_STEPS + TIMED_STEPS + 1):
        with mesh.step_timer.step():
            for _ in train_step(training, step):
                pass
        steps.append(mesh.step_timer.read_and_reset())
    held = peak_memory(device) - libraries
    meshes.shutdown()
    of_parts = {
        part: statistics.median(each[part] for each in steps[WARMUP_STEPS:]) for part in PARTS
    }
    whole = statistics.median(sum(each.values()) for each in steps[WARMUP_STEPS:])
    return {"seconds": of_parts, "step": whole, "libraries": libraries, "bytes": held}


def adopt_data_sizes(config: Config, explicit: Collection[str]) -> Config:
    """Returns the config as its data determines it, found in a process of its own. `explicit`: as in `set_up`.

    Raises:
        ValueError: The data is not here, or cannot be used.
    """
    task_of(config).check_data(config, True, explicit)
    of_one = override(config, ["mesh.ep=1"])
    return override(
        run_distributed(_adopt_data_sizes, 1, of_one, explicit, timeout=7 * 86400)[0],
        [f"mesh.ep={config.mesh.ep}"],
    )


def _adopt_data_sizes(config: Config, explicit: Collection[str]) -> Config:
    mesh = meshes.init_distributed(1)
    task = task_of(config)(config, make_batch_layout(config, 1), mesh, None, explicit)
    meshes.shutdown()
    for note in task.notes:
        print(f"note: {note}", flush=True)
    return task.config


def calibrate(
    layouts: list[tuple[Config, BatchLayout]], per_node: int, memory_of_rank: int, between: Link
) -> tuple[Machine, dict[Key, RankCost]]:
    """This machine, and what a rank does and holds by itself in each of all legal layouts of one config, by degree and
    stage. `between`: the link between nodes.

    Raises ValueError for data that is not here, or a model of which no share fits.
    """
    config, layout = layouts[0]
    worlds = {
        at.mesh.ep: _single_rank_config(at, layout, per_node) for at, _ in reversed(layouts)
    }  # of the lowest stage
    fits = {
        ep: one
        for ep, one in worlds.items()
        if _min_bytes(_shrink_experts(one, ep)) < memory_of_rank
    }
    if not fits:
        raise ValueError(
            f"{config.name}: no rank's share of it can be trained here alone; use --gpu"
        )
    most, stages = max(fits), {_zero_stage(at) for at, _ in layouts}
    number, runs = itertools.count(1), 2 + len(fits) + len(stages)

    def begin(what: str) -> None:
        print(f"measuring, run {next(number)} of {runs}: {what}", file=sys.stderr, flush=True)

    begin("sums and exchanges")
    rows, sums = run_distributed(benchmark_collectives, per_node, per_node, timeout=300)[0]
    machine = Machine("this machine", memory_of_rank, rows, sums, between)
    ran, added = {}, {}
    for ep, one in fits.items():
        begin(f"ranks of ep {ep}, each by itself")
        ran[ep] = _run_single_ranks(one, ep, per_node)
    for stage in stages:
        begin(f"ZeRO stage {stage}")
        added[stage] = _zero_stage_overhead(fits[most], most, stage, ran[most], per_node, machine)
    begin("waiting for each other")
    waited = _wait_overhead(fits[most], most, ran[most], per_node)
    owns = {}
    for at, _ in layouts:
        ep, stage = at.mesh.ep, _zero_stage(at)
        like = min(fits, key=lambda known: abs(math.log(known / ep)))
        own = _rank_cost(at, layout, _shrink_experts(fits[like], like), ran[like])
        calls = _calls_by_part(at, layout, per_node)
        waits = {part: each * calls[part] for part, each in added[stage].seconds.items()}
        waits["dispatch"] = waited - calls["dispatch"] * rows.latency if calls["dispatch"] else 0.0
        owns[ep, stage] = RankCost(
            _sum_by_key(own.seconds, waits), _sum_by_key(own.bytes, added[stage].bytes)
        )
    return machine, owns


def _rank_cost(config: Config, layout: BatchLayout, one: Config, ran: Ran) -> RankCost:
    """Of a layout what was seen of `one`, with the part of the update that the layout leaves to a rank."""
    moved = [
        update_bytes(task_of(each).build_model(each), each, over, read_ds_config(each))
        for each, over in ((config, layout), (one, make_batch_layout(one, 1)))
    ]
    update = {"optimizer": ran["seconds"]["optimizer"] * moved[0] / moved[1]}
    beside = int(ran["bytes"]) - _counted_bytes(one, make_batch_layout(one, 1))
    return RankCost(
        ran["seconds"] | update, {OTHER_MEMORY: beside, "libraries": int(ran["libraries"])}
    )


def _wait_overhead(one: Config, echo: int, ran: Ran, ranks: int) -> float:
    """Seconds that a world of `ranks` waits in a step where each sends rows to itself when all are there."""
    many = override(one, [f"batch.global_batch_size={one.batch.global_batch_size * ranks}"])
    by_rank = run_distributed(run_short_training, ranks, many, echo, 0, True, timeout=600)
    return max(each["seconds"]["dispatch"] for each in by_rank) - ran["seconds"]["dispatch"]


def _zero_stage_overhead(
    one: Config, echo: int, stage: int, ran: Ran, ranks: int, machine: Machine
) -> RankCost:
    """What a world of `ranks` takes at a ZeRO stage beyond what is reckoned for it, seconds for each call of a part:
    each has as many experts, and their gradients are summed as if they were the same."""
    many = override(
        one,
        [f"zero_stage={stage}", f"batch.global_batch_size={one.batch.global_batch_size * ranks}"],
    )
    by_rank = run_distributed(run_short_training, ranks, many, echo, timeout=600)
    many, layout, ds = (
        _shrink_experts(many, echo),
        make_batch_layout(many, ranks),
        read_ds_config(many),
    )
    plain, own = (
        task_of(many).build_model(many),
        _rank_cost(many, layout, _shrink_experts(one, echo), ran),
    )
    told, _ = step_seconds(plain, many, layout, ranks, ds, own, machine)
    calls = _calls_by_part(many, layout, ranks)
    took = {
        part: (max(each["seconds"][part] for each in by_rank) - told[part]) / calls[part]
        for part in ("rest", "optimizer")
        if calls[part]
    }
    held = (
        max(each["bytes"] for each in by_rank)
        - _counted_bytes(many, layout)
        - own.bytes[OTHER_MEMORY]
    )
    return RankCost(took, {OTHER_MEMORY: int(held)})


def _calls_by_part(config: Config, layout: BatchLayout, per_node: int) -> dict[str, float]:
    """Between ranks in a step, by part."""
    sent = step_traffic(
        task_of(config).build_model(config), config, layout, per_node, read_ds_config(config)
    )
    return {part: sum(each.calls for each in sent if each.part == part) for part in PARTS}


def _sum_by_key(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Sums by key, none below zero."""
    return {key: max(0, value + other.get(key, 0)) for key, value in one.items()}


def _zero_stage(config: Config) -> int:
    return read_ds_config(config)["zero_optimization"]["stage"]


def _single_rank_config(config: Config, layout: BatchLayout, per_node: int) -> Config:
    """A rank's share of the batch as a world of one, and the exchange of its layout."""
    micro, kind = layout.samples_per_rank, dispatcher_of(config, per_node)
    sets = ["mesh.ep=1", f"batch.global_batch_size={micro * layout.grad_accum_steps}"]
    sets += [f"mesh.dispatcher={'all_to_all' if kind == 'all_to_all' else 'dedup_rank'}"]
    sets += [f"batch.balance_loss_group_size={math.gcd(micro, layout.balance_loss_group_size)}"]
    return override(config, sets)


def _shrink_experts(config: Config, ep: int) -> Config:
    """With as many experts as a rank of `ep` has."""
    experts = moe_section(config)
    if not experts:
        return config
    section, moe = experts
    groups = moe.num_groups if isinstance(moe, MoEConfig) else None
    sets = [f"{section}.num_experts={moe.num_experts // ep}", f"{section}.k=1"]
    return override(
        config, sets + ([] if groups is None else [f"{section}.num_groups={groups // ep}"])
    )


def _counted_bytes(config: Config, layout: BatchLayout) -> int:
    """Bytes of what counts name."""
    plain = task_of(config).build_model(config)
    return sum(
        rank_memory(plain, config, layout, read_ds_config(config), RankCost({}, {})).values()
    )


def _min_bytes(one: Config) -> int:
    """Bytes of a world of one: what counts name, and what is kept for backward."""
    plain, layout = task_of(one).build_model(one), make_batch_layout(one, 1)
    kept = activation_bytes(
        plain, one, layout.samples_per_rank, bytes_per_element(read_ds_config(one))
    )
    return _counted_bytes(one, layout) + kept


def _run_single_ranks(one: Config, echo: int, ranks: int) -> Ran:
    """Of worlds of one that run at once, the slowest, for others wait for it; on CUDA one, alone on its GPU."""
    many = 1 if torch.cuda.is_available() else ranks
    with ThreadPoolExecutor(many) as threads:
        worlds = threads.map(
            lambda i: run_distributed(run_short_training, 1, one, echo, i, timeout=600), range(many)
        )
        return max((by_rank[0] for by_rank in worlds), key=lambda each: each["step"])


def benchmark_collectives(ranks: int) -> tuple[Link, Link]:
    """Rows, and sums, by a rank of a world of `ranks`."""
    mesh = meshes.init_distributed(ranks)
    axis, device = mesh.ep, mesh.device

    def rows(x: torch.Tensor) -> Any:
        each = [len(x) // ranks] * ranks
        return all_to_all_rows(x, each, each, axis, CommLabel("plan", "rows"))

    links = []
    for do, sent in (
        (rows, (ranks - 1) / ranks),
        (lambda x: all_reduce_sum(x, axis), 2 * (ranks - 1) / ranks),
    ):
        small, large = (
            torch.zeros(n // ranks * ranks, device=device) for n in (ranks, LARGE_MESSAGE)
        )
        call, more = (_seconds(do, x) for x in (small, large))
        links.append(Link(call, sent * large.nbytes / max(more - call, 1e-9)))
    meshes.shutdown()
    return links[0], links[1]


def _seconds(do: Callable[[torch.Tensor], Any], x: torch.Tensor) -> float:
    """Of a call, the median."""
    took = []
    for _ in range(COLLECTIVE_REPEATS):
        start = time.perf_counter()
        do(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return statistics.median(took)
