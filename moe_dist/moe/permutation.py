"""Copies tokens to expert rows and sums each token's rows: each is the other's gradient.

Legend: T tokens, N rows (copies of tokens), D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moe_dist.distributed.buffer_pool import pooled_empty


class TokenPermutation:
    """Maps rows to tokens: row n is a copy of token_N[n]; a token can have zero or more copies.

    Attributes:
        token_N: Each row's token, int64.
        num_tokens: T.
    """

    def __init__(
        self,
        token_N: torch.Tensor,
        num_tokens: int,
        by_token: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Stores the rows' tokens.

        Args:
            token_N: Each row's token, int64.
            num_tokens: T.
            by_token: What the property `by_token` returns. None: ascending rows for each token.
        """
        self.token_N = token_N
        self.num_tokens = num_tokens
        self._by_token = by_token

    @property
    def by_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the row indices in token order (N,), and each token's first position (T,)."""
        if self._by_token is None:
            count_T = torch.bincount(self.token_N, minlength=self.num_tokens)
            first_T = count_T.cumsum(0) - count_T
            self._by_token = (self.token_N.argsort(stable=True), first_T)
        return self._by_token

    def reordered(self, order_N: torch.Tensor) -> "TokenPermutation":
        """Returns the same rows in another order: its row n is row order_N[n] of this permutation.

        `unpermute` still adds a token's rows in this permutation's order, so it rounds equally.
        """
        by_token_N, first_T = self.by_token
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        by_token = (place_N[by_token_N], first_T)
        return TokenPermutation(self.token_N[order_N], self.num_tokens, by_token)

    def permute(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Copies tokens (T, D) to rows (N, D); differentiable."""
        return _Permute.apply(x_TD, self)

    def unpermute(self, y_ND: torch.Tensor) -> torch.Tensor:
        """Sums each token's rows, (N, D) to (T, D); differentiable.

        It adds in ascending n (see `reordered`), in float32 or wider, and rounds once.
        """
        return _Unpermute.apply(y_ND, self)


def permute_rows(x_TD: torch.Tensor, permutation: TokenPermutation) -> torch.Tensor:
    """Copies tokens (T, D) to rows (N, D), without a gradient."""
    out_ND = pooled_empty(len(permutation.token_N), x_TD.shape[1], like=x_TD)
    return torch.index_select(x_TD, 0, permutation.token_N, out=out_ND)


def unpermute_rows(y_ND: torch.Tensor, permutation: TokenPermutation) -> torch.Tensor:
    """Sums each token's rows, (N, D) to (T, D), without a gradient."""
    order_N, first_T = permutation.by_token
    return F.embedding_bag(order_N, y_ND, first_T, mode="sum")


class _Permute(torch.autograd.Function):
    """Copies in forward, sums in backward."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, permutation: TokenPermutation) -> torch.Tensor:
        """Returns the rows."""
        ctx.permutation = permutation
        return permute_rows(x_TD, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_ND: torch.Tensor) -> tuple:
        """Returns the tokens' gradient."""
        return unpermute_rows(grad_ND[0].contiguous(), ctx.permutation), None


class _Unpermute(torch.autograd.Function):
    """Sums in forward, copies in backward."""

    @staticmethod
    def forward(ctx: Any, y_ND: torch.Tensor, permutation: TokenPermutation) -> torch.Tensor:
        """Returns the sums."""
        ctx.permutation = permutation
        return unpermute_rows(y_ND, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_TD: torch.Tensor) -> tuple:
        """Returns the rows' gradient."""
        return permute_rows(grad_TD[0].contiguous(), ctx.permutation), None
