"""A hierarchical layer, its cases and what a slow reference computes for them.

Legend: T tokens, D width, a groups, b experts per group, E = a b experts, G balance groups.
"""

import dataclasses
import functools

import torch
from reference import relu_experts
from reference_hierarchical import Gates, HierarchicalLayer, hierarchical_moe
from torch import nn
from uneven_batch import (
    DIM,
    HIDDEN,
    NUM_SAMPLES,
    SEED,
    TIMESTEPS,
    Case,
    batch,
    context,
    drawn,
)
from uneven_batch import NUM_EXPERTS as NUM_GROUPS

from moe_dist.moe.gating.noisy_topk import NoisyTopK
from moe_dist.moe.hierarchical import ExpertGroups, HierarchicalMoE
from moe_dist.nn import token_noise
from moe_dist.nn.init import init_bounds, init_parameter
from moe_dist.nn.token_context import TokenContext

PER_GROUP = 3
NUM_EXPERTS = NUM_GROUPS * PER_GROUP
BALANCE = {"importance_loss_weight": 0.3, "load_loss_weight": 0.7}

CASES = {
    "k1": Case(k=1),
    "k2": Case(k=2),
    "whole_group": Case(k=PER_GROUP),
    "no_noise": Case(noise=False),
    "evaluation": Case(train=False),
    "k1_evaluation": Case(k=1, train=False),
    "balance_groups": Case(balance_loss_group_size=2),  # the second has no valid token
    "k1_balance_groups": Case(k=1, balance_loss_group_size=1),
}


def layer(case: Case, **balance: float) -> HierarchicalMoE:
    gate = NoisyTopK(DIM, NUM_GROUPS, case.k, noise=case.noise, **(BALANCE | balance))
    return HierarchicalMoE(
        gate, ExpertGroups(NUM_GROUPS, PER_GROUP, DIM, HIDDEN, case.k, noise=case.noise)
    )


class OneLayer(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.moe = layer(case)


@functools.cache
def secondary() -> dict[str, torch.Tensor]:
    """Returns the gates within all groups (a, D, b). They start at zero, which leaves ties
    without noise."""
    shape = (NUM_GROUPS, DIM, PER_GROUP)
    return {
        "moe.experts.w_gate.w_gDb": drawn(*shape, key="secondary"),
        "moe.experts.w_noise.w_gDb": 0.5 * drawn(*shape, key="secondary noise"),
    }


@torch.no_grad()
def fill_primary(gate: NoisyTopK) -> None:
    gate.w_gate.w_DE.copy_(batch()["w_gate"])
    gate.w_noise.w_DE.copy_(batch()["w_noise"])


def whole_layer(case: Case, **balance: float) -> HierarchicalMoE:
    """Returns the layer in one process without a mesh, with the initial values of every layout."""
    model = OneLayer(case)
    model.moe = layer(case, **balance)
    model.double()
    for name, bound in init_bounds(model).items():
        p = model.get_parameter(name)
        init_parameter(p, name, bound, SEED, range(len(p)) if ".experts." in name else None)
    fill_primary(model.moe.gate)
    with torch.no_grad():
        for name, value in secondary().items():
            model.get_parameter(name).copy_(value)
    return model.moe


# what they should have found


@functools.cache
def reference(case: Case) -> tuple[HierarchicalLayer, dict[str, torch.Tensor]]:
    """Returns the layer over the whole batch, and its leaves by the names of their gradients."""
    ctx = context(0, NUM_SAMPLES, case)
    plain = whole_layer(case)
    names = {"x": "dx", "w_gate": "d moe.gate.w_gate.w_DE", "w_noise": "d moe.gate.w_noise.w_DE"}
    leaf = {
        names[name]: value.clone().requires_grad_()
        for name, value in batch().items()
        if name in names
    }
    leaf |= {f"d {name}": value.clone().requires_grad_() for name, value in secondary().items()}
    leaf |= {f"d moe.experts.experts.{n}": p for n, p in plain.experts.experts.named_parameters()}
    noisy = case.noise and case.train
    gates = Gates(
        leaf["d moe.gate.w_gate.w_DE"],
        leaf["d moe.gate.w_noise.w_DE"],
        leaf["d moe.experts.w_gate.w_gDb"],
        leaf["d moe.experts.w_noise.w_gDb"],
        case.k,
        noise_of(ctx, 0, NUM_GROUPS) if noisy else None,
        noise_of(ctx, 1, NUM_EXPERTS) if noisy else None,
        valid_T=ctx.valid_T.tolist(),
        balance_group_T=[
            t // (TIMESTEPS * case.balance_loss_group_size) for t in range(len(ctx.valid_T))
        ],
        num_balance_groups=NUM_SAMPLES // case.balance_loss_group_size,
        **BALANCE,
    )
    experts = relu_experts(
        *(leaf[f"d moe.experts.experts.{name}"] for name in ("w1_eDF", "w2_eFD"))
    )
    return hierarchical_moe(leaf["dx"], gates, experts), leaf


def noise_of(ctx: TokenContext, level: int, channels: int) -> torch.Tensor:
    """Returns the noise of the whole batch (T, channels), by global id of a group or an expert."""
    return token_noise.token_normal(
        dataclasses.replace(ctx, gate_level=level), "gate", torch.arange(channels), torch.float64
    )


@functools.cache
def expected(case: Case) -> dict[str, torch.Tensor]:
    result, leaf = reference(case)
    ((batch()["weight"] * result.y_TD).sum() + result.balance_loss).backward()
    return {
        **{name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in leaf.items()},
        **{name[2:]: p.detach() for name, p in leaf.items() if ".experts.experts." in name},
        "y": result.y_TD.detach(),
        "balance_loss": result.balance_loss.detach(),
        "importance_E": result.importance_GE.detach().sum(0),
        "rows_E": torch.tensor(result.rows_E),
        "dropped": torch.tensor(0),
    }
