"""Counts a config's parameters, FLOPs and memory on a given layout.

All counts come from a plain model's shapes on the meta device: no process group starts and no
tensor is allocated, so any machine can describe a config of any size.
`describe_layout` returns the counts for a program (RUN/layout.json), `format_layout` prints them
(train.py --dry-run).

A layout divides parameters in four ways, one for each kind (`param_kinds`):

  "dense"    every rank has a copy; ZeRO divides optimizer state, gradients or weights over all
             ranks
  "experts"  divided over the expert-parallel (ep) ranks; replicas share the update
  "gates"    gates inside groups of experts (hierarchical layers); divided like experts
  "rows"     vocabulary matrices with row-sparse updates; every rank has a copy
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from moe_dist.config.schema import (
    Config,
    LSTMConfig,
    MoEConfig,
    TextConfig,
    TextDataConfig,
    moe_section,
)
from moe_dist.distributed.batch_layout import BatchLayout
from moe_dist.engine.dispatcher_choice import dispatcher_kind
from moe_dist.models.lstm_lm import LAYERS
from moe_dist.models.sampled_softmax import (
    LOGITS_PER_CHUNK,
    TOKENS_PER_CHUNK,
    inclusion_probability,
)
from moe_dist.moe.hierarchical import GroupProjection
from moe_dist.moe.layer import MoE
from moe_dist.monitoring.metric_format import format_bytes

# Shazeer et al. 2017 leave these modules out of their counts
EMBEDDING_AND_SOFTMAX = ("embedding.", "softmax.")
FLOAT_BYTES = 4  # one float32
ADAM_STATE_BYTES = 2 * FLOAT_BYTES  # one parameter's two moments


def param_kinds(model: nn.Module) -> dict[str, str]:
    """Returns each parameter's kind in a plain model by name (see the module's docstring)."""
    kind = {name: "dense" for name, _ in model.named_parameters()}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, MoE):
            experts = layer.get_submodule("experts")
            for prefix, module in experts.named_modules(prefix=f"{layer_name}.experts"):
                module_kind = "gates" if isinstance(module, GroupProjection) else "experts"
                for key, _ in module.named_parameters(recurse=False):
                    kind[f"{prefix}.{key}"] = module_kind
        if getattr(layer, "by_row", False):
            for key, _ in layer.named_parameters(recurse=False):
                kind[f"{layer_name}.{key}"] = "rows"
    return kind


def params_of_kind(model: nn.Module, *kinds: str) -> list[nn.Parameter]:
    """Returns a plain model's parameters of these kinds."""
    kind = param_kinds(model)
    return [model.get_parameter(name) for name in kind if kind[name] in kinds]


def num_elements(params: Iterable[nn.Parameter]) -> int:
    """Returns the parameters' total element count."""
    return sum(p.numel() for p in params)


# Parameters and FLOPs


def count_params_and_flops(model: nn.Module, config: Config) -> dict[str, int]:
    """Counts parameters and forward multiply-adds in a plain model.

    Args:
        model: The plain model, on the meta device.
        config: The config.

    Returns:
        Counts by name, per word for a language model (as in Shazeer et al. 2017, Table 7) and per
        sample for other models. "flops_per_unit" counts training FLOPs (forward and backward) per
        word or sample.
    """
    counts = {
        "parameters": num_elements(model.parameters()),
        "expert_parameters": num_elements(params_of_kind(model, "experts")),
    }
    if isinstance(config.model, LSTMConfig):
        return counts | _count_lstm(model, config)
    return counts | _count_transformer(model)


