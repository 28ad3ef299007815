"""Softmax over a vocabulary and its negative log likelihood, a chunk of tokens at a time.

Logits of a whole batch (tokens x vocabulary) are the largest tensor of a language model; they are never held. A chunk's
gradient is formed while its logits are at hand, in forward, and scaled in backward.

With `samples`, training sees a part of a large vocabulary: S words are drawn from a log-uniform
distribution q (words lie by falling frequency), the same for every token of a step. A token's
candidates are the distinct words among them and its target. Every candidate's logit is corrected by
the probability P_j = 1 - (1 - q_j)^S that word j is drawn, the target's too, whether it was drawn or
not (Jean et al. 2015; Jozefowicz et al. 2016, section 3.1; Appendix C.1):

    s_j = l_j - log P_j        loss = -log(exp(s_target) / sum over candidates j of exp(s_j))

Given a set of candidates, each word y of it is the target with a probability proportional to
p_y / P_y: the target is in the set for certain, every other word because it was drawn. The loss is
therefore least where softmax(l) = p. The factors P_j take words as drawn independently of each other,
as those of `tf.nn.sampled_softmax_loss` do; that the number of draws is fixed moves the expected
gradient by about 1 % of the norm of p with 10 draws of 30 words, and by 0.1 % with 200 of 2,000.

The loss in training is one among candidates, which lies below the exact one. Evaluation is exact.

Legend: T tokens, C tokens of a chunk, D width, V vocabulary, S draws, N columns: words whose logits are taken.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_dist.nn import prng
from moe_dist.nn.init import uniform_parameter
from moe_dist.nn.token_context import TokenContext

LOGITS_PER_CHUNK = 2**21  # 8 MB of float32: about what stays in cache
TOKENS_PER_CHUNK = 64  # the fewest: below that reading the matrix takes longer than multiplying


class Softmax(nn.Module):
    """Output layer with bias."""

    def __init__(self, dim: int, vocabulary_size: int, samples: int | None = None) -> None:
        super().__init__()
        self.samples = samples
        self.by_row = samples is not None  # a step touches few rows, and their gradients are sparse
        self.w_VD = uniform_parameter(vocabulary_size, dim, bound=dim**-0.5)
        self.b_V = uniform_parameter(vocabulary_size, bound=0.0)

    def forward(
        self, x_TD: torch.Tensor, target_T: torch.Tensor, ctx: TokenContext
    ) -> torch.Tensor:
        """Negative log likelihood of the targets (nats), summed over valid tokens: a scalar, float32 or wider."""
        train = torch.is_grad_enabled()
        if self.samples is None or not ctx.train:
            return _NLL.apply(
                x_TD, self.w_VD, self.b_V, target_T, ctx.valid_T, None, None, None, train
            )
        word_N, weight_N = draw_negatives(len(self.b_V), self.samples, ctx.seed, ctx.step)
        word_N, weight_N = word_N.to(x_TD.device), weight_N.to(x_TD.device)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        p_V = inclusion_probability(len(self.b_V), self.samples, x_TD.device)
        own_w_TD, own_b_T = self._rows(target_T)
        own_b_T = own_b_T.to(wide) - p_V[target_T].log().to(wide)
        w_ND, b_N = self._rows(word_N)
        # where a token's target is among the words drawn: its column
        column_T = torch.searchsorted(word_N, target_T).clamp(max=len(word_N) - 1)
        column_T = torch.where(word_N[column_T] == target_T, column_T, -1)
        more_N = weight_N.log().to(wide)
        return _NLL.apply(x_TD, w_ND, b_N, column_T, ctx.valid_T, own_w_TD, own_b_T, more_N, train)

    def _rows(self, word_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.embedding(word_N, self.w_VD, sparse=True), torch.gather(
            self.b_V, 0, word_N, sparse_grad=True
        )

    def log_probability(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Of every word after each token, in nats: (T, V), float32 or wider."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return torch.addmm(self.b_V, x_TD, self.w_VD.t()).to(wide).log_softmax(1)


@functools.lru_cache(maxsize=8)  # in a large vocabulary it takes longer than a step's draws
def inclusion_probability(
    vocabulary_size: int, samples: int, device: torch.device | None = None
) -> torch.Tensor:
    """Returns the probability P_V of each word to be among `samples` draws with replacement from the
    log-uniform distribution q_j = log((j + 2) / (j + 1)) / log(V + 1).

    The tensor, float64 on `device` (None: the CPU), is shared by all callers: not to be written to.
    """
    rank_V = torch.arange(vocabulary_size, dtype=torch.float64)
    q_V = ((rank_V + 2) / (rank_V + 1)).log() / math.log(vocabulary_size + 1)
    return -torch.expm1(samples * torch.log1p(-q_V)).to(device)


def draw_negatives(
    vocabulary_size: int, samples: int, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the distinct words among `samples` draws (int64, ascending) and 1 / P of each (float64):
    the same for every rank and micro-batch of a step."""
    u_S = prng.uniform(samples, seed, step, "negatives")
    drawn_S = ((u_S * math.log(vocabulary_size + 1)).exp().long() - 1).clamp(0, vocabulary_size - 1)
    word_N = drawn_S.unique()
    return word_N, 1 / inclusion_probability(vocabulary_size, samples)[word_N]


