"""What a layout costs: bytes that a rank holds and sends, seconds of a step. Arithmetic alone; nothing is run.

A rank's own work (`RankCost`) is what it would do in a world of one: of a GPU that is not at hand it follows from counts and
public peaks (`rank_cost_on_gpu`), of this machine from short runs (`rehearsal`). What ranks say to each other is a latency a call
and a bandwidth, inside a node and between nodes. Rows are even over experts.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_dist.config.schema import Config, LSTMConfig, moe_section
from moe_dist.distributed.batch_layout import BatchLayout
from moe_dist.engine.dispatcher_choice import expected_blocks_visited, num_overlap_chunks
from moe_dist.monitoring.metric_keys import PARTS
from moe_dist.training.model_stats import (
    FLOAT,
    activation_bytes,
    bytes_per_element,
    count_params_and_flops,
    dispatcher_of,
    expected_distinct_words,
    expert_rows_per_sample,
    gate_choices,
    param_kinds,
    param_memory,
)

INDEX_BYTES = 8  # bytes of an int64


@dataclass(frozen=True)
class Link:
    """Seconds of a call, and bytes a second that a rank sends."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """Of a rank: its bytes of memory, and its links."""

    name: str
    memory: int
    rows: Link  # inside a node: all-to-all
    sums: Link  # inside a node: reductions and copies
    inter_node: Link


@dataclass(frozen=True)
class RankCost:
    """What a rank of a layout does and holds by itself: seconds of a step by part, and bytes by kind beside weights,
    masters, optimizer state and gradients."""

    seconds: dict[str, float]
    bytes: dict[str, int]


@dataclass(frozen=True)
class Gpu:
    """Public peaks of one of a node: dense bf16 and plain float32 FLOP/s, memory, its bytes a second, NVLink and NIC
    in one direction."""

    bf16: float
    fp32: float
    memory: float
    memory_bandwidth: float
    nvlink: float
    nic: float


GPUS = {
    "a100": Gpu(312e12, 19.5e12, 80e9, 2.04e12, 300e9, 25e9),
    "h100": Gpu(989e12, 67e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Gpu(989e12, 67e12, 141e9, 4.8e12, 450e9, 50e9),
    "b200": Gpu(2250e12, 80e12, 180e9, 8e12, 900e9, 50e9),
}
FLOPS_EFFICIENCY = 0.4  # of peak FLOP/s
BANDWIDTH_EFFICIENCY = 0.8  # of every peak of bytes a second
KERNEL_LAUNCH_S = 5e-6  # seconds of a kernel
CUDA_CONTEXT_BYTES = 2 * 10**9  # bytes of a context, of libraries' workspaces and of NCCL
GRAD_BUCKET_BYTES = 500_000_000 * FLOAT  # bytes of DeepSpeed's default buffer of gradients
KERNELS = 30  # for each dense parameter: forward, backward, update
GATE_PASSES = 40  # over the scores of a token, in float32: noise, top k, order, sums, and back
DENSE_UPDATE = (
    28  # bytes an element that Adam reads (weight, gradient, moments) and writes (three of them)
)
FACTORED_UPDATE = 16  # reads the gradient twice and the weight, and writes it


def gpu_machine(name: str, nic: float | None = None) -> Machine:
    """`nic`: bytes a second of a rank between nodes, in place of the preset's."""
    gpu = GPUS[name]
    inside = Link(15e-6, gpu.nvlink * BANDWIDTH_EFFICIENCY)
    return Machine(
        name, int(gpu.memory), inside, inside, Link(30e-6, nic or gpu.nic * BANDWIDTH_EFFICIENCY)
    )


