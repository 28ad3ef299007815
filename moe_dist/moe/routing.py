"""The contract between gates and dispatchers: `Routing` (assignments) and `GateStats`.

The choice of experts (top k) is in `moe.gating`; this module sorts choices and limits them to the
capacity.

Legend: T tokens, K choices per token, N assignments, E experts (over all ranks), G balance groups.
"""

from dataclasses import dataclass
from fractions import Fraction

import torch

from moe_dist.nn.token_context import TokenContext


@dataclass(frozen=True)
class Routing:
    """Assignments of tokens to experts, sorted by expert, in token order within an expert.

    Attributes:
        token_N: Each assignment's token, int64.
        gate_N: Each assignment's gate weight, differentiable.
        count_E: Assignments per expert, int64; they sum to N.
    """

    token_N: torch.Tensor
    gate_N: torch.Tensor
    count_E: torch.Tensor


@dataclass(frozen=True)
class GateStats:
    """Sums over this rank's valid tokens.

    Attributes:
        importance_GE: Gate weights by balance group and expert (Shazeer et al. 2017, Eq. 6), with a
            gradient.
        load_GE: Load by balance group and expert (Eq. 10), with a gradient.
        dropped: Assignments over capacity, int64 scalar.
    """

    importance_GE: torch.Tensor
    load_GE: torch.Tensor
    dropped: torch.Tensor


def build_routing(
    expert_TK: torch.Tensor, gate_TK: torch.Tensor, keep_TK: torch.Tensor, num_experts: int
) -> Routing:
    """Builds a routing from each token's choices.

    Args:
        expert_TK: Each token's chosen experts, int64.
        gate_TK: Their gate weights.
        keep_TK: True for choices to keep, bool.
        num_experts: E.

    Returns:
        The N kept assignments, sorted by expert, in token order within an expert.
    """
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
    """Selects the choices that fit into their expert's capacity.

    In each capacity group, each expert keeps its first `capacity` choices:

        capacity = ceil(capacity_factor * K * valid tokens in the group / num_experts)

    as in Switch (Fedus et al. 2021, section 2.2). All first choices precede all second choices;
    among first choices, and among second choices, earlier tokens precede later tokens.

    Args:
        expert_TK: Each token's chosen experts, int64.
        capacity_factor: None keeps the choices of all valid tokens.
        ctx: The tokens' context.
        num_experts: E.

    Returns:
        (T, K), bool: True for each kept choice; False for padding.
    """
    num_tokens, k = expert_TK.shape
    valid_TK = ctx.valid_T[:, None].expand(num_tokens, k)
    if capacity_factor is None:
        return valid_TK
    group_T = ctx.capacity_group_T
    tokens_G = torch.bincount(group_T[ctx.valid_T], minlength=ctx.num_capacity_groups)
    # A ratio of small integers, so that the product fits int64. In floating point 1.2 x 50 / 4 is
    # above 15, and would be rounded up to 16.
    share = Fraction(str(capacity_factor)).limit_denominator(10**6) * k / num_experts
    capacity_G = -(-tokens_G * share.numerator // share.denominator)
    # One queue per (group, expert), and a last queue for padding. The choices are listed in order
    # of precedence (transposed to K x T); a stable sort by queue keeps this order in each queue.
    num_queues = ctx.num_capacity_groups * num_experts
    queue_TK = torch.where(valid_TK, group_T[:, None] * num_experts + expert_TK, num_queues)
    queue_N, order_N = queue_TK.t().flatten().sort(stable=True)
    length_Q = torch.bincount(queue_N, minlength=num_queues + 1)
    start_Q = length_Q.cumsum(0) - length_Q
    slot_N = torch.arange(len(queue_N), device=queue_N.device) - start_Q[queue_N]
    slot_KT = torch.empty_like(slot_N).scatter_(0, order_N, slot_N)
    return valid_TK & (slot_KT.view(k, num_tokens).t() < capacity_G[group_T][:, None])


def sum_by_group(x_TE: torch.Tensor, ctx: TokenContext) -> torch.Tensor:
    """Sums over the valid tokens in each balance group.

    Args:
        x_TE: One number per token and expert.
        ctx: The tokens' context.

    Returns:
        (G, E), float64, because balance losses are small differences between these sums, to which
        other ranks' parts are added.
    """
    zero = x_TE.new_zeros(())
    valid_TE = torch.where(ctx.valid_T[:, None], x_TE, zero).double()
    sums_GE = valid_TE.new_zeros(ctx.num_balance_groups, x_TE.shape[1])
    return sums_GE.index_add(0, ctx.balance_group_T, valid_TE)


def sum_chosen_by_group(
    chosen_TK: torch.Tensor, x_TK: torch.Tensor, num_experts: int, ctx: TokenContext
) -> torch.Tensor:
    """Sums a sparse input over the valid tokens in each balance group.

    Args:
        chosen_TK: Each value's column, int64.
        x_TK: The values; all other columns are zero.
        num_experts: Number of columns.
        ctx: The tokens' context.

    Returns:
        (G, E), float64, as for `sum_by_group`.
    """
    zero = x_TK.new_zeros(())
    valid_TK = torch.where(ctx.valid_T[:, None], x_TK, zero).double()
    index_TK = ctx.balance_group_T[:, None] * num_experts + chosen_TK
    sums = valid_TK.new_zeros(ctx.num_balance_groups * num_experts)
    sums = sums.index_add(0, index_TK.flatten(), valid_TK.flatten())
    return sums.view(-1, num_experts)
