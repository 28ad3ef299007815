"""What a config comes to on a mesh, counted on the meta device: no process group, no memory."""

import functools
from collections import Counter
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

EMBEDDING_AND_SOFTMAX = (
    "embedding.",
    "softmax.",
)  # left out of the paper's parameter and operation counts
FLOAT = 4  # bytes
MOMENTS = 2 * FLOAT  # of Adam, a parameter


def param_kinds(model: nn.Module) -> dict[str, str]:
    """What each parameter of a plain model will be on a mesh, by name: "experts", "gates" (inside groups of experts),
    "rows" (updated by row) or "dense"."""
    kind = {name: "dense" for name, _ in model.named_parameters()}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, MoE):
            for prefix, module in layer.get_submodule("experts").named_modules(
                prefix=f"{layer_name}.experts"
            ):
                spread = "gates" if isinstance(module, GroupProjection) else "experts"
                kind |= {
                    f"{prefix}.{key}": spread for key, _ in module.named_parameters(recurse=False)
                }
        if getattr(layer, "by_row", False):
            kind |= {
                f"{layer_name}.{key}": "rows" for key, _ in layer.named_parameters(recurse=False)
            }
    return kind


def count_params_and_flops(model: nn.Module, config: Config) -> dict[str, int]:
    """Parameters and forward multiply-adds of a plain model: of a language model per word, as Shazeer et al. 2017 count
    them (Table 7), of others per sample."""
    named, kind = dict(model.named_parameters()), param_kinds(model)
    told = {
        "parameters": sum(p.numel() for p in named.values()),
        "expert_parameters": sum(p.numel() for name, p in named.items() if kind[name] == "experts"),
    }
    return told | (
        _of_words(named, kind, config)
        if isinstance(config.model, LSTMConfig)
        else _of_samples(model, kind)
    )


def _of_words(
    named: dict[str, nn.Parameter], kind: dict[str, str], config: Config
) -> dict[str, int]:
    model = config.model
    assert isinstance(model, LSTMConfig)
    moe = model.moe
    chosen = {"experts": moe.k if moe.num_groups is None else moe.k**2, "gates": moe.k}
    # of experts and groups a word visits a few, of the embedding it takes one row, of a sampled softmax some
    chosen |= {"rows": _softmax_columns(config)}
    share = {
        n: Fraction(chosen[kind[n]], p.shape[0]) if kind[n] in chosen else Fraction(1)
        for n, p in named.items()
    }
    share["embedding.weight"] = Fraction(1, len(named["embedding.weight"]))
    inner = [name for name in named if not name.startswith(EMBEDDING_AND_SOFTMAX)]
    # a matrix costs a multiply-add per element
    ops = int(sum(named[name].numel() * share[name] for name in inner if named[name].dim() > 1))
    return {
        "parameters_without_embedding_and_softmax": sum(named[name].numel() for name in inner),
        "active_parameters_per_word": int(
            sum(p.numel() * share[name] for name, p in named.items())
        ),
        "ops_per_timestep": ops,
        # multiply and add apart, forward and twice that in backward, the softmax too (section 5.1)
        "flops_per_unit": 6 * (ops + model.dim * _softmax_columns(config)),
    }


def _of_samples(model: Any, kind: dict[str, str]) -> dict[str, int]:
    """Of a model that tells how many rows each of its matrices meets."""
    rows, chosen = model.rows_per_sample(), model.encoder.num_chosen
    ops = model.encoder.attention_multiply_adds(model.num_tokens)
    for name, p in model.named_parameters():
        matrix = p.dim() > 1 and p.shape[-2] > 1  # not biases of experts
        times = next((times for prefix, times in rows.items() if name.startswith(prefix)), 0)
        ops += (
            matrix
            * times
            * p.numel()
            * (Fraction(chosen, p.shape[0]) if kind[name] == "experts" else 1)
        )
    return {"multiply_adds_per_sample": int(ops), "flops_per_unit": 6 * int(ops)}


def _softmax_columns(config: Config) -> int:
    """Words whose logits are taken for one target in training, on average."""
    assert isinstance(config.model, LSTMConfig) and isinstance(config.data, TextDataConfig)
    size, samples = config.data.vocabulary_size, config.model.softmax_samples
    return size if samples is None else 1 + round(expected_distinct_words(size, samples))


@functools.cache
def expected_distinct_words(vocabulary_size: int, samples: int) -> float:
    """Words among `samples` draws, on average: of negatives, and about so of a text."""
    return inclusion_probability(vocabulary_size, samples).sum().item()


