"""What a config comes to on a mesh, counted on the meta device: no process group, no memory."""

from typing import Any

from torch import nn

from moe_dist.config import Config
from moe_dist.layer import MoE
from moe_dist.parallel.mesh import Layout

OUTSIDE = ("embedding.", "softmax.")  # left out of the paper's parameter and operation counts


def counts(model: nn.Module, config: Config) -> dict[str, int]:
    """Parameters and forward multiply-adds per word of a plain model, as Shazeer et al. 2017 count them (Table 7)."""
    named = dict(model.named_parameters())
    inner = {name: p for name, p in named.items() if not name.startswith(OUTSIDE)}
    layers = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    expert = {name for name in inner if any(name.startswith(f"{layer}.experts.") for layer in layers)}
    # a matrix costs a multiply-add per element, an expert's only for the k of num_experts that a word visits
    matrices = sum(p.numel() for name, p in inner.items() if name not in expert and p.dim() > 1)
    active_experts = sum(
        p.numel() * config.model.moe.k // config.model.moe.num_experts for name, p in inner.items() if name in expert
    )
    return {
        "parameters": sum(p.numel() for p in named.values()),
        "parameters_without_embedding_and_softmax": sum(p.numel() for p in inner.values()),
        "expert_parameters": sum(inner[name].numel() for name in expert),
        "ops_per_timestep": matrices + active_experts,
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
        rows += [("experts", f"{moe.num_experts} in all, {moe.num_experts // ep} per rank, {moe.k} per word")]
    rows += [
        ("parameters", f"{count['parameters']:,}"),
        ("without embedding, softmax", f"{count['parameters_without_embedding_and_softmax']:,}"),
        ("parameters per rank", f"{(dense // world if stage == 3 else dense) + count['expert_parameters'] // ep:,}"),
        ("ops per timestep", f"{count['ops_per_timestep']:,} multiply-adds per word, softmax excluded"),
    ]
    return "\n".join(f"{name:<28}{value}" for name, value in rows)
