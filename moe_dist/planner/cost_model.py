"""A layout's cost: a rank's memory, its sent bytes, and the seconds per training step.

Everything here is arithmetic on counts; nothing is executed. A layout's cost has two halves:

  1. One rank's work without communication (`RankCost`): for a GPU by its public peaks
     (`rank_cost_on_gpu`), for this machine from short runs (`microbenchmark`).
  2. The communication between ranks (`step_traffic`): bytes and calls, from the layout. A call
     costs a latency plus bytes / bandwidth, inside a node and between nodes
     (`Traffic.seconds`).

`step_seconds` adds both up by part (`metric_keys.PARTS`), `rank_memory` adds up bytes by kind. Rows
are assumed to be spread evenly over experts.

Worked example: lstm_moe_demo (float32, width 128, 64 experts, k = 4) on two ranks of one node,
mesh.ep=2, mesh.dispatcher=all_to_all. The batch has 64 lanes x 32 words, 1,024 words per rank. Each
word visits 4 experts, of which half are on the other rank: 1,024 x 4 / 2 = 2,048 rows of 128 x 4 =
512 bytes leave a rank.

  dispatch   2,048 x (2 x 512 + 8) bytes: a row and its gradient, a gate weight (4 bytes) and its
             gradient (4 bytes)
  combine    2,048 x 2 x 512 bytes: the expert's output and its gradient
  calls      5 for dispatch (counts, rows, weights, two gradients) and 2 for combine (rows,
             gradients)

On a link of 1 ms latency and 1 GB/s dispatch and combine take 7 x 1 ms + 4,210,688 / 1e9 s = 11.2
ms. (`test_all_to_all_bytes_by_hand` and `test_step_seconds_by_hand` in tests/unit/planner check
these numbers.)
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
    FLOAT_BYTES,
    GateChoice,
    activation_bytes,
    bytes_per_element,
    count_params_and_flops,
    expected_distinct_words,
    expert_rows_per_sample,
    gate_choice,
    layout_dispatcher,
    num_elements,
    param_kinds,
    param_memory,
    params_of_kind,
)

INDEX_BYTES = 8  # one int64


@dataclass(frozen=True)
class Link:
    """The speed for one kind of communication.

    Attributes:
        latency: Additional seconds per call.
        bandwidth: Bytes sent per second by a rank.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """A rank's memory and links.

    Attributes:
        name: Name to print.
        memory: Bytes per rank.
        rows: Link inside a node, for all-to-all.
        sums: Link inside a node, for reductions and broadcasts.
        inter_node: Link between nodes.
    """

    name: str
    memory: int
    rows: Link
    sums: Link
    inter_node: Link


@dataclass(frozen=True)
class RankCost:
    """One rank's cost without communication.

    Attributes:
        seconds: Seconds per step by part (`metric_keys.PARTS`).
        memory_bytes: Bytes by kind, in addition to weights, masters, optimizer state and gradients.
    """

    seconds: dict[str, float]
    memory_bytes: dict[str, int]


@dataclass(frozen=True)
class Gpu:
    """Public peaks for one GPU in a node.

    Attributes:
        bf16_flops_per_s: Dense bf16 matrix products.
        fp32_flops_per_s: Plain float32.
        memory_bytes: Its memory size.
        memory_bytes_per_s: Its memory bandwidth.
        nvlink_bytes_per_s: Bandwidth inside a node, in one direction.
        nic_bytes_per_s: Bandwidth between nodes, in one direction.
    """

    bf16_flops_per_s: float
    fp32_flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float
    nic_bytes_per_s: float