def _count_lstm(model: nn.Module, config: Config) -> dict[str, int]:
    """Counts an LSTM language model per word."""
    assert isinstance(config.model, LSTMConfig)
    moe = config.model.moe
    kind = param_kinds(model)
    num_chosen = {
        "experts": moe.k if moe.num_groups is None else moe.k**2,
        "gates": moe.k,
        "rows": _logits_per_target(config),
    }
    num_inner = 0  # parameters without embedding and softmax
    num_active = Fraction(0)
    num_multiply_adds = Fraction(0)
    for name, p in model.named_parameters():
        # a word uses one embedding row, k experts and some rows of a sampled softmax
        share = Fraction(1)
        if name == "embedding.weight":
            share = Fraction(1, len(p))
        elif kind[name] in num_chosen:
            share = Fraction(num_chosen[kind[name]], p.shape[0])
        num_active += p.numel() * share
        if not name.startswith(EMBEDDING_AND_SOFTMAX):
            num_inner += p.numel()
            if p.dim() > 1:  # a matrix costs one multiply-add per element
                num_multiply_adds += p.numel() * share
    softmax_multiply_adds = config.model.dim * _logits_per_target(config)
    return {
        "parameters_without_embedding_and_softmax": num_inner,
        "active_parameters_per_word": int(num_active),
        "ops_per_timestep": int(num_multiply_adds),
        # x 2 for multiply and add, x 3 for forward and twice as much in backward (section 5.1)
        "flops_per_unit": 6 * (int(num_multiply_adds) + softmax_multiply_adds),
    }


def _count_transformer(model: Any) -> dict[str, int]:
    """Counts a transformer per sample, from the number of rows each matrix multiplies."""
    rows_by_prefix = model.rows_per_sample()
    kind = param_kinds(model)
    multiply_adds = Fraction(model.encoder.attention_multiply_adds(model.num_tokens))
    for name, p in model.named_parameters():
        is_matrix = p.dim() > 1 and p.shape[-2] > 1  # False for expert biases
        if not is_matrix:
            continue
        num_rows = 0
        for prefix, rows in rows_by_prefix.items():
            if name.startswith(prefix):
                num_rows = rows
                break
        share = Fraction(model.encoder.num_chosen, p.shape[0]) if kind[name] == "experts" else 1
        multiply_adds += num_rows * p.numel() * share
    return {
        "multiply_adds_per_sample": int(multiply_adds),
        "flops_per_unit": 6 * int(multiply_adds),
    }


def _logits_per_target(config: Config) -> int:
    """Returns how many logits training computes for one target word, on average."""
    assert isinstance(config.model, LSTMConfig)
    assert isinstance(config.data, TextDataConfig)
    vocabulary_size = config.data.vocabulary_size
    num_samples = config.model.softmax_samples
    if num_samples is None:
        return vocabulary_size
    return 1 + round(expected_distinct_words(vocabulary_size, num_samples))


@functools.cache
def expected_distinct_words(vocabulary_size: int, samples: int) -> float:
    """Returns how many distinct words `samples` negative samples contain, on average.

    The negative-sampling distribution imitates a text, so the result also approximates the distinct
    words in a text.
    """
    return inclusion_probability(vocabulary_size, samples).sum().item()


# Parameter memory


@dataclass(frozen=True)
class ParamMemory:
    """A rank's share of one parameter kind.

    Attributes:
        parameters: Element count.
        weights: Bytes for the weights used in forward and backward.
        gradients: Bytes for their gradients.
        masters: Bytes for the weights' float32 copies.
        state: Bytes for optimizer state.
    """

    parameters: int
    weights: int
    gradients: int
    masters: int
    state: int


def param_memory(
    model: nn.Module, config: Config, layout: BatchLayout, ds: dict[str, Any]
) -> dict[str, ParamMemory]:
    """Computes how much memory parameters take on one rank, by kind.

    The result is exact except for ZeRO's padding and two upper bounds: "rows" assumes every row has
    been updated, and if expert replicas share an update unevenly, the largest share is counted.

    Args:
        model: The plain model, on the meta device.
        config: The config, with its expert-parallel degree.
        layout: The batch layout, with the rank count.
        ds: The DeepSpeed config, with the ZeRO stage and the precision.

    Returns:
        One rank's share by kind.
    """
    world = layout.world
    ep = config.mesh.ep
    stage = ds["zero_optimization"]["stage"]
    width = bytes_per_element(ds)
    master_bytes = FLOAT_BYTES if width < FLOAT_BYTES else 0
    return {
        "dense": _dense_memory(params_of_kind(model, "dense"), stage, world, width),
        "experts": _expert_memory(params_of_kind(model, "experts"), config, world, width),
        "gates": _gate_memory(params_of_kind(model, "gates"), ep, world),
        "rows": _row_memory(params_of_kind(model, "rows"), width, master_bytes),
    }