def rank_cost_on_gpu(
    name: str, plain: Any, config: Config, layout: BatchLayout, ds: dict[str, Any]
) -> RankCost:
    """From counts: matrices at a part of the peak; kept activations written and read, and their gradients, once each;
    weights of experts read twice and their gradient written."""
    gpu, width, samples = GPUS[name], bytes_per_element(ds), layout.samples_per_rank
    bandwidth, wide = gpu.memory_bandwidth * BANDWIDTH_EFFICIENCY, gpu.fp32 * FLOPS_EFFICIENCY
    rate = gpu.bf16 * FLOPS_EFFICIENCY if width == 2 else wide
    kind, rows, uses = (
        param_kinds(plain),
        expert_rows_per_sample(plain, config),
        num_moe_uses(plain, config),
    )
    tokens = (
        config.batch.seq_len if isinstance(config.model, LSTMConfig) else 1
    )  # that counts are for
    gate, scores, of_experts, here = (
        0.0,
        0,
        0.0,
        0.0,
    )  # of a sample: FLOPs, numbers, FLOPs; of a micro-batch: seconds
    if experts := moe_section(config):
        all_elements = sum(plain.get_parameter(n).numel() for n in kind if kind[n] == "experts")
        mine = experts[1].num_experts // config.mesh.ep
        of_experts = 6 * rows * uses * all_elements / experts[1].num_experts
        grouped_kernel = width == 2 and mine < 1024  # one of all experts, or some for each
        launches = 2 if grouped_kernel else 12 * mine
        here = uses * (
            all_elements / config.mesh.ep * (2 * width + FLOAT) / bandwidth
            + KERNEL_LAUNCH_S * launches
        )
        num, k, grouped = gate_choices(config)
        noisy = 2 if isinstance(config.model, LSTMConfig) else 1
        scores = (
            rows
            // k ** (2 if grouped else 1)
            * uses
            * (num + (k * experts[1].num_experts // num) * grouped)
        )
        gate = 6 * noisy * scores * model_dim(config)
    whole = count_params_and_flops(plain, config)["flops_per_unit"] * tokens
    kept = activation_bytes(plain, config, samples, width)
    times = layout.grad_accum_steps
    seconds = {
        "gate": times
        * (
            KERNELS * KERNEL_LAUNCH_S * uses
            + samples * (gate / wide + scores * FLOAT * GATE_PASSES / bandwidth)
        ),
        "dispatch": times * samples * rows * uses * model_dim(config) * width * 8 / bandwidth,
        "experts": times * (samples * of_experts / rate + here),
        "rest": times * (samples * max(0, whole - of_experts - gate) / rate + 4 * kept / bandwidth)
        + times * KERNEL_LAUNCH_S * KERNELS * sum(each == "dense" for each in kind.values()),
        "optimizer": update_bytes(plain, config, layout, ds) / bandwidth,
    }
    # rows as they leave, as they come, and in the order of their experts: of one use at a time
    rows_held = 3 * samples * rows * model_dim(config) * width if config.mesh.ep > 1 else 0
    stage = ds["zero_optimization"]["stage"]
    buffers = rows_held + (GRAD_BUCKET_BYTES if stage else 0)
    return RankCost(
        seconds, {"activations": kept, "exchange buffers": buffers, "libraries": CUDA_CONTEXT_BYTES}
    )


def update_bytes(
    plain: nn.Module, config: Config, layout: BatchLayout, ds: dict[str, Any]
) -> float:
    """Bytes that a rank's part of an update reads and writes."""
    kind = param_kinds(plain)
    dense = sum(plain.get_parameter(name).numel() for name in kind if kind[name] == "dense")
    spread = sum(
        plain.get_parameter(name).numel() for name in kind if kind[name] in ("experts", "gates")
    )
    each = DENSE_UPDATE if config.optim.expert_optimizer == "adam" else FACTORED_UPDATE
    dense_here = dense / (layout.world if ds["zero_optimization"]["stage"] else 1)
    return (
        DENSE_UPDATE * (dense_here + touched_row_bytes(plain, config) / FLOAT)
        + each * spread / layout.world
    )


def model_dim(config: Config) -> int:
    return config.model.dim if isinstance(config.model, LSTMConfig) else config.model.encoder.dim


def num_moe_uses(plain: Any, config: Config) -> int:
    """Exchanges of a micro-batch, there and back."""
    return (
        int(moe_section(config) is not None)
        if isinstance(config.model, LSTMConfig)
        else plain.encoder.num_moe_uses
    )


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in a step, on average: for which part and what, bytes inside a node and between nodes, calls,
    and whether a ring goes round with it, in which all links work at once."""

    part: str
    name: str
    intra_node_bytes: float
    inter_node_bytes: float
    calls: float
    ring: bool = False

    def seconds(self, machine: Machine, nodes: int) -> float:
        link = machine.sums if self.ring else machine.rows
        each = (
            self.intra_node_bytes / link.bandwidth,
            self.inter_node_bytes / machine.inter_node.bandwidth,
        )
        latency = machine.inter_node.latency if nodes > 1 else link.latency
        return self.calls * latency + (max(each) if self.ring else sum(each))


def dispatch_traffic(
    config: Config, layout: BatchLayout, per_node: int, uses: int, width: int, rows: float
) -> list[Traffic]:
    """Dispatch and combine of a step, forward and backward, as `dispatch` sends them. `rows`: of a sample in a use."""
    ep, kind = config.mesh.ep, dispatcher_of(config, per_node)
    if not uses or kind == "local":
        return []
    num, k, grouped = gate_choices(config)
    assignments = (
        layout.samples_per_rank * layout.grad_accum_steps * uses * rows / (k if grouped else 1)
    )  # to groups
    tokens = assignments / k
    ranks = math.gcd(
        ep, per_node
    )  # of a node; where nodes cut through groups, of the worst, for whom others wait
    nodes = ep // ranks
    if kind == "dedup_node":
        of_ranks, of_nodes = (
            expected_blocks_visited(num, k, ep),
            expected_blocks_visited(num, k, nodes),
        )
        there = (
            of_nodes / nodes
        )  # of each node: a row goes to a rank there that has an expert of it
        # in other nodes to the further ranks that have one, in a row's own to every other that has one
        far, near = (
            (nodes - 1) * there,
            (nodes - 1) * (of_ranks / nodes - there) + (ranks - 1) * of_ranks / ep,
        )
    else:
        each = expected_blocks_visited(num, k, ep) / ep if kind == "dedup_rank" else k / ep
        far, near = (ep - ranks) * each, (ranks - 1) * each
    about = FLOAT if kind == "all_to_all" else FLOAT + 8  # weight; place and expert
    key = 2 * INDEX_BYTES if grouped else 0
    weights = [
        assignments * part / ep * (about + FLOAT) for part in (ranks - 1, ep - ranks)
    ]  # there, and its gradient
    wire = 2 if config.mesh.comm_dtype == "bf16" else width
    row = model_dim(config) * wire
    calls = (2 if kind == "dedup_node" else 1) * layout.grad_accum_steps * uses
    return [
        Traffic(
            "dispatch",
            "dispatch",
            tokens * near * (2 * row + key) + weights[0],
            tokens * far * (2 * row + key) + weights[1],
            calls * (5 + (kind != "all_to_all") + grouped),
        ),
        Traffic("dispatch", "combine", 2 * tokens * near * row, 2 * tokens * far * row, 2 * calls),
    ]


def reduction_traffic(
    plain: nn.Module,
    config: Config,
    layout: BatchLayout,
    per_node: int,
    ds: dict[str, Any],
    routings: int,
) -> list[Traffic]:
    """What sums and copies over ranks send in a step: dense gradients and weights by ZeRO, experts between replicas,
    rows of a vocabulary, balance losses (a few numbers: calls alone)."""
    stage, world, ep, acc = (
        ds["zero_optimization"]["stage"],
        layout.world,
        config.mesh.ep,
        layout.grad_accum_steps,
    )
    width, kind = bytes_per_element(ds), param_kinds(plain)
    if world == 1:
        return []

    def ring(part: str, what: str, num_bytes: float, size: int, near: int, calls: float) -> Traffic:
        sent = num_bytes * (size - 1) / size
        between = sent / near if size > near else 0.0
        return Traffic(part, what, sent - between, between, calls, ring=True)

    near = min(per_node, world)
    dense = sum(plain.get_parameter(name).numel() for name in kind if kind[name] == "dense")
    times = acc if stage >= 2 else 1
    told = [ring("rest", "balance, loss and norm", 0, world, near, acc * routings + 3)]
    if stage == 3:
        gathers = (
            2 if dense > 10**9 else 1
        )  # DeepSpeed keeps so many elements from forward to backward
        modules = len({name.rpartition(".")[0] for name in kind if kind[name] == "dense"})
        told += [ring("rest", "gradients", dense * FLOAT * times, world, near, times)]
        told += [
            ring(
                "rest",
                "weights",
                gathers * dense * width * acc,
                world,
                near,
                gathers * modules * acc,
            )
        ]
    else:
        told += [ring("rest", "gradients", 2 * dense * FLOAT * times, world, near, times)]
        told += [ring("optimizer", "weights", dense * width, world, near, 1)] if stage else []
    replicas = world // ep
    if replicas > 1 and moe_section(config):
        mine = param_memory(plain, config, layout, ds)
        experts = mine["experts"]["parameters"] + mine["gates"]["parameters"]
        calls = replicas * sum(each in ("experts", "gates") for each in kind.values())
        of_node = max(1, per_node // ep)  # replicas
        told += [
            ring("optimizer", "expert gradients", experts * FLOAT, replicas, of_node, calls),
            ring("optimizer", "expert weights", experts * width, replicas, of_node, calls),
        ]
    if rows := touched_row_bytes(plain, config):
        told += [
            ring(
                "optimizer",
                "rows",
                2 * rows,
                world,
                near,
                2 * sum(each == "rows" for each in kind.values()),
            )
        ]
    return told


def touched_row_bytes(plain: nn.Module, config: Config) -> float:
    """Bytes of the gradient of the rows that a step touches, with a byte for every word that tells of them."""
    model = config.model
    if not isinstance(model, LSTMConfig) or model.softmax_samples is None:
        return 0
    size = config.data.vocabulary_size  # type: ignore[union-attr]
    words = config.batch.global_batch_size * config.batch.seq_len
    read, scored = (
        expected_distinct_words(size, n) for n in (words, words + model.softmax_samples)
    )
    return FLOAT * (read * model.dim + scored * (model.dim + 1)) + 2 * size


def step_traffic(
    plain: Any, config: Config, layout: BatchLayout, per_node: int, ds: dict[str, Any]
) -> list[Traffic]:
    """All that a rank sends in a step."""
    uses, rows = num_moe_uses(plain, config), expert_rows_per_sample(plain, config)
    routings = (
        uses
        if isinstance(config.model, LSTMConfig)
        else sum(b.routes for b in plain.encoder.blocks)
    )
    balance = 6 if moe_section(config) and gate_choices(config)[2] else 1  # sums for each routing
    sent = dispatch_traffic(config, layout, per_node, uses, bytes_per_element(ds), rows)
    return sent + reduction_traffic(plain, config, layout, per_node, ds, routings * balance)


def step_seconds(
    plain: Any,
    config: Config,
    layout: BatchLayout,
    per_node: int,
    ds: dict[str, Any],
    own: RankCost,
    machine: Machine,
) -> tuple[dict[str, float], list[Traffic]]:
    """(Seconds of a step by part, what is sent). Of rows that travel in C pieces while experts run, all but a C-th part
    of the shorter of the two is hidden; of rows in one piece the last of their four ways, behind gradients of weights,
    which are a third of the experts' work."""
    sent = step_traffic(plain, config, layout, per_node, ds)
    told = {part: own.seconds.get(part, 0.0) for part in PARTS}
    for each in sent:
        told[each.part] += each.seconds(machine, math.ceil(layout.world / per_node))
    kind = dispatcher_of(config, per_node)
    pieces = num_overlap_chunks(config.mesh, crosses_nodes=per_node % config.mesh.ep != 0)
    if kind != "local" and pieces:
        rows, experts = told["dispatch"], told["experts"]
        parts = (
            pieces if kind == "all_to_all" and not gate_choices(config)[2] else 1
        )  # rows to groups go in one
        told["dispatch"] -= max(min(rows / 4, experts / 3), min(rows, experts) * (1 - 1 / parts))
    return told, sent


def rank_memory(
    plain: Any, config: Config, layout: BatchLayout, ds: dict[str, Any], own: RankCost
) -> dict[str, int]:
    """Bytes of a rank by kind."""
    of = param_memory(plain, config, layout, ds)
    named = (
        ("weights", "weights"),
        ("masters", "masters"),
        ("optimizer state", "state"),
        ("gradients", "gradients"),
    )
    return {kind: sum(each[key] for each in of.values()) for kind, key in named} | own.bytes