def param_memory(
    model: nn.Module, config: Config, layout: BatchLayout, ds: dict[str, Any]
) -> dict[str, dict[str, int]]:
    """What of parameters one rank holds: {"dense", "experts", "gates", "rows": {"parameters": a number, "weights",
    "gradients", "masters", "state": bytes}}.

    Exact but for padding, and "rows" as if every row had been touched; of experts that replicas share it is the rank
    that owns the most.
    """
    stage, ep, world = ds["zero_optimization"]["stage"], config.mesh.ep, layout.world
    bf16 = bool(ds.get("bf16", {}).get("enabled"))
    width = bytes_per_element(ds)
    held: Counter[str] = Counter()  # parameters of a rank before ZeRO
    owned: Counter[str] = Counter()  # of experts and gates, those that the rank updates
    factored = 0  # rows and columns of expert matrices that it updates
    largest = 0  # stack of expert matrices on a rank
    for name, kind in param_kinds(model).items():
        p = model.get_parameter(name)
        spread = kind in ("experts", "gates")
        held[kind] += p.numel() // (ep if spread else 1)
        if spread:
            matrices = -(-(p.shape[0] // ep) // (world // ep))
            owned[kind] += matrices * p[0].numel()
        if kind == "experts":
            factored += matrices * (p.shape[1] + p.shape[2])
            largest = max(largest, p.numel() // ep)
    dense, experts, gates, rows = (held[kind] for kind in ("dense", "experts", "gates", "rows"))
    master, parts = FLOAT if bf16 else 0, world if stage else 1
    return {
        "dense": {
            "parameters": dense // (world if stage == 3 else 1),
            "weights": dense * width // (world if stage == 3 else 1),
            "gradients": dense * width // (world if stage >= 2 else 1),
            # above stage 0 DeepSpeed keeps a master of float32 parameters too
            "masters": dense * (FLOAT if stage else master) // parts,
            "state": dense * MOMENTS // parts,
        },
        "experts": {
            "parameters": experts,
            "weights": experts * width,
            "gradients": (largest if config.optim.fuse_expert_update_in_backward else experts)
            * FLOAT,
            "masters": owned["experts"] * master,
            "state": owned["experts"] * MOMENTS
            if config.optim.expert_optimizer == "adam"
            else factored * FLOAT,
        },
        "gates": {
            "parameters": gates,
            "weights": gates * FLOAT,
            "gradients": gates * FLOAT,
            "masters": 0,
            "state": owned["gates"] * MOMENTS,
        },
        "rows": {
            "parameters": rows,
            "weights": rows * width,
            "gradients": 0,
            "masters": rows * master,
            "state": rows * MOMENTS,
        },
    }


def bytes_per_element(ds: dict[str, Any]) -> int:
    """Bytes of a parameter and of an activation."""
    return 2 if ds.get("bf16", {}).get("enabled") else FLOAT


def per_rank(
    model: nn.Module, config: Config, layout: BatchLayout, ds: dict[str, Any]
) -> dict[str, Any]:
    """{"parameters": numbers, "memory_bytes": by kind, an estimate}: what one rank holds, by `held`. Activations follow
    from the widths of what is kept for backward."""
    of = param_memory(model, config, layout, ds)
    memory = {
        "dense parameters": of["dense"]["weights"],
        "dense gradients": of["dense"]["gradients"],
        "dense optimizer": of["dense"]["masters"] + of["dense"]["state"],
        "expert parameters": of["experts"]["weights"],
        "expert gradients": of["experts"]["gradients"],
        "expert optimizer": of["experts"]["masters"] + of["experts"]["state"],
        "gates of groups": sum(of["gates"][each] for each in ("weights", "gradients", "state")),
        "rows of the vocabulary": sum(of["rows"][each] for each in ("weights", "masters", "state")),
        "activations": activation_bytes(
            model, config, layout.samples_per_rank, bytes_per_element(ds)
        ),
    }
    return {
        "parameters": sum(each["parameters"] for each in of.values()),
        "memory_bytes": {kind: size for kind, size in memory.items() if size},
    }


def expert_rows_per_sample(plain: Any, config: Config) -> int:
    """Rows that one use of a mixture gets from a sample without padding, where none is dropped."""
    experts = moe_section(config)
    tokens = config.batch.seq_len if isinstance(config.model, LSTMConfig) else plain.num_tokens
    if not experts:
        return 0
    grouped = isinstance(experts[1], MoEConfig) and experts[1].num_groups is not None
    return tokens * experts[1].k ** (2 if grouped else 1)


def activation_bytes(
    plain: Any, config: Config, samples: int, width: int, rows: float | None = None
) -> int:
    """Bytes that one micro-batch of `samples` keeps for backward on a rank, its rows spread evenly over ranks. `rows`:
    those of a sample in a use of a mixture, where that is known; else `expert_rows_per_sample`."""
    rows = expert_rows_per_sample(plain, config) if rows is None else rows
    if isinstance(config.model, LSTMConfig):
        tokens = samples * config.batch.seq_len
        return _of_lstm(config.model, tokens, int(samples * rows), width) + _softmax(config)
    encoder = config.model.encoder
    kept = plain.num_tokens * plain.encoder.activations_per_token(_masked(config, plain.num_tokens))
    units = 0 if encoder.recompute else 2 * encoder.moe.expert_hidden_dim  # before GELU and after
    kept_of_rows = plain.encoder.num_moe_uses * kept_per_row(encoder.dim, units)
    return int(samples * (kept + rows * kept_of_rows) * width)


def kept_per_row(dim: int, units: int) -> int:
    """Numbers that one use of a mixture keeps for backward of each row: what its expert reads, its hidden `units`,
    what it gives, and that weighted."""
    return 3 * dim + units


def _masked(config: Config, tokens: int) -> int:
    """What a token may see is told to attention where samples have padding."""
    return tokens if isinstance(config.model, TextConfig) else 0


def _of_lstm(model: LSTMConfig, tokens: int, rows: int, width: int) -> int:
    """Per layer its input, its output and the mask of dropout; an LSTM's gates and cells in float32, as CPU kernels
    keep them; scores."""
    moe, layers = model.moe, LAYERS[model.middle_layer]
    units = model.lstm_units or model.dim
    narrow, wide = (
        3 * model.dim * (1 + len(layers)),
        sum(14 * units for name in layers if name != "middle"),
    )
    if model.middle_layer == "ffn":
        narrow += model.ffn_hidden_dim * model.ffn_layers
    if model.middle_layer == "moe":
        groups = moe.num_groups or moe.num_experts
        wide += 8 * groups + (8 * moe.k * (moe.num_experts // groups) if moe.num_groups else 0)
    per_row = (
        kept_per_row(model.dim, 0 if moe.recompute else moe.expert_hidden_dim)
        if model.middle_layer == "moe"
        else 0
    )
    return tokens * (narrow * width + wide * FLOAT) + rows * per_row * width


def _softmax(config: Config) -> int:
    """Bytes of a chunk's logits with their gradient, and of the gradient of their matrix."""
    columns = _softmax_columns(config)
    assert isinstance(config.model, LSTMConfig)
    return (
        FLOAT
        * columns
        * (2 * max(TOKENS_PER_CHUNK, LOGITS_PER_CHUNK // columns) + config.model.dim)
    )


SENT = {
    "all_to_all": "for each chosen expert, or group",
    "dedup_rank": "to each rank that has one",
    "dedup_node": "to each node that has one, and on to its ranks",
}


def gate_choices(config: Config) -> tuple[int, int, bool]:
    """(experts or groups that the gate chooses from, how many it chooses, whether they are groups)."""
    experts = moe_section(config)
    assert experts
    groups = experts[1].num_groups if isinstance(experts[1], MoEConfig) else None
    return groups or experts[1].num_experts, experts[1].k, groups is not None


def dispatcher_of(config: Config, per_node: int) -> str:
    """What `parallelize.dispatcher_kind` says of a config on nodes of `per_node` ranks, or raises; "local" without experts."""
    return (
        dispatcher_kind(config.mesh.dispatcher, *gate_choices(config)[:2], config.mesh.ep, per_node)
        if moe_section(config)
        else "local"
    )


def describe_layout(
    config: Config, layout: BatchLayout, ds: dict[str, Any], model: nn.Module, num_nodes: int
) -> dict[str, Any]:
    """Everything that the table tells, for a program."""
    ep, experts = config.mesh.ep, moe_section(config)
    told: dict[str, Any] = {
        "config": config.name,
        "world": layout.world,
        "nodes": num_nodes,
        "ep": ep,
        "edp": layout.world // ep,
        "zero_stage": ds["zero_optimization"]["stage"],
        "dtype": "bf16" if ds.get("bf16", {}).get("enabled") else "fp32",
        "global_batch_size": layout.global_batch_size,
        "grad_accum_steps": layout.grad_accum_steps,
        "samples_per_rank": layout.samples_per_rank,
        **count_params_and_flops(model, config),
    }
    if isinstance(config.model, LSTMConfig):
        told["seq_len"] = config.batch.seq_len
    if experts:
        moe = experts[1]
        groups = moe.num_groups if isinstance(moe, MoEConfig) else None
        told |= {
            "num_experts": moe.num_experts,
            "experts_per_rank": moe.num_experts // ep,
            "experts_per_token": moe.k if groups is None else moe.k**2,
            "num_groups": groups,
            "dispatcher": dispatcher_of(config, layout.world // num_nodes),
            "experts_by_node": _by_node(moe.num_experts, ep, layout.world // num_nodes),
        }
    return told | {"per_rank": per_rank(model, config, layout, ds)}


def _by_node(num_experts: int, ep: int, ranks_per_node: int) -> list[tuple[int, int]]:
    """First and last expert on each node of an ep group, which are consecutive ones, and so are groups of experts.
    Empty where some ep groups begin in the middle of a node and end on another."""
    if ranks_per_node % ep and ep % ranks_per_node:
        return []
    each = num_experts // max(1, ep // ranks_per_node)
    return [(first, first + each - 1) for first in range(0, num_experts, each)]


def format_layout(told: dict[str, Any]) -> str:
    """What `describe_layout` tells, as lines for a terminal."""
    mine = told["per_rank"]
    nodes = f"{told['nodes']} node" + ("s" if told["nodes"] > 1 else "")
    steps, token = (f" x {told['seq_len']} tokens", "word") if "seq_len" in told else ("", "token")
    rows = [
        (
            "ranks",
            f"{told['world']} on {nodes} = {told['edp']} expert-data (edp) x {told['ep']} expert parallel (ep)",
        ),
        ("ZeRO stage, precision", f"{told['zero_stage']}, {told['dtype']}"),
        ("batch", f"{told['global_batch_size']} samples{steps}, all ranks together"),
        (
            "micro-batch per rank",
            f"{told['samples_per_rank']} samples, {told['grad_accum_steps']} per step",
        ),
    ]
    if "num_experts" in told:
        each = f"{told['experts_per_rank']} per rank, {told['experts_per_token']} per {token}"
        rows += [("experts", f"{told['num_experts']} in all, {each}")]
    if groups := told.get("num_groups"):
        each = (
            f"{groups // told['ep']} per rank, {told['experts_per_token'] ** 0.5:.0f} per {token}"
        )
        rows += [("groups of experts", f"{groups} in all, {each}")]
    if (kind := told.get("dispatcher", "local")) != "local":
        rows += [("dispatcher", f"{kind}: a row {SENT[kind]}")]
    if "num_experts" in told and told["nodes"] > 1:
        rows += [("experts by node", _shown_by_node(told))]
    rows += [("parameters", f"{told['parameters']:,}")]
    if "ops_per_timestep" in told:
        rows += [
            (
                "  without embedding, softmax",
                f"{told['parameters_without_embedding_and_softmax']:,}",
            ),
            ("  active per word", f"{told['active_parameters_per_word']:,}"),
            ("  per rank", f"{mine['parameters']:,}"),
            (
                "ops per timestep",
                f"{told['ops_per_timestep']:,} multiply-adds per word, softmax excluded",
            ),
        ]
    else:
        rows += [
            ("  per rank", f"{mine['parameters']:,}"),
            ("multiply-adds", f"{told['multiply_adds_per_sample']:,} per sample, forward"),
        ]
    rows += [("memory per rank, estimated", _size(sum(mine["memory_bytes"].values())))]
    rows += [(f"  {kind}", _size(size)) for kind, size in mine["memory_bytes"].items()]
    return "\n".join(f"{name:<32}{value}" for name, value in rows)


def _shown_by_node(told: dict[str, Any]) -> str:
    ranges = [f"{first}-{last}" for first, last in told["experts_by_node"]]
    if not ranges:
        return f"some ep groups lie on two nodes ({told['world'] // told['nodes']} ranks a node, ep {told['ep']})"
    if len(ranges) > 4:
        ranges = [*ranges[:2], "...", ranges[-1]]
    return " | ".join(ranges) if len(ranges) > 1 else "all on each"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:8.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:8.2f} MB"
