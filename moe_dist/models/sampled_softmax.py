"""Softmax over a vocabulary and its negative log likelihood, one chunk of tokens at a time.

The logits of a whole batch (tokens x vocabulary) are the largest tensor of a language model, so
they are never stored. Forward computes a chunk's gradient while its logits exist; backward scales
it.

With `samples`, training uses a part of the vocabulary: S words are drawn from a log-uniform
distribution q (words are sorted by falling frequency), the same draws for every token of a step. A
token's candidates are the distinct drawn words and its target. Each candidate's logit, the
target's included, is corrected by the probability P_j = 1 - (1 - q_j)^S that word j is drawn (Jean
et al. 2015; Jozefowicz et al. 2016, section 3.1; Appendix C.1):

    s_j = l_j - log P_j        loss = -log(exp(s_target) / sum over candidates j of exp(s_j))

For a fixed set of candidates, each word y in it is the target with a probability proportional to
p_y / P_y: the target is always in the set, any other word only if it was drawn. So the loss has its
minimum at softmax(l) = p. The factors P_j treat draws as independent, as
`tf.nn.sampled_softmax_loss` does. The fixed number of draws changes the expected gradient by about
1 % (relative to the norm of p) with 10 draws from 30 words, and by 0.1 % with 200 from 2,000.

The training loss compares candidates only and is lower than the exact loss. Evaluation is exact.

Legend: T tokens, C tokens of a chunk, D width, V vocabulary, S draws, N drawn words (columns).
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_dist.nn import prng
from moe_dist.nn.init import uniform_parameter
from moe_dist.nn.token_context import TokenContext

LOGITS_PER_CHUNK = 2**21  # 8 MB in float32, about as large as a cache
TOKENS_PER_CHUNK = 64  # at least: with fewer, reading the matrix takes longer than multiplying


class Softmax(nn.Module):
    """A softmax output layer with bias.

    Attributes:
        samples: Draws in training; None for the exact loss.
        by_row: True if a step touches few rows, whose gradients are then sparse.
    """

    def __init__(self, dim: int, vocabulary_size: int, samples: int | None = None) -> None:
        """Creates weights (V, D) and biases (V,)."""
        super().__init__()
        self.samples = samples
        self.by_row = samples is not None
        self.w_VD = uniform_parameter(vocabulary_size, dim, bound=dim**-0.5)
        self.b_V = uniform_parameter(vocabulary_size, bound=0.0)

    def forward(
        self, x_TD: torch.Tensor, target_T: torch.Tensor, ctx: TokenContext
    ) -> torch.Tensor:
        """Returns the targets' negative log likelihood, summed over valid tokens.

        Args:
            x_TD: The model's output.
            target_T: The next words, int64.
            ctx: The tokens' context; `ctx.train` selects the sampled loss if there are `samples`.

        Returns:
            A scalar in nats, float32 or wider.
        """
        train = torch.is_grad_enabled()
        if self.samples is None or not ctx.train:
            return _ExactNLL.apply(x_TD, self.w_VD, self.b_V, target_T, ctx.valid_T, train)
        word_N, weight_N = draw_negatives(len(self.b_V), self.samples, ctx.seed, ctx.step)
        word_N = word_N.to(x_TD.device)
        weight_N = weight_N.to(x_TD.device)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        p_V = inclusion_probability(len(self.b_V), self.samples, x_TD.device)
        target_w_TD, target_b_T = self._rows(target_T)
        target_b_T = target_b_T.to(wide) - p_V[target_T].log().to(wide)
        w_ND, b_N = self._rows(word_N)
        # the target's column, if it is among the drawn words; else -1
        column_T = torch.searchsorted(word_N, target_T).clamp(max=len(word_N) - 1)
        column_T = torch.where(word_N[column_T] == target_T, column_T, -1)
        correction_N = weight_N.log().to(wide)
        return _SampledNLL.apply(
            x_TD,
            w_ND,
            b_N,
            correction_N,
            target_w_TD,
            target_b_T,
            column_T,
            ctx.valid_T,
            train,
        )

    def _rows(self, word_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns these words' rows, with sparse gradients: weights (N, D), biases (N,)."""
        w_ND = F.embedding(word_N, self.w_VD, sparse=True)
        b_N = torch.gather(self.b_V, 0, word_N, sparse_grad=True)
        return w_ND, b_N

    def log_probability(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Returns each word's log probability after each token: nats (T, V), float32 or wider."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return torch.addmm(self.b_V, x_TD, self.w_VD.t()).to(wide).log_softmax(1)


@functools.lru_cache(maxsize=8)  # for a large vocabulary it takes longer than a step's draws
def inclusion_probability(
    vocabulary_size: int, samples: int, device: torch.device | None = None
) -> torch.Tensor:
    """Returns each word's probability to be among a step's draws.

    The draws are with replacement from the log-uniform distribution
    q_j = log((j + 2) / (j + 1)) / log(V + 1).

    Args:
        vocabulary_size: The number of words V.
        samples: How many words are drawn.
        device: The result's device; None for the CPU.

    Returns:
        P_V, float64. All callers share it: it must not be written to.
    """
    rank_V = torch.arange(vocabulary_size, dtype=torch.float64)
    q_V = ((rank_V + 2) / (rank_V + 1)).log() / math.log(vocabulary_size + 1)
    return -torch.expm1(samples * torch.log1p(-q_V)).to(device)


def draw_negatives(
    vocabulary_size: int, samples: int, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a step's words, the same on every rank and in every micro-batch.

    Args:
        vocabulary_size: How many words there are.
        samples: How many words are drawn.
        seed: The run's seed.
        step: The step's number.

    Returns:
        The N distinct words among the draws (int64, ascending), and their 1 / P (float64).
    """
    u_S = prng.uniform(samples, seed, step, "negatives")
    drawn_S = ((u_S * math.log(vocabulary_size + 1)).exp().long() - 1).clamp(0, vocabulary_size - 1)
    word_N = drawn_S.unique()
    return word_N, 1 / inclusion_probability(vocabulary_size, samples)[word_N]


class _ExactNLL(torch.autograd.Function):
    """The targets' negative log likelihood in the vocabulary, summed over tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        w_VD: torch.Tensor,
        b_V: torch.Tensor,
        target_T: torch.Tensor,
        valid_T: torch.Tensor,
        train: bool,
    ) -> torch.Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        nll = x_TD.new_zeros((), dtype=wide)
        gradients = _ColumnGradients.create(x_TD, w_VD, b_V) if train else None
        for tokens in _token_chunks(len(x_TD), len(b_V)):
            x_CD = x_TD[tokens]
            target_C1 = target_T[tokens, None]
            valid_C = valid_T[tokens].to(wide)
            logit_CV = torch.addmm(b_V, x_CD, w_VD.t()).to(wide)
            chunk_nll, p_CV, sum_C = _chunk_softmax(logit_CV, target_C1, valid_C)
            nll += chunk_nll
            if gradients is not None:
                d_CV = _logit_gradient(p_CV, sum_C, target_C1, valid_C)
                gradients.add_chunk(tokens, d_CV, x_CD, w_VD)
        if gradients is not None:
            ctx.save_for_backward(gradients.dx_TD, gradients.dw_ND, gradients.db_N)
        return nll

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx_TD, dw_VD, db_V = _scaled(ctx.saved_tensors, grad[0])
        return dx_TD, dw_VD, db_V, None, None, None


class _SampledNLL(torch.autograd.Function):
    """The targets' negative log likelihood among their candidates, summed over tokens.

    The candidates are the target, which is the first column, and the N drawn words. Biases and
    corrections (-log P) of both are as wide as the loss, because a log P rounded to bf16 changes
    its word's probability by up to 3 %.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        w_ND: torch.Tensor,
        b_N: torch.Tensor,
        correction_N: torch.Tensor,
        target_w_TD: torch.Tensor,
        target_b_T: torch.Tensor,
        column_T: torch.Tensor,
        valid_T: torch.Tensor,
        train: bool,
    ) -> torch.Tensor:
        """Computes loss and gradients.

        Args:
            ctx: The autograd node.
            x_TD: The model's output.
            w_ND: The drawn words' weights.
            b_N: The drawn words' biases.
            correction_N: The drawn words' -log P.
            target_w_TD: The targets' weights.
            target_b_T: The targets' biases, corrected by their -log P.
            column_T: The target's column among the drawn words, -1 for none; it is masked.
            valid_T: True for tokens that count.
            train: True to compute gradients.

        Returns:
            The loss, summed over valid tokens: nats, scalar.
        """
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        nll = x_TD.new_zeros((), dtype=wide)
        gradients = _ColumnGradients.create(x_TD, w_ND, b_N) if train else None
        d_target_T = x_TD.new_zeros(len(x_TD), dtype=wide)
        for tokens in _token_chunks(len(x_TD), len(b_N)):
            x_CD = x_TD[tokens]
            valid_C = valid_T[tokens].to(wide)
            logit_CN = torch.addmm(b_N, x_CD, w_ND.t()).to(wide)
            logit_CN += correction_N
            _mask_columns(logit_CN, column_T[tokens, None])
            target_C1 = (x_CD.to(wide) * target_w_TD[tokens]).sum(1, keepdim=True)
            logits = torch.cat([target_C1 + target_b_T[tokens, None], logit_CN], 1)
            first_C1 = torch.zeros_like(column_T[tokens, None])
            chunk_nll, p, sum_C = _chunk_softmax(logits, first_C1, valid_C)
            nll += chunk_nll
            if gradients is not None:
                d = _logit_gradient(p, sum_C, first_C1, valid_C)
                d_target_T[tokens] = d[:, 0]
                gradients.add_chunk(tokens, d[:, 1:], x_CD, w_ND)
        if gradients is not None:
            narrow_T1 = d_target_T.to(x_TD.dtype)[:, None]
            gradients.dx_TD.add_(narrow_T1 * target_w_TD)
            ctx.save_for_backward(
                gradients.dx_TD, gradients.dw_ND, gradients.db_N, narrow_T1 * x_TD, d_target_T
            )
        return nll

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx_TD, dw_ND, db_N, d_target_w_TD, d_target_b_T = _scaled(ctx.saved_tensors, grad[0])
        return dx_TD, dw_ND, db_N, None, d_target_w_TD, d_target_b_T, None, None, None


@dataclass(frozen=True)
class _ColumnGradients:
    """Gradients through N columns' logits, accumulated over token chunks."""

    dx_TD: torch.Tensor  # in x's dtype
    dw_ND: torch.Tensor  # in the loss's dtype
    db_N: torch.Tensor  # in the loss's dtype

    @classmethod
    def create(
        cls, x_TD: torch.Tensor, w_ND: torch.Tensor, b_N: torch.Tensor
    ) -> "_ColumnGradients":
        """Returns empty sums."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return cls(
            torch.empty_like(x_TD),
            torch.zeros_like(w_ND, dtype=wide),
            b_N.new_zeros(b_N.shape, dtype=wide),
        )

    def add_chunk(
        self, tokens: slice, d_CN: torch.Tensor, x_CD: torch.Tensor, w_ND: torch.Tensor
    ) -> None:
        """Writes the chunk's rows of dx and adds its part of dw and db."""
        d_CN = d_CN.to(x_CD.dtype)
        torch.mm(d_CN, w_ND, out=self.dx_TD[tokens])
        if self.dw_ND.dtype == x_CD.dtype:
            self.dw_ND.addmm_(d_CN.t(), x_CD)
        else:
            self.dw_ND.add_(d_CN.t() @ x_CD)
        self.db_N.add_(d_CN.sum(0))


def _token_chunks(num_tokens: int, num_columns: int) -> Iterator[slice]:
    """Yields each chunk's tokens."""
    chunk_size = max(TOKENS_PER_CHUNK, LOGITS_PER_CHUNK // num_columns)
    for start in range(0, num_tokens, chunk_size):
        yield slice(start, start + chunk_size)


def _mask_columns(logit_CN: torch.Tensor, column_C1: torch.Tensor) -> None:
    """Sets each token's logit in its column to -infinity, in place; no column if it is -1."""
    index_C1 = column_C1.clamp(min=0)
    value_C1 = logit_CN.gather(1, index_C1).masked_fill(column_C1 >= 0, -math.inf)
    logit_CN.scatter_(1, index_C1, value_C1)


def _chunk_softmax(
    logit_CN: torch.Tensor, target_C1: torch.Tensor, valid_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the chunk's loss, exp(logits) shifted by their maximum, and their sums (C,).

    Overwrites the logits. `valid_C` is 1 for tokens that count and 0 for the others.
    """
    logit_CN -= logit_CN.amax(1, keepdim=True)
    target_logit_C = logit_CN.gather(1, target_C1).squeeze(1)
    exp_CN = logit_CN.exp_()
    sum_C = exp_CN.sum(1)
    nll = ((sum_C.log() - target_logit_C) * valid_C).sum()
    return nll, exp_CN, sum_C


def _logit_gradient(
    exp_CN: torch.Tensor, sum_C: torch.Tensor, target_C1: torch.Tensor, valid_C: torch.Tensor
) -> torch.Tensor:
    """Returns d nll / d logit = softmax - one-hot, 0 for invalid tokens; overwrites `exp_CN`."""
    d_CN = exp_CN.mul_((valid_C / sum_C)[:, None])
    return d_CN.scatter_add_(1, target_C1, -valid_C[:, None])


def _scaled(saved: tuple[torch.Tensor, ...], grad: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the saved gradients times the loss's gradient, in x's dtype."""
    for d in saved:
        yield (d * grad).to(saved[0].dtype)