class _NLL(torch.autograd.Function):
    """Negative log likelihood of each token's target among columns, summed over valid tokens.

    The target is column `column_T`. With `own_w_TD`, `own_b_T` and `more_N` (sampled columns) it has a
    column to itself, put first, and `column_T` is the column that would count the target again (-1:
    none). The bias `own_b_T` contains the target's -log P, and `more_N` those of the N columns; both are
    as wide as the loss, for a log P rounded to bf16 would shift the probability of its word by up to 3 %.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Any,
        w_ND: Any,
        b_N: Any,
        column_T: Any,
        valid_T: Any,
        own_w_TD: Any,
        own_b_T: Any,
        more_N: Any,
        train: bool,
    ) -> torch.Tensor:
        wide, own = torch.promote_types(x_TD.dtype, torch.float32), own_w_TD is not None
        nll = x_TD.new_zeros((), dtype=wide)
        if train:
            dx_TD, dw_ND = torch.empty_like(x_TD), torch.zeros_like(w_ND, dtype=wide)
            db_N, d_own_T = (
                b_N.new_zeros(b_N.shape, dtype=wide),
                x_TD.new_zeros(len(x_TD), dtype=wide),
            )
        per_chunk = max(TOKENS_PER_CHUNK, LOGITS_PER_CHUNK // len(b_N))
        for i in range(0, len(x_TD), per_chunk):
            at = slice(i, i + per_chunk)
            x_CD, target_C1, valid_C = x_TD[at], column_T[at, None], valid_T[at].to(wide)
            logit_CN = torch.addmm(b_N, x_CD, w_ND.t()).to(wide)
            if own:
                logit_CN += more_N
                again_C1 = target_C1.clamp(min=0)
                kept_C1 = logit_CN.gather(1, again_C1).masked_fill(target_C1 >= 0, -math.inf)
                own_C1 = (x_CD.to(wide) * own_w_TD[at]).sum(1, keepdim=True) + own_b_T[at, None]
                logit_CN = torch.cat([own_C1, logit_CN.scatter_(1, again_C1, kept_C1)], 1)
                target_C1 = torch.zeros_like(target_C1)
            logit_CN -= logit_CN.amax(1, keepdim=True)
            target_logit_C = logit_CN.gather(1, target_C1).squeeze(1)
            p_CN = logit_CN.exp_()
            sum_C = p_CN.sum(1)
            nll += ((sum_C.log() - target_logit_C) * valid_C).sum()
            if train:  # d nll / d logit = softmax - one-hot
                d_CN = p_CN.mul_((valid_C / sum_C)[:, None])
                d_CN.scatter_add_(1, target_C1, -valid_C[:, None])
                if own:
                    d_own_T[at], d_CN = d_CN[:, 0], d_CN[:, 1:]
                d_CN = d_CN.to(x_TD.dtype)
                torch.mm(d_CN, w_ND, out=dx_TD[at])
                dw_ND.addmm_(d_CN.t(), x_CD) if wide == x_TD.dtype else dw_ND.add_(d_CN.t() @ x_CD)
                db_N += d_CN.sum(0)
        if train and own:
            dx_TD += d_own_T.to(x_TD.dtype)[:, None] * own_w_TD
            ctx.save_for_backward(
                dx_TD, dw_ND, db_N, d_own_T[:, None].to(x_TD.dtype) * x_TD, d_own_T
            )
        elif train:
            ctx.save_for_backward(dx_TD, dw_ND, db_N)
        return nll

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple:
        dtype = ctx.saved_tensors[0].dtype
        dx_TD, dw_ND, db_N, *own = ((d * grad[0]).to(dtype) for d in ctx.saved_tensors)
        d_own_w_TD, d_own_b_T = own or (None, None)
        return dx_TD, dw_ND, db_N, None, None, d_own_w_TD, d_own_b_T, None, None