GPUS = {
    "a100": Gpu(312e12, 19.5e12, 80e9, 2.04e12, 300e9, 25e9),
    "h100": Gpu(989e12, 67e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Gpu(989e12, 67e12, 141e9, 4.8e12, 450e9, 50e9),
    "b200": Gpu(2250e12, 80e12, 180e9, 8e12, 900e9, 50e9),
}
FLOPS_EFFICIENCY = 0.4  # achieved FLOP/s / peak
BANDWIDTH_EFFICIENCY = 0.8  # achieved bandwidth / peak, for every bandwidth
KERNEL_LAUNCH_S = 5e-6
NVLINK_LATENCY_S = 15e-6
NIC_LATENCY_S = 30e-6
CUDA_CONTEXT_BYTES = 2 * 10**9  # the context, library workspaces, and NCCL
GRAD_BUCKET_BYTES = 500_000_000 * FLOAT_BYTES  # DeepSpeed's default gradient bucket
KERNELS_PER_PARAM = 30  # launched for each dense parameter in forward, backward and update
# number of reads and writes of a token's float32 scores: noise, top k, order, sums, and their
# backward
GATE_PASSES = 40
# number of reads and writes of a row in dispatch and combine, forward and backward
DISPATCH_PASSES = 8
# bytes per element read by Adam (weight, gradient, two moments) and written (weight, two moments)
ADAM_UPDATE_BYTES = 28
# bytes per element for factored Adam: it reads the gradient twice and the weight once, and writes
# the weight
FACTORED_UPDATE_BYTES = 16
# gathered elements kept by DeepSpeed from forward to backward at ZeRO 3
# (stage3_max_live_parameters)
ZERO3_MAX_LIVE_ELEMENTS = 10**9


# One rank's work


def gpu_machine(name: str, nic_bytes_per_s: float | None = None) -> Machine:
    """Returns a GPU preset's machine.

    Args:
        name: A key of `GPUS`.
        nic_bytes_per_s: A rank's achieved bandwidth between nodes, if not the preset's.

    Returns:
        The GPU's memory and achieved bandwidths.
    """
    gpu = GPUS[name]
    inside = Link(NVLINK_LATENCY_S, gpu.nvlink_bytes_per_s * BANDWIDTH_EFFICIENCY)
    between_bytes_per_s = nic_bytes_per_s or gpu.nic_bytes_per_s * BANDWIDTH_EFFICIENCY
    between = Link(NIC_LATENCY_S, between_bytes_per_s)
    return Machine(name, int(gpu.memory_bytes), inside, inside, between)


def rank_cost_on_gpu(
    name: str, plain: Any, config: Config, layout: BatchLayout, ds: dict[str, Any]
) -> RankCost:
    """Estimates one rank's work on a GPU from counts and the GPU's peaks.

    Matrix products run at `FLOPS_EFFICIENCY` of the peak. Memory traffic runs at
    `BANDWIDTH_EFFICIENCY` of the peak: activations and their gradients are written once and read
    once, expert weights are read twice (forward and backward) and their gradients written once.
    Small work is counted in kernel launches.

    Args:
        name: A key of `GPUS`.
        plain: The plain model, on the meta device.
        config: The config, with its expert-parallel degree.
        layout: The batch layout.
        ds: The DeepSpeed config.

    Returns:
        One rank's seconds and bytes without communication.
    """
    gpu = GPUS[name]
    width = bytes_per_element(ds)
    bytes_per_s = gpu.memory_bytes_per_s * BANDWIDTH_EFFICIENCY
    fp32_flops_per_s = gpu.fp32_flops_per_s * FLOPS_EFFICIENCY
    matmul_flops_per_s = fp32_flops_per_s
    if width == 2:
        matmul_flops_per_s = gpu.bf16_flops_per_s * FLOPS_EFFICIENCY
    num_micro_batches = layout.grad_accum_steps
    samples = layout.samples_per_rank  # in one micro-batch
    num_uses = num_moe_uses(plain, config)
    rows = expert_rows_per_sample(plain, config)
    dim = model_dim(config)

    scores = _gate_scores_per_sample(plain, config)
    gate_flops = _gate_flops_per_sample(plain, config)
    expert_flops = _expert_flops_per_sample(plain, config)
    units_per_sample = config.batch.seq_len if isinstance(config.model, LSTMConfig) else 1
    all_flops = count_params_and_flops(plain, config)["flops_per_unit"] * units_per_sample
    other_flops = max(0, all_flops - expert_flops - gate_flops)
    kept_bytes = activation_bytes(plain, config, samples, width)
    num_dense = len(params_of_kind(plain, "dense"))

    gate_launch_s = KERNELS_PER_PARAM * KERNEL_LAUNCH_S * num_uses
    gate_scores_s = scores * FLOAT_BYTES * GATE_PASSES / bytes_per_s
    gate_s = num_micro_batches * (
        gate_launch_s + samples * (gate_flops / fp32_flops_per_s + gate_scores_s)
    )
    dispatch_bytes = num_micro_batches * samples * rows * num_uses * dim * width * DISPATCH_PASSES
    expert_weights_s = _expert_weights_s(plain, config, width, bytes_per_s)
    experts_s = num_micro_batches * (
        samples * expert_flops / matmul_flops_per_s + num_uses * expert_weights_s
    )
    dense_work_s = num_micro_batches * (
        samples * other_flops / matmul_flops_per_s + 4 * kept_bytes / bytes_per_s
    )
    dense_launch_s = num_micro_batches * KERNEL_LAUNCH_S * KERNELS_PER_PARAM * num_dense
    seconds = {
        "gate": gate_s,
        "dispatch": dispatch_bytes / bytes_per_s,
        "experts": experts_s,
        "rest": dense_work_s + dense_launch_s,
        "optimizer": update_bytes(plain, config, layout, ds) / bytes_per_s,
    }

    buffer_bytes = 0
    if config.mesh.ep > 1:
        # rows as they leave, as they arrive, and sorted by expert; the layers reuse the buffers
        buffer_bytes += 3 * samples * rows * dim * width
    if ds["zero_optimization"]["stage"] > 0:
        buffer_bytes += GRAD_BUCKET_BYTES
    memory_bytes = {
        "activations": kept_bytes,
        "exchange buffers": buffer_bytes,
        "libraries": CUDA_CONTEXT_BYTES,
    }
    return RankCost(seconds, memory_bytes)


def _gate_scores_per_sample(plain: Any, config: Config) -> int:
    """Returns how many scores all gates compute for one sample.

    A token has one score per expert or group to choose from, and one per expert inside each chosen
    group.
    """
    experts = moe_section(config)
    if not experts:
        return 0
    _, moe = experts
    choice = gate_choice(config)
    tokens = expert_rows_per_sample(plain, config) // choice.k ** (2 if choice.has_groups else 1)
    scores_per_token = choice.num_choices
    if choice.has_groups:
        scores_per_token += choice.k * moe.num_experts // choice.num_choices
    return tokens * num_moe_uses(plain, config) * scores_per_token


def _gate_flops_per_sample(plain: Any, config: Config) -> int:
    """Returns the gates' training FLOPs for one sample: 6 x scores x width.

    A language model's gates have a second matrix, for the noise.
    """
    num_matrices = 2 if isinstance(config.model, LSTMConfig) else 1
    return 6 * num_matrices * _gate_scores_per_sample(plain, config) * model_dim(config)


def _expert_flops_per_sample(plain: Any, config: Config) -> float:
    """Returns the experts' training FLOPs for one sample: 6 per row and weight."""
    experts = moe_section(config)
    if not experts:
        return 0.0
    _, moe = experts
    rows = expert_rows_per_sample(plain, config) * num_moe_uses(plain, config)
    all_elements = num_elements(params_of_kind(plain, "experts"))
    return 6 * rows * all_elements / moe.num_experts


def _expert_weights_s(plain: Any, config: Config, width: int, bytes_per_s: float) -> float:
    """Returns an MoE layer's seconds per micro-batch that do not depend on the row count.

    They are for reading a rank's expert weights twice, writing their float32 gradients once, and
    kernel launches.
    """
    experts = moe_section(config)
    if not experts:
        return 0.0
    _, moe = experts
    num_local = moe.num_experts // config.mesh.ep
    all_elements = num_elements(params_of_kind(plain, "experts"))
    # grouped kernels run all experts in one launch; otherwise each expert has separate launches
    has_grouped_kernel = width == 2 and num_local < 1024
    num_launches = 2 if has_grouped_kernel else 12 * num_local
    weights_s = all_elements / config.mesh.ep * (2 * width + FLOAT_BYTES) / bytes_per_s
    return weights_s + KERNEL_LAUNCH_S * num_launches


def update_bytes(
    plain: nn.Module, config: Config, layout: BatchLayout, ds: dict[str, Any]
) -> float:
    """Returns the bytes read and written in memory by a rank's share of one optimizer update.

    ZeRO divides dense parameters over all ranks from stage 1 on. Experts, and gates inside groups,
    are divided over all ranks at every stage: over expert-parallel ranks by layout, over replicas
    by owner.
    """
    dense_parts = layout.world if ds["zero_optimization"]["stage"] > 0 else 1
    dense_elements = num_elements(params_of_kind(plain, "dense")) / dense_parts
    row_elements = touched_row_bytes(plain, config) / FLOAT_BYTES
    expert_elements = num_elements(params_of_kind(plain, "experts", "gates"))
    is_adam = config.optim.expert_optimizer == "adam"
    bytes_per_expert_element = ADAM_UPDATE_BYTES if is_adam else FACTORED_UPDATE_BYTES
    return (
        ADAM_UPDATE_BYTES * (dense_elements + row_elements)
        + bytes_per_expert_element * expert_elements / layout.world
    )


def model_dim(config: Config) -> int:
    """Returns the width of a token's row."""
    return config.model.dim if isinstance(config.model, LSTMConfig) else config.model.encoder.dim


def num_moe_uses(plain: Any, config: Config) -> int:
    """Returns how many times a micro-batch passes an MoE layer (dispatch and combine)."""
    if isinstance(config.model, LSTMConfig):
        return int(moe_section(config) is not None)
    return plain.encoder.num_moe_uses


# Communication


@dataclass(frozen=True)
class Traffic:
    """An average rank's messages in a step for one purpose.

    Attributes:
        part: Their part of the step, in `metric_keys.PARTS`.
        name: Their purpose.
        intra_node_bytes: Bytes sent by a rank inside its node.
        inter_node_bytes: Bytes sent by a rank to other nodes.
        calls: Collective calls.
        ring: True for a ring; its links inside and between nodes work at the same time.
    """

    part: str
    name: str
    intra_node_bytes: float
    inter_node_bytes: float
    calls: float
    ring: bool = False

    def seconds(self, machine: Machine, nodes: int) -> float:
        """Returns calls x latency + bytes / bandwidth.

        In a ring only the slower link counts; otherwise both links' times are added. With several
        nodes, the latency is the one between nodes.

        Args:
            machine: The links.
            nodes: Node count.

        Returns:
            Seconds per step.
        """
        link = machine.sums if self.ring else machine.rows
        intra_node_s = self.intra_node_bytes / link.bandwidth
        inter_node_s = self.inter_node_bytes / machine.inter_node.bandwidth
        latency_s = machine.inter_node.latency if nodes > 1 else link.latency
        if self.ring:
            return self.calls * latency_s + max(intra_node_s, inter_node_s)
        return self.calls * latency_s + (intra_node_s + inter_node_s)


def dispatch_traffic(
    config: Config, layout: BatchLayout, ranks_per_node: int, uses: int, width: int, rows: float
) -> list[Traffic]:
    """Returns dispatch and combine traffic in a step, forward and backward.

    Args:
        config: The config, with dispatcher and expert-parallel degree.
        layout: The batch layout.
        ranks_per_node: Ranks on each node.
        uses: MoE layer calls per micro-batch.
        width: Bytes per activation.
        rows: Expert rows per sample in one MoE layer.

    Returns:
        The traffic named dispatch and combine; empty if rows stay on their rank.
    """
    dispatcher = layout_dispatcher(config, ranks_per_node)
    if not uses or dispatcher == "local":
        return []
    ep = config.mesh.ep
    choice = gate_choice(config)
    # an expert-parallel group's ranks on one node. If nodes split groups, it is the smallest share,
    # because all ranks wait for the rank with the most bytes between nodes
    local_ranks = math.gcd(ep, ranks_per_node)
    # the (primary) gate's choices for this rank's tokens; a chosen group turns one row into k
    samples = layout.samples_per_rank * layout.grad_accum_steps
    assignments = samples * uses * rows / (choice.k if choice.has_groups else 1)
    tokens = assignments / choice.k
    near_rows, far_rows = rows_sent_per_token(dispatcher, choice, ep, local_ranks)

    wire_bytes = 2 if config.mesh.comm_dtype == "bf16" else width
    row_bytes = model_dim(config) * wire_bytes
    # rows to groups include their word's position and their sample, for the groups' gates
    key_bytes = 2 * INDEX_BYTES if choice.has_groups else 0
    # all_to_all sends each assignment's weight, dedup also its row index and its expert; the
    # weight's gradient returns
    assignment_bytes = FLOAT_BYTES if dispatcher == "all_to_all" else FLOAT_BYTES + 8
    round_trip_bytes = assignment_bytes + FLOAT_BYTES
    near_assignment_bytes = assignments * (local_ranks - 1) / ep * round_trip_bytes
    far_assignment_bytes = assignments * (ep - local_ranks) / ep * round_trip_bytes

    num_hops = 2 if dispatcher == "dedup_node" else 1
    num_exchanges = num_hops * layout.grad_accum_steps * uses
    # counts, rows, weights and two gradients; dedup sends assignments separately, groups send keys
    calls_per_dispatch = 5 + (dispatcher != "all_to_all") + choice.has_groups
    dispatch = Traffic(
        "dispatch",
        "dispatch",
        tokens * near_rows * (2 * row_bytes + key_bytes) + near_assignment_bytes,
        tokens * far_rows * (2 * row_bytes + key_bytes) + far_assignment_bytes,
        num_exchanges * calls_per_dispatch,
    )
    combine = Traffic(
        "dispatch",
        "combine",
        2 * tokens * near_rows * row_bytes,
        2 * tokens * far_rows * row_bytes,
        2 * num_exchanges,
    )
    return [dispatch, combine]


def rows_sent_per_token(
    dispatcher: str, choice: GateChoice, ep: int, local_ranks: int
) -> tuple[float, float]:
    """Returns how many rows an average token sends to other ranks.

    V(b) = `expected_blocks_visited` is the average number of expert blocks, out of b, visited by a
    token:

      all_to_all   k / ep rows to each rank: a row per chosen expert
      dedup_rank   V(ep) / ep rows to each rank: a row if the rank has a chosen expert
      dedup_node   V(nodes) / nodes rows to each other node. A rank there forwards the row to the
                   node's other ranks with a chosen expert: V(ep) / nodes ranks per node, minus the
                   rank that already has the row. In its own node a token sends V(ep) / ep rows to
                   each other rank.

    Args:
        dispatcher: "all_to_all", "dedup_rank" or "dedup_node".
        choice: The gate's choice for a token.
        ep: Expert-parallel degree.
        local_ranks: An expert-parallel group's ranks on one node.

    Returns:
        Rows to other ranks of its node, and rows to other nodes.
    """
    if dispatcher == "dedup_node":
        nodes = ep // local_ranks
        visited_ranks = expected_blocks_visited(choice.num_choices, choice.k, ep)
        visited_nodes = expected_blocks_visited(choice.num_choices, choice.k, nodes)
        rows_per_node = visited_nodes / nodes
        far_rows = (nodes - 1) * rows_per_node
        forwarded_rows = (nodes - 1) * (visited_ranks / nodes - rows_per_node)
        near_rows = forwarded_rows + (local_ranks - 1) * visited_ranks / ep
        return near_rows, far_rows
    if dispatcher == "dedup_rank":
        rows_per_rank = expected_blocks_visited(choice.num_choices, choice.k, ep) / ep
    else:
        rows_per_rank = choice.k / ep
    return (local_ranks - 1) * rows_per_rank, (ep - local_ranks) * rows_per_rank


def ring_traffic(
    part: str, name: str, num_bytes: float, ranks: int, local_ranks: int, calls: float
) -> Traffic:
    """Returns the traffic for rings over `ranks` ranks.

    Each rank sends (ranks - 1) / ranks of the bytes to the next rank. If the ring leaves the node,
    one in every `local_ranks` steps crosses to the next node.

    Args:
        part: See `Traffic`.
        name: See `Traffic`.
        num_bytes: Bytes in a reduce-scatter or an all-gather; twice the tensor's size for an
            all-reduce.
        ranks: The ring's ranks.
        local_ranks: The ring's ranks on each node.
        calls: Collective calls.

    Returns:
        An average rank's traffic.
    """
    sent_bytes = num_bytes * (ranks - 1) / ranks
    inter_node_bytes = sent_bytes / local_ranks if ranks > local_ranks else 0.0
    return Traffic(part, name, sent_bytes - inter_node_bytes, inter_node_bytes, calls, ring=True)


def reduction_traffic(
    plain: nn.Module,
    config: Config,
    layout: BatchLayout,
    ranks_per_node: int,
    ds: dict[str, Any],
    routings: int,
) -> list[Traffic]:
    """Returns a step's traffic without dispatch and combine: reductions and parameters.

    Args:
        plain: The plain model.
        config: The config, with its expert-parallel degree.
        layout: The batch layout.
        ranks_per_node: Ranks on each node.
        ds: The DeepSpeed config.
        routings: Balance-loss reductions in one micro-batch.

    Returns:
        Traffic by purpose; empty for one rank.
    """
    if layout.world == 1:
        return []
    local_ranks = min(ranks_per_node, layout.world)
    # only the calls count, because each has a few numbers; 3 are for the loss and the norm
    calls = layout.grad_accum_steps * routings + 3
    scalars = ring_traffic("rest", "balance, loss and norm", 0, layout.world, local_ranks, calls)
    return [
        scalars,
        *_dense_traffic(plain, layout, local_ranks, ds),
        *_replica_traffic(plain, config, layout, ranks_per_node, ds),
        *_row_traffic(plain, config, layout, local_ranks),
    ]


def _dense_traffic(
    plain: nn.Module, layout: BatchLayout, local_ranks: int, ds: dict[str, Any]
) -> list[Traffic]:
    """Returns traffic for dense gradients and weights by ZeRO stage.

    Stages 0 to 2 all-reduce the gradients, from stage 2 on after each micro-batch, and stages 1 and
    2 all-gather the updated weights. Stage 3 reduce-scatters gradients, and all-gathers weights
    module by module in forward, and again in backward if they are too large to keep.
    """
    stage = ds["zero_optimization"]["stage"]
    world = layout.world
    num_micro_batches = layout.grad_accum_steps
    num_reductions = num_micro_batches if stage >= 2 else 1
    elements = num_elements(params_of_kind(plain, "dense"))
    weight_bytes = elements * bytes_per_element(ds)
    gradient_bytes = elements * FLOAT_BYTES * num_reductions
    if stage < 3:
        traffic = [
            ring_traffic(
                "rest", "gradients", 2 * gradient_bytes, world, local_ranks, num_reductions
            )
        ]
        if stage > 0:
            traffic.append(
                ring_traffic("optimizer", "weights", weight_bytes, world, local_ranks, 1)
            )
        return traffic
    gathers = 2 if elements > ZERO3_MAX_LIVE_ELEMENTS else 1
    calls = gathers * _num_dense_modules(plain) * num_micro_batches
    gathered_bytes = gathers * weight_bytes * num_micro_batches
    return [
        ring_traffic("rest", "gradients", gradient_bytes, world, local_ranks, num_reductions),
        ring_traffic("rest", "weights", gathered_bytes, world, local_ranks, calls),
    ]


def _replica_traffic(
    plain: nn.Module,
    config: Config,
    layout: BatchLayout,
    ranks_per_node: int,
    ds: dict[str, Any],
) -> list[Traffic]:
    """Returns the traffic between expert replicas: gradients to owners, weights back."""
    ep = config.mesh.ep
    replicas = layout.world // ep
    if replicas == 1 or not moe_section(config):
        return []
    by_kind = param_memory(plain, config, layout, ds)
    elements = by_kind["experts"].parameters + by_kind["gates"].parameters
    calls = replicas * len(params_of_kind(plain, "experts", "gates"))
    local_replicas = max(1, ranks_per_node // ep)
    gradient_bytes = elements * FLOAT_BYTES
    weight_bytes = elements * bytes_per_element(ds)
    return [
        ring_traffic(
            "optimizer", "expert gradients", gradient_bytes, replicas, local_replicas, calls
        ),
        ring_traffic("optimizer", "expert weights", weight_bytes, replicas, local_replicas, calls),
    ]


def _row_traffic(
    plain: nn.Module, config: Config, layout: BatchLayout, local_ranks: int
) -> list[Traffic]:
    """Returns gradient traffic for row-sparse vocabulary matrices."""
    row_bytes = touched_row_bytes(plain, config)
    if not row_bytes:
        return []
    calls = 2 * len(params_of_kind(plain, "rows"))
    return [ring_traffic("optimizer", "rows", 2 * row_bytes, layout.world, local_ranks, calls)]


def _num_dense_modules(plain: nn.Module) -> int:
    """Returns the number of modules with dense parameters; ZeRO 3 gathers each in one call."""
    modules = set()
    for name, kind in param_kinds(plain).items():
        if kind == "dense":
            modules.add(name.rpartition(".")[0])
    return len(modules)


def touched_row_bytes(plain: nn.Module, config: Config) -> float:
    """Returns the bytes in a step's touched gradient rows in the vocabulary matrices.

    The embedding has a row per distinct input word, the softmax a row and a bias per distinct
    scored word (targets and negative samples). Each matrix also reduces one byte per vocabulary
    word to mark touched rows.
    """
    model = config.model
    if not isinstance(model, LSTMConfig) or model.softmax_samples is None:
        return 0
    vocabulary_size = config.data.vocabulary_size  # type: ignore[union-attr]
    words = config.batch.global_batch_size * config.batch.seq_len
    read_rows = expected_distinct_words(vocabulary_size, words)
    scored_rows = expected_distinct_words(vocabulary_size, words + model.softmax_samples)
    elements = read_rows * model.dim + scored_rows * (model.dim + 1)
    return FLOAT_BYTES * elements + 2 * vocabulary_size


def step_traffic(
    plain: Any, config: Config, layout: BatchLayout, ranks_per_node: int, ds: dict[str, Any]
) -> list[Traffic]:
    """Returns an average rank's whole traffic in a step.

    Args:
        plain: The plain model.
        config: The config, with its expert-parallel degree.
        layout: The batch layout.
        ranks_per_node: Ranks on each node.
        ds: The DeepSpeed config.

    Returns:
        Traffic by purpose.
    """
    uses = num_moe_uses(plain, config)
    rows = expert_rows_per_sample(plain, config)
    if isinstance(config.model, LSTMConfig):
        routings = uses
    else:
        routings = sum(block.routes for block in plain.encoder.blocks)
    if moe_section(config) and gate_choice(config).has_groups:
        routings *= 6  # reductions in one hierarchical routing
    width = bytes_per_element(ds)
    return [
        *dispatch_traffic(config, layout, ranks_per_node, uses, width, rows),
        *reduction_traffic(plain, config, layout, ranks_per_node, ds, routings),
    ]


# The whole step


def step_seconds(
    plain: Any,
    config: Config,
    layout: BatchLayout,
    ranks_per_node: int,
    ds: dict[str, Any],
    rank_cost: RankCost,
    machine: Machine,
) -> tuple[dict[str, float], list[Traffic]]:
    """Estimates the seconds per step.

    Args:
        plain: The plain model.
        config: The config, with its expert-parallel degree.
        layout: The batch layout.
        ranks_per_node: Ranks on each node.
        ds: The DeepSpeed config.
        rank_cost: One rank's work without communication.
        machine: The links.

    Returns:
        Seconds by part (`metric_keys.PARTS`), and the traffic.
    """
    traffic = step_traffic(plain, config, layout, ranks_per_node, ds)
    num_nodes = math.ceil(layout.world / ranks_per_node)
    seconds = {part: rank_cost.seconds.get(part, 0.0) for part in PARTS}
    for messages in traffic:
        seconds[messages.part] += messages.seconds(machine, num_nodes)

    dispatcher = layout_dispatcher(config, ranks_per_node)
    crosses_nodes = ranks_per_node % config.mesh.ep != 0  # if one group does, all others wait
    num_chunks = num_overlap_chunks(config.mesh, crosses_nodes)
    if dispatcher != "local" and num_chunks:
        # only all_to_all sends chunks, and only to experts, not to expert groups
        if dispatcher != "all_to_all" or gate_choice(config).has_groups:
            num_chunks = 1
        seconds["dispatch"] -= overlapped_s(seconds["dispatch"], seconds["experts"], num_chunks)
    return seconds, traffic


def overlapped_s(dispatch_s: float, experts_s: float, num_chunks: int) -> float:
    """Returns the dispatch and combine seconds during which experts run.

    Two kinds of overlap exist, and the larger one counts:

      weight gradients   the last of four transfers (dispatch and combine, forward and backward)
                         runs while experts compute their weight gradients, a third of their work
      chunks             rows in C chunks are sent while experts compute other chunks: the shorter
                         time is hidden except for its first chunk, (1 - 1 / C) of it

    For example, dispatch of 560 ms and experts of 500 ms in 4 chunks: max(min(140, 167), 500 x
    3/4) = 375 ms.

    Args:
        dispatch_s: Dispatch and combine seconds without overlap.
        experts_s: Expert seconds.
        num_chunks: C; 1 if all rows are sent at once.

    Returns:
        Seconds, at most `dispatch_s`.
    """
    behind_weight_gradients_s = min(dispatch_s / 4, experts_s / 3)
    in_chunks_s = min(dispatch_s, experts_s) * (1 - 1 / num_chunks)
    return max(behind_weight_gradients_s, in_chunks_s)


def rank_memory(
    plain: Any, config: Config, layout: BatchLayout, ds: dict[str, Any], rank_cost: RankCost
) -> dict[str, int]:
    """Returns one rank's memory in bytes, by kind.

    Args:
        plain: The plain model.
        config: The config, with its expert-parallel degree.
        layout: The batch layout.
        ds: The DeepSpeed config.
        rank_cost: The rank's other bytes.

    Returns:
        Bytes by kind, first the parameters' kinds.
    """
    memories = param_memory(plain, config, layout, ds).values()
    memory_bytes = {
        "weights": sum(memory.weights for memory in memories),
        "masters": sum(memory.masters for memory in memories),
        "optimizer state": sum(memory.state for memory in memories),
        "gradients": sum(memory.gradients for memory in memories),
    }
    return memory_bytes | rank_cost.memory_bytes
