"""Experts as stacked weights.

`Experts.expert_ffn` is the reference in plain torch. `Experts.forward` computes the same, with a
fast kernel (`moe.kernels`) if one fits the device and the size.

Legend: T tokens, R rows sorted by expert, D width, F hidden units, e experts on this rank (all E
before `engine.parallelize`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_dist.moe.delayed_wgrad import DeferGrad, DelayedWeightGrads
from moe_dist.moe.kernels import kernel_choice
from moe_dist.moe.kernels.grouped_mm import GroupedMatmul
from moe_dist.moe.permutation import TokenPermutation
from moe_dist.moe.routing import Routing
from moe_dist.nn.init import uniform_parameter
from moe_dist.nn.token_context import TokenContext

# relu_mask(h_RF, which=.., ctx_R=..) -> (R, F), True for active hidden units. It replaces the test
# h_RF > 0 when a recorded run is replayed (`verify.choice_replay`). `which`: rows per expert
# (int64) or, in a dense network, the layer's number.
ReluMaskOverride = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class ExpertChunk:
    """Consecutive experts with their weights; callable like the whole module.

    Attributes:
        module: This rank's experts.
        needs_context: As for the module.
        first_expert: The chunk's first expert, an index on this rank.
        weights: The chunk's part of every weight stack.
        defer: Registers the functions to compute the weight gradients later.
    """

    module: nn.Module
    needs_context: bool
    first_expert: int
    weights: tuple[torch.Tensor, ...]
    defer: DeferGrad

    def __call__(
        self, x_TD: torch.Tensor, routing: Routing, ctx: TokenContext
    ) -> tuple[torch.Tensor, Any]:
        """Runs the module on these experts."""
        return self.module(x_TD, routing, ctx, chunk=self)


class Experts(nn.Module):
    """Two-layer ReLU networks without biases (Shazeer et al. 2017, Appendix C.1).

    An expert has 2 x dim x hidden_dim parameters.
    """

    needs_context = False

    def __init__(
        self, num_experts: int, dim: int, hidden_dim: int, recompute: bool = False
    ) -> None:
        """Creates the experts; `nn.init.init_parameter` fills their weights.

        Args:
            num_experts: Experts over all ranks.
            dim: Layer width.
            hidden_dim: Hidden units per expert.
            recompute: If True, recomputes hidden activations in backward instead of keeping them
                (Appendix D).
        """
        super().__init__()
        self.recompute = recompute
        self.relu_mask_override: ReluMaskOverride | None = None
        # If True, a GPU runs Triton's kernels instead of torch's. Off because they are not timed
        # on a GPU yet (`ours_triton` in benchmarks/layer.py); they are correct in Triton's
        # interpreter.
        self.use_triton = False
        self.w1_eDF = uniform_parameter(num_experts, dim, hidden_dim, bound=(3 / dim) ** 0.5)
        self.w2_eFD = uniform_parameter(num_experts, hidden_dim, dim, bound=(3 / hidden_dim) ** 0.5)

    def forward(
        self,
        x_TD: torch.Tensor,
        routing: Routing,
        ctx: TokenContext,
        chunk: ExpertChunk | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Sums each token's weighted expert outputs.

        Args:
            x_TD: Tokens (T, D).
            routing: Their assignments to this rank's experts, or to the chunk's.
            ctx: The tokens' context.
            chunk: The experts to run. None: all experts on this rank.

        Returns:
            The sums (T, D), and None: these experts have no statistics.
        """
        if chunk is None:
            first_expert = 0
            weights: tuple[torch.Tensor, ...] = tuple(self.parameters())
            defer = None
        else:
            first_expert = chunk.first_expert
            weights = chunk.weights
            defer = chunk.defer
        permutation = TokenPermutation(routing.token_N, len(x_TD))
        count_e = routing.count_E
        relu_mask = self._relu_mask(routing, ctx, first_expert)
        kernel = self._select_kernel(len(routing.token_N), x_TD, relu_mask, *weights)
        if kernel is not None:
            y_TD = kernel(
                x_TD,
                permutation,
                routing.gate_N,
                count_e,
                *weights,
                recompute=self.recompute,
                defer=defer,
            )
            return y_TD, None
        expert_ffn: Callable[..., torch.Tensor] = self.expert_ffn
        if self.recompute:
            expert_ffn = partial(checkpoint, self.expert_ffn, use_reentrant=False)
        y_RD = expert_ffn(permutation.permute(x_TD), count_e, relu_mask, defer, *weights)
        return permutation.unpermute(y_RD * routing.gate_N.to(x_TD.dtype)[:, None]), None

    def expert_ffn(
        self,
        x_RD: torch.Tensor,
        count_e: torch.Tensor,
        relu_mask: kernel_choice.ReluMask | None,
        defer: DeferGrad | None,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        """Computes relu(x @ w1) @ w2 for each row with its expert's weights.

        Args:
            x_RD: Rows (R, D), sorted by expert.
            count_e: Rows per expert, int64.
            relu_mask: Selects the active hidden units. None: those with a positive input.
            defer: Registers the functions to compute the weight gradients later. None: backward
                returns these gradients.
            *weights: w1 (e, D, F) and w2 (e, F, D).

        Returns:
            The outputs (R, D), before gate weights are applied.
        """
        w1_eDF, w2_eFD = weights
        h_RF = grouped_matmul(x_RD, w1_eDF, count_e, defer and partial(defer, 0))
        h_RF = masked_relu(h_RF, relu_mask)
        return grouped_matmul(h_RF, w2_eFD, count_e, defer and partial(defer, 1))

    @property
    def max_chunks(self) -> int:
        """Returns the number of experts on this rank: a chunk has at least one."""
        return len(self.w1_eDF)

    def split_experts(self, sizes: list[int]) -> list[ExpertChunk]:
        """Splits the experts into consecutive chunks; see `moe.interfaces.ChunkedExperts`.

        Args:
            sizes: Experts per chunk.

        Returns:
            The chunks; their weight gradients are computed after the row gradients have been sent.
        """
        delayed = DelayedWeightGrads(sizes, *self.parameters())
        chunks = []
        first_expert = 0
        for c, size in enumerate(sizes):
            defer = partial(delayed.defer, c)
            chunk = ExpertChunk(self, self.needs_context, first_expert, delayed.chunk(c), defer)
            chunks.append(chunk)
            first_expert += size
        return chunks

    def _relu_mask(
        self, routing: Routing, ctx: TokenContext, first_expert: int
    ) -> kernel_choice.ReluMask | None:
        """Returns `relu_mask_override` bound to these rows, None without an override."""
        if self.relu_mask_override is None:
            return None
        after = len(self.w1_eDF) - first_expert - len(routing.count_E)
        count_of_all_e = F.pad(routing.count_E, (first_expert, after))
        ctx_R = ctx.select(routing.token_N)
        return partial(self.relu_mask_override, which=count_of_all_e, ctx_R=ctx_R)

    def _select_kernel(
        self,
        num_rows: int,
        x_TD: torch.Tensor,
        relu_mask: kernel_choice.ReluMask | None,
        *weights: torch.Tensor,
    ) -> kernel_choice.FeedForward | None:
        """Returns the fast kernel for this work, None if plain torch is as fast."""
        w1_eDF, w2_eFD = weights
        return kernel_choice.select_kernel(
            num_rows, x_TD, w1_eDF, w2_eFD, relu_mask, self.use_triton
        )


class GeluExperts(Experts):
    """Two-layer GELU networks with biases, as in a transformer.

    An expert has 2 x dim x hidden_dim + hidden_dim + dim parameters. Each bias is a matrix with one
    row, for which a factored second moment is exact (`optim.expert_state.FactoredAdamParam`).
    """

    def __init__(
        self, num_experts: int, dim: int, hidden_dim: int, recompute: bool = False
    ) -> None:
        """Creates the experts; arguments as for `Experts`."""
        super().__init__(num_experts, dim, hidden_dim, recompute)
        self.b1_e1F = uniform_parameter(num_experts, 1, hidden_dim, bound=0.0)
        self.b2_e1D = uniform_parameter(num_experts, 1, dim, bound=0.0)

    def expert_ffn(
        self,
        x_RD: torch.Tensor,
        count_e: torch.Tensor,
        relu_mask: kernel_choice.ReluMask | None,
        defer: DeferGrad | None,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        """Computes gelu(x @ w1 + b1) @ w2 + b2 for each row; arguments as for `Experts`."""
        w1_eDF, w2_eFD, b1_e1F, b2_e1D = weights
        expert_e = torch.arange(len(count_e), device=x_RD.device)
        expert_R = expert_e.repeat_interleave(count_e, output_size=len(x_RD))
        h_RF = grouped_matmul(x_RD, w1_eDF, count_e, defer and partial(defer, 0))
        h_RF = h_RF + b1_e1F.squeeze(1)[expert_R]
        # One GELU, as in the paper and in ViT; the code of Xue et al. 2021 has a second one after
        # the output.
        h_RF = F.gelu(h_RF)
        y_RD = grouped_matmul(h_RF, w2_eFD, count_e, defer and partial(defer, 1))
        return y_RD + b2_e1D.squeeze(1)[expert_R]

    def _select_kernel(self, *_: object) -> None:
        """Returns None: recomputing GELU in backward was not faster (docs/log.md)."""
        return None


def masked_relu(h_RF: torch.Tensor, relu_mask: kernel_choice.ReluMask | None) -> torch.Tensor:
    """Returns ReLU(h_RF), or h_RF where `relu_mask` is on and 0 elsewhere."""
    if relu_mask is None:
        return h_RF.relu()
    return torch.where(relu_mask(h_RF), h_RF, 0)


def grouped_matmul(
    x_RD: torch.Tensor,
    w_eDF: torch.Tensor,
    count_e: torch.Tensor,
    defer: Callable[..., None] | None = None,
) -> torch.Tensor:
    """Multiplies each expert's rows by its matrix.

    Args:
        x_RD: Rows (R, D), sorted by expert.
        w_eDF: Matrices (e, D, F). An expert without rows gets a zero gradient.
        count_e: Rows per expert, int64.
        defer: Registers the function to compute `w_eDF`'s gradient later. None: backward returns
            the gradient.

    Returns:
        x @ w[i] for each row of each expert i, (R, F).
    """
    return GroupedMatmul.apply(x_RD, w_eDF, count_e, defer)
