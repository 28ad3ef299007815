"""What gates and exchanges share: a routing, and what a gate tells of itself.

Legend: T tokens, K choices per token, N assignments, E experts (global), G balance groups.
"""

from dataclasses import dataclass
from fractions import Fraction

import torch

from moe_dist.nn.token_context import TokenContext


@dataclass(frozen=True)
class Routing:
    """A list of N assignments of tokens to experts, sorted by expert, in token order within an expert."""

    token_N: torch.Tensor  # int64
    gate_N: torch.Tensor  # weights, differentiable
    count_E: torch.Tensor  # int64, rows for each expert; sums to N


@dataclass(frozen=True)
class GateStats:
    """Sums over this rank's valid tokens; `importance_GE` and `load_GE` carry gradients."""

    importance_GE: torch.Tensor  # Eq. 6, by balance group
    load_GE: torch.Tensor  # Eq. 10, by balance group
    dropped: torch.Tensor  # int64 scalar, assignments over capacity


def build_routing(
    expert_TK: torch.Tensor, gate_TK: torch.Tensor, keep_TK: torch.Tensor, num_experts: int
) -> Routing:
    """The routing of the choices that are kept: token t goes to expert_TK[t, k] with weight gate_TK[t, k]."""
    kept_N = keep_TK.flatten().nonzero().squeeze(1)
    expert_N, order_N = expert_TK.flatten()[kept_N].sort(stable=True)
    choice_N = kept_N[order_N]
    return Routing(
        token_N=choice_N // expert_TK.shape[1],
        gate_N=gate_TK.flatten()[choice_N],
        count_E=torch.bincount(expert_N, minlength=num_experts),
    )


def capacity_mask(
    expert_TK: torch.Tensor, capacity_factor: float | None, ctx: TokenContext, num_experts: int
) -> torch.Tensor:
    """Which choices (T, K) are kept: those of valid tokens, and of each expert's the first `capacity` in a token group.

    capacity = ceil(capacity_factor * K * valid tokens of the group / num_experts), as Switch has it (Fedus et al.
    2021, section 2.2). First choices of all tokens come before second choices, then earlier tokens before later ones.
    """
    num_tokens, k = expert_TK.shape
    valid_TK = ctx.valid_T[:, None].expand(num_tokens, k)
    if capacity_factor is None:
        return valid_TK
    group_T = ctx.capacity_group_T
    tokens_G = torch.bincount(group_T[ctx.valid_T], minlength=ctx.num_capacity_groups)
    # a ratio of integers, small enough for int64: in floating point 1.2 x 50 / 4 comes out above 15 and rounds up to 16
    share = Fraction(str(capacity_factor)).limit_denominator(10**6) * k / num_experts
    capacity_G = -(-tokens_G * share.numerator // share.denominator)
    # queue of (group, expert), choice-major: a stable sort by queue leaves each queue in order of precedence
    queue_KT = (
        torch.where(
            valid_TK,
            group_T[:, None] * num_experts + expert_TK,
            ctx.num_capacity_groups * num_experts,
        )
        .t()
        .flatten()
    )
    queue_N, order_N = queue_KT.sort(stable=True)
    length_Q = torch.bincount(queue_N, minlength=ctx.num_capacity_groups * num_experts + 1)
    start_Q = length_Q.cumsum(0) - length_Q
    place_N = torch.arange(len(queue_N), device=queue_N.device) - start_Q[queue_N]
    place_KT = torch.empty_like(place_N).scatter_(0, order_N, place_N)
    return valid_TK & (place_KT.view(k, num_tokens).t() < capacity_G[group_T][:, None])


def sum_by_group(x_TE: torch.Tensor, ctx: TokenContext) -> torch.Tensor:
    """Sums over the valid tokens of each balance group: (G, E), float64, because balance losses are made of their small
    differences, and parts of them are summed on other ranks."""
    valid_TE = torch.where(ctx.valid_T[:, None], x_TE, x_TE.new_zeros(())).double()
    return valid_TE.new_zeros(ctx.num_balance_groups, x_TE.shape[1]).index_add(
        0, ctx.balance_group_T, valid_TE
    )


def sum_chosen_by_group(
    chosen_TK: torch.Tensor, x_TK: torch.Tensor, num_experts: int, ctx: TokenContext
) -> torch.Tensor:
    """The same, of what is x_TK[t, k] for expert chosen_TK[t, k] and zero for all others: (G, E)."""
    valid_TK = torch.where(ctx.valid_T[:, None], x_TK, x_TK.new_zeros(())).double()
    place_TK = ctx.balance_group_T[:, None] * num_experts + chosen_TK
    sums = valid_TK.new_zeros(ctx.num_balance_groups * num_experts)
    return sums.index_add(0, place_TK.flatten(), valid_TK.flatten()).view(-1, num_experts)
