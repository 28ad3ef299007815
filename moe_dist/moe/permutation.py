"""Rows that are copies of tokens, and the sum of what came of a token's copies: each the gradient of the other.

Legend: T tokens, N copies, D width.
"""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moe_dist.distributed.buffer_pool import pooled_empty


class TokenPermutation:
    """Row n is a copy of token token_N[n]; of a token there may be any number."""

    def __init__(self, token_N: torch.Tensor, num_tokens: int) -> None:
        self.token_N, self.num_tokens = token_N, num_tokens

    @cached_property
    def by_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The copies in order of their tokens (N,), and where each token's begin (T,)."""
        count_T = torch.bincount(self.token_N, minlength=self.num_tokens)
        return self.token_N.argsort(stable=True), count_T.cumsum(0) - count_T

    def reordered(self, order_N: torch.Tensor) -> "TokenPermutation":
        """The same copies in another order: first comes copy order_N[0]. Sums are taken in this one's."""
        by_token_N, first_T = self.by_token
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        other = TokenPermutation(self.token_N[order_N], self.num_tokens)
        other.__dict__["by_token"] = place_N[by_token_N], first_T
        return other

    def permute(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (N, D); differentiable."""
        return _Permute.apply(x_TD, self)

    def unpermute(self, y_ND: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (T, D), in ascending order of n and at least float32, rounded once; differentiable."""
        return _Unpermute.apply(y_ND, self)


def permute_rows(x_TD: torch.Tensor, copies: TokenPermutation) -> torch.Tensor:
    out = pooled_empty(len(copies.token_N), x_TD.shape[1], like=x_TD)
    return torch.index_select(x_TD, 0, copies.token_N, out=out)


def unpermute_rows(y_ND: torch.Tensor, copies: TokenPermutation) -> torch.Tensor:
    order_N, first_T = copies.by_token
    return F.embedding_bag(order_N, y_ND, first_T, mode="sum")


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, copies: TokenPermutation) -> torch.Tensor:
        ctx.copies = copies
        return permute_rows(x_TD, copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_ND: torch.Tensor) -> tuple:
        return unpermute_rows(grad_ND[0].contiguous(), ctx.copies), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: torch.Tensor, copies: TokenPermutation) -> torch.Tensor:
        ctx.copies = copies
        return unpermute_rows(y_ND, copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_TD: torch.Tensor) -> tuple:
        return permute_rows(grad_TD[0].contiguous(), ctx.copies), None
