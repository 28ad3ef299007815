"""What a config comes to on a mesh, counted on the meta device: no process group, no memory."""

from fractions import Fraction
from typing import Any

from torch import nn

from moe_dist.config import Config
from moe_dist.hierarchical import GroupProjection
from moe_dist.layer import MoE
from moe_dist.parallel.mesh import Layout

EMBEDDING_AND_SOFTMAX = ("embedding.", "softmax.")  # left out of the paper's parameter and operation counts


def counts(model: nn.Module, config: Config) -> dict[str, int]:
    """Parameters and forward multiply-adds per word of a plain model, as Shazeer et al. 2017 count them (Table 7)."""
    named = dict(model.named_parameters())
    inner = {name: p.numel() for name, p in named.items() if not name.startswith(EMBEDDING_AND_SOFTMAX)}
    # a matrix costs a multiply-add per element, those of experts and groups only for the part that a word visits
    active = {name: Fraction(1) if named[name].dim() > 1 else Fraction(0) for name in inner}
    moe, expert_parameters = config.model.moe, 0
    for layer_name, layer in model.named_modules():
        if isinstance(layer, MoE):
            for prefix, module in layer.experts.named_modules(prefix=f"{layer_name}.experts"):
                for key, p in module.named_parameters(recurse=False):
                    chosen = moe.k if moe.num_groups is None or isinstance(module, GroupProjection) else moe.k**2
                    active[f"{prefix}.{key}"] = Fraction(chosen, p.shape[0])
                    expert_parameters += p.numel()
    ops = int(sum(numel * active[name] for name, numel in inner.items()))
    return {
        "parameters": sum(p.numel() for p in named.values()),
        "parameters_without_embedding_and_softmax": sum(inner.values()),
        "expert_parameters": expert_parameters,
        "ops_per_timestep": ops,
        # multiply and add apart, forward and twice that in backward, the softmax too (section 5.1)
        "flops_per_word": 6 * (ops + config.model.dim * config.data.vocabulary_size),
    }


def table(config: Config, layout: Layout, ds: dict[str, Any], count: dict[str, int]) -> str:
    """The layout as lines for a terminal."""
    ep, world, moe = config.mesh.ep, layout.world, config.model.moe
    dense, stage = count["parameters"] - count["expert_parameters"], ds["zero_optimization"]["stage"]
    rows = [
        ("ranks", f"{world} = {world // ep} expert-data (edp) x {ep} expert parallel (ep)"),
        ("ZeRO stage, precision", f"{stage}, {'bf16' if ds.get('bf16', {}).get('enabled') else 'fp32'}"),
        ("batch", f"{config.batch.samples} samples x {config.batch.timesteps} timesteps, all ranks together"),
        ("micro-batch per rank", f"{layout.samples_per_rank} samples, {layout.accumulation} per step"),
    ]
    if count["expert_parameters"]:
        chosen = moe.k if moe.num_groups is None else moe.k**2
        rows += [("experts", f"{moe.num_experts} in all, {moe.num_experts // ep} per rank, {chosen} per word")]
    if count["expert_parameters"] and moe.num_groups is not None:
        rows += [("groups of experts", f"{moe.num_groups} in all, {moe.num_groups // ep} per rank, {moe.k} per word")]
    rows += [
        ("parameters", f"{count['parameters']:,}"),
        ("without embedding, softmax", f"{count['parameters_without_embedding_and_softmax']:,}"),
        ("parameters per rank", f"{(dense // world if stage == 3 else dense) + count['expert_parameters'] // ep:,}"),
        ("ops per timestep", f"{count['ops_per_timestep']:,} multiply-adds per word, softmax excluded"),
    ]
    return "\n".join(f"{name:<28}{value}" for name, value in rows)