def _dense_memory(
    params: list[nn.Parameter], stage: int, world: int, bytes_per_weight: int
) -> ParamMemory:
    """Counts dense parameters; each ZeRO stage divides one more part over all ranks."""
    total = num_elements(params)
    # above stage 0 DeepSpeed keeps a master copy even for float32 parameters
    has_master = stage > 0 or bytes_per_weight < FLOAT_BYTES
    state_parts = world if stage >= 1 else 1
    gradient_parts = world if stage >= 2 else 1
    weight_parts = world if stage == 3 else 1
    return ParamMemory(
        parameters=total // weight_parts,
        weights=total * bytes_per_weight // weight_parts,
        gradients=total * bytes_per_weight // gradient_parts,
        masters=total * FLOAT_BYTES // state_parts if has_master else 0,
        state=total * ADAM_STATE_BYTES // state_parts,
    )


def _expert_memory(
    params: list[nn.Parameter], config: Config, world: int, bytes_per_weight: int
) -> ParamMemory:
    """Counts a rank's experts, and the optimizer state for its share of their updates."""
    ep = config.mesh.ep
    local = 0  # elements on this rank
    largest_stack = 0  # elements in its largest stacked parameter
    updated = 0  # elements updated by this rank
    updated_rows_and_columns = 0  # rows + columns in their matrices: the factored state's size
    for stack in params:
        num_updated = _num_updated_matrices(stack, ep, world)
        local += stack.numel() // ep
        largest_stack = max(largest_stack, stack.numel() // ep)
        updated += num_updated * stack[0].numel()
        updated_rows_and_columns += num_updated * (stack.shape[1] + stack.shape[2])
    # an update inside backward frees each stack's gradient before the next one is computed
    fused = config.optim.fuse_expert_update_in_backward
    if config.optim.expert_optimizer == "adam":
        state = updated * ADAM_STATE_BYTES
    else:
        state = updated_rows_and_columns * FLOAT_BYTES
    return ParamMemory(
        parameters=local,
        weights=local * bytes_per_weight,
        gradients=(largest_stack if fused else local) * FLOAT_BYTES,
        masters=updated * FLOAT_BYTES if bytes_per_weight < FLOAT_BYTES else 0,
        state=state,
    )


def _gate_memory(params: list[nn.Parameter], ep: int, world: int) -> ParamMemory:
    """Counts the gates inside expert groups, which are float32 in every precision."""
    local = 0
    updated = 0
    for stack in params:
        local += stack.numel() // ep
        updated += _num_updated_matrices(stack, ep, world) * stack[0].numel()
    return ParamMemory(
        parameters=local,
        weights=local * FLOAT_BYTES,
        gradients=local * FLOAT_BYTES,
        masters=0,
        state=updated * ADAM_STATE_BYTES,
    )


def _row_memory(
    params: list[nn.Parameter], bytes_per_weight: int, master_bytes: int
) -> ParamMemory:
    """Counts row-sparse matrices, without their gradients, which have only a few rows."""
    total = num_elements(params)
    return ParamMemory(
        parameters=total,
        weights=total * bytes_per_weight,
        gradients=0,
        masters=total * master_bytes,
        state=total * ADAM_STATE_BYTES,
    )


def _num_updated_matrices(stack: nn.Parameter, ep: int, world: int) -> int:
    """Returns how many matrices the first replica updates (the largest share)."""
    num_local = stack.shape[0] // ep
    num_replicas = world // ep
    return -(-num_local // num_replicas)


def bytes_per_element(ds: dict[str, Any]) -> int:
    """Returns the bytes per weight or activation: 2 in bf16, else 4."""
    return 2 if ds.get("bf16", {}).get("enabled") else FLOAT_BYTES


def per_rank(
    model: nn.Module, config: Config, layout: BatchLayout, ds: dict[str, Any]
) -> dict[str, Any]:
    """Estimates one rank's parameters and memory.

    Args:
        model: The plain model, on the meta device.
        config: The config, with its expert-parallel degree.
        layout: The batch layout.
        ds: The DeepSpeed config.

    Returns:
        "parameters": element count; "memory_bytes": bytes by kind, without empty kinds.
    """
    by_kind = param_memory(model, config, layout, ds)
    dense = by_kind["dense"]
    experts = by_kind["experts"]
    gates = by_kind["gates"]
    rows = by_kind["rows"]
    memory_bytes = {
        "dense parameters": dense.weights,
        "dense gradients": dense.gradients,
        "dense optimizer": dense.masters + dense.state,
        "expert parameters": experts.weights,
        "expert gradients": experts.gradients,
        "expert optimizer": experts.masters + experts.state,
        "gates of groups": gates.weights + gates.gradients + gates.state,
        "rows of the vocabulary": rows.weights + rows.masters + rows.state,
        "activations": activation_bytes(
            model, config, layout.samples_per_rank, bytes_per_element(ds)
        ),
    }
    return {
        "parameters": sum(memory.parameters for memory in by_kind.values()),
        "memory_bytes": {kind: size for kind, size in memory_bytes.items() if size},
    }


# Activation memory


def expert_rows_per_sample(plain: Any, config: Config) -> int:
    """Returns how many rows an MoE layer sends to experts per sample, without padding or drops."""
    experts = moe_section(config)
    if not experts:
        return 0
    _, moe = experts
    tokens = config.batch.seq_len if isinstance(config.model, LSTMConfig) else plain.num_tokens
    has_groups = isinstance(moe, MoEConfig) and moe.num_groups is not None
    return tokens * moe.k ** (2 if has_groups else 1)


def activation_bytes(
    plain: Any, config: Config, samples: int, width: int, rows: float | None = None
) -> int:
    """Estimates how many bytes one micro-batch keeps for backward on a rank.

    The estimate adds up the tensors saved by forward, with expert rows spread evenly over ranks.

    Args:
        plain: The plain model.
        config: The config.
        samples: This rank's samples in the micro-batch.
        width: Bytes per activation.
        rows: Rows per sample sent to experts by one MoE layer, if known; by default
            `expert_rows_per_sample`.

    Returns:
        Bytes.
    """
    if rows is None:
        rows = expert_rows_per_sample(plain, config)
    if isinstance(config.model, LSTMConfig):
        tokens = samples * config.batch.seq_len
        layers = _lstm_activation_bytes(config.model, tokens, int(samples * rows), width)
        return layers + _softmax_chunk_bytes(config)
    # attention reads a mask over tokens only if samples have padding
    mask_tokens = plain.num_tokens if isinstance(config.model, TextConfig) else 0
    encoder = config.model.encoder
    numbers_per_sample = plain.num_tokens * plain.encoder.activations_per_token(mask_tokens)
    # hidden units are kept before GELU and after it
    kept_units = 0 if encoder.recompute else 2 * encoder.moe.expert_hidden_dim
    numbers_per_row = plain.encoder.num_moe_uses * kept_per_row(encoder.dim, kept_units)
    return int(samples * (numbers_per_sample + rows * numbers_per_row) * width)


def kept_per_row(dim: int, units: int) -> int:
    """Returns how many numbers per row an MoE layer keeps for backward each time it runs.

    These are the expert's input, its hidden units, its output, and the output times the gate
    weight.

    Args:
        dim: Model width.
        units: Number of hidden units kept.

    Returns:
        An element count.
    """
    return 3 * dim + units


def _lstm_activation_bytes(model: LSTMConfig, tokens: int, rows: int, width: int) -> int:
    """Returns how many bytes an LSTM language model's layers keep for backward.

    Each layer keeps its input, its output and its dropout mask. CPU kernels keep LSTM gates and
    cells in float32; MoE gate scores are float32 too.
    """
    moe = model.moe
    layers = LAYERS[model.middle_layer]
    units = model.lstm_units or model.dim
    narrow = 3 * model.dim * (1 + len(layers))  # numbers per token, `width` bytes each
    float32 = 0  # numbers per token, 4 bytes each
    numbers_per_row = 0
    for name in layers:
        if name != "middle":
            float32 += 14 * units
    if model.middle_layer == "ffn":
        narrow += model.ffn_hidden_dim * model.ffn_layers
    if model.middle_layer == "moe":
        num_choices = moe.num_groups or moe.num_experts
        float32 += 8 * num_choices
        if moe.num_groups:
            float32 += 8 * moe.k * (moe.num_experts // num_choices)
        numbers_per_row = kept_per_row(model.dim, 0 if moe.recompute else moe.expert_hidden_dim)
    per_token_bytes = narrow * width + float32 * FLOAT_BYTES
    return tokens * per_token_bytes + rows * numbers_per_row * width


def _softmax_chunk_bytes(config: Config) -> int:
    """Returns the bytes for a chunk's logits, their gradient, and the softmax matrix's gradient."""
    assert isinstance(config.model, LSTMConfig)
    columns = _logits_per_target(config)
    chunk_tokens = max(TOKENS_PER_CHUNK, LOGITS_PER_CHUNK // columns)
    return FLOAT_BYTES * columns * (2 * chunk_tokens + config.model.dim)


# Dispatchers


@dataclass(frozen=True)
class GateChoice:
    """An MoE layer's (primary) gate choice for each token.

    Attributes:
        num_choices: Number of experts, or expert groups, to choose from.
        k: Number of experts or groups chosen.
        has_groups: True if the gate chooses groups.
    """

    num_choices: int
    k: int
    has_groups: bool


def gate_choice(config: Config) -> GateChoice:
    """Returns the gates' choice for a config with experts."""
    experts = moe_section(config)
    assert experts
    _, moe = experts
    num_groups = moe.num_groups if isinstance(moe, MoEConfig) else None
    return GateChoice(num_groups or moe.num_experts, moe.k, num_groups is not None)


def layout_dispatcher(config: Config, ranks_per_node: int) -> str:
    """Returns the kind of dispatcher `parallelize` builds for a config.

    Args:
        config: The config, with dispatcher and expert-parallel degree.
        ranks_per_node: Ranks on each node.

    Returns:
        A `dispatcher_choice.dispatcher_kind` result; "local" for a model without experts.

    Raises:
        ValueError: The layout cannot have the configured dispatcher.
    """
    if not moe_section(config):
        return "local"
    choice = gate_choice(config)
    return dispatcher_kind(
        config.mesh.dispatcher, choice.num_choices, choice.k, config.mesh.ep, ranks_per_node
    )


# The report


def describe_layout(
    config: Config, layout: BatchLayout, ds: dict[str, Any], model: nn.Module, num_nodes: int
) -> dict[str, Any]:
    """Returns the contents of RUN/layout.json: all facts about a config on a layout.

    Args:
        config: The config, with its expert-parallel degree.
        layout: The batch layout.
        ds: The DeepSpeed config.
        model: The plain model, on the meta device.
        num_nodes: Node count.

    Returns:
        The facts by name, as JSON values.
    """
    ep = config.mesh.ep
    report: dict[str, Any] = {
        "config": config.name,
        "world": layout.world,
        "nodes": num_nodes,
        "ep": ep,
        "edp": layout.world // ep,
        "zero_stage": ds["zero_optimization"]["stage"],
        "dtype": "bf16" if bytes_per_element(ds) == 2 else "fp32",
        "global_batch_size": layout.global_batch_size,
        "grad_accum_steps": layout.grad_accum_steps,
        "samples_per_rank": layout.samples_per_rank,
        **count_params_and_flops(model, config),
    }
    if isinstance(config.model, LSTMConfig):
        report["seq_len"] = config.batch.seq_len
    experts = moe_section(config)
    if experts:
        _, moe = experts
        ranks_per_node = layout.world // num_nodes
        num_groups = moe.num_groups if isinstance(moe, MoEConfig) else None
        report |= {
            "num_experts": moe.num_experts,
            "experts_per_rank": moe.num_experts // ep,
            "experts_per_token": moe.k if num_groups is None else moe.k**2,
            "num_groups": num_groups,
            "dispatcher": layout_dispatcher(config, ranks_per_node),
            "experts_by_node": _experts_by_node(moe.num_experts, ep, ranks_per_node),
        }
    report["per_rank"] = per_rank(model, config, layout, ds)
    return report


def _experts_by_node(num_experts: int, ep: int, ranks_per_node: int) -> list[tuple[int, int]]:
    """Returns the (first, last) expert on each node in an expert-parallel group.

    Each node has consecutive experts, and so consecutive expert groups. The list is empty if some
    expert-parallel groups begin inside one node and end on another.
    """
    if ranks_per_node % ep and ep % ranks_per_node:
        return []
    num_nodes = max(1, ep // ranks_per_node)
    experts_per_node = num_experts // num_nodes
    return [
        (first, first + experts_per_node - 1) for first in range(0, num_experts, experts_per_node)
    ]


def format_layout(report: dict[str, Any]) -> str:
    """Formats a `describe_layout` report as lines for a terminal."""
    memory_bytes = report["per_rank"]["memory_bytes"]
    rows = [*_batch_rows(report), *_expert_rows(report), *_parameter_rows(report)]
    rows.append(("memory per rank, estimated", f"{format_bytes(sum(memory_bytes.values())):>11}"))
    for kind, size in memory_bytes.items():
        rows.append((f"  {kind}", f"{format_bytes(size):>11}"))
    return "\n".join(f"{name:<32}{value}" for name, value in rows)


def _batch_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns (name, value) rows about ranks, precision and the batch."""
    nodes = f"{report['nodes']} node" + ("s" if report["nodes"] > 1 else "")
    axes = f"{report['edp']} expert-data (edp) x {report['ep']} expert parallel (ep)"
    tokens = f" x {report['seq_len']} tokens" if "seq_len" in report else ""
    micro_batch = f"{report['samples_per_rank']} samples, {report['grad_accum_steps']} per step"
    return [
        ("ranks", f"{report['world']} on {nodes} = {axes}"),
        ("ZeRO stage, precision", f"{report['zero_stage']}, {report['dtype']}"),
        ("batch", f"{report['global_batch_size']} samples{tokens}, all ranks together"),
        ("micro-batch per rank", micro_batch),
    ]


# dispatcher -> the rows it sends
_ROWS_SENT = {
    "all_to_all": "one row for each chosen expert, or group",
    "dedup_rank": "one row to each rank that has a chosen expert",
    "dedup_node": "one row to each node that has a chosen expert, and on to its ranks",
}


def _expert_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns (name, value) rows about experts; none for a model without experts."""
    if "num_experts" not in report:
        return []
    token = "word" if "seq_len" in report else "token"
    num_chosen = report["experts_per_token"]
    share = f"{report['experts_per_rank']} per rank, {num_chosen} per {token}"
    rows = [("experts", f"{report['num_experts']} in all, {share}")]
    num_groups = report["num_groups"]
    if num_groups:
        groups_per_rank = num_groups // report["ep"]
        share = f"{groups_per_rank} per rank, {num_chosen**0.5:.0f} per {token}"
        rows.append(("groups of experts", f"{num_groups} in all, {share}"))
    dispatcher = report["dispatcher"]
    if dispatcher != "local":
        rows.append(("dispatcher", f"{dispatcher}: {_ROWS_SENT[dispatcher]}"))
    if report["nodes"] > 1:
        rows.append(("experts by node", _format_experts_by_node(report)))
    return rows


def _parameter_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns (name, value) rows about parameters and forward multiply-adds."""
    rows = [("parameters", f"{report['parameters']:,}")]
    per_rank_row = ("  per rank", f"{report['per_rank']['parameters']:,}")
    if "ops_per_timestep" not in report:
        multiply_adds = f"{report['multiply_adds_per_sample']:,} per sample, forward"
        return [*rows, per_rank_row, ("multiply-adds", multiply_adds)]
    inner = report["parameters_without_embedding_and_softmax"]
    ops = f"{report['ops_per_timestep']:,} multiply-adds per word, softmax excluded"
    return [
        *rows,
        ("  without embedding, softmax", f"{inner:,}"),
        ("  active per word", f"{report['active_parameters_per_word']:,}"),
        per_rank_row,
        ("ops per timestep", ops),
    ]


def _format_experts_by_node(report: dict[str, Any]) -> str:
    """Formats each node's expert ranges, for example "0-31 | 32-63"."""
    ranges = [f"{first}-{last}" for first, last in report["experts_by_node"]]
    if not ranges:
        ranks_per_node = report["world"] // report["nodes"]
        return f"some ep groups lie on two nodes ({ranks_per_node} ranks a node, ep {report['ep']})"
    if len(ranges) == 1:
        return "all on each"
    if len(ranges) > 4:
        ranges = [*ranges[:2], "...", ranges[-1]]
    return " | ".join(ranges)
