"""Softmax over a vocabulary and its negative log likelihood, a chunk of tokens at a time.

Logits of a whole batch (tokens x vocabulary) are the largest tensor of a language model; they are never held. A chunk's
gradient is formed while its logits are at hand, in forward, and scaled in backward.

Legend: T tokens, C tokens of a chunk, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import nn

from moe_dist.parameters import parameter

LOGITS_PER_CHUNK = 2**21  # 8 MB of float32: about what stays in cache


class Softmax(nn.Module):
    """Output layer with bias."""

    def __init__(self, dim: int, vocabulary_size: int) -> None:
        super().__init__()
        self.w_VD = parameter(vocabulary_size, dim, bound=dim**-0.5)
        self.b_V = parameter(vocabulary_size, bound=0.0)

    def forward(self, x_TD: torch.Tensor, target_T: torch.Tensor, valid_T: torch.Tensor) -> torch.Tensor:
        """Negative log likelihood of the targets (nats), summed over valid tokens: a scalar, float32 or wider."""
        return _SoftmaxNLL.apply(x_TD, self.w_VD, self.b_V, target_T, valid_T, torch.is_grad_enabled())


class _SoftmaxNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Any, w_VD: Any, b_V: Any, target_T: Any, valid_T: Any, train: bool) -> torch.Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        nll = x_TD.new_zeros((), dtype=wide)
        if train:
            dx_TD, dw_VD, db_V = (
                torch.empty_like(x_TD),
                torch.zeros_like(w_VD, dtype=wide),
                b_V.new_zeros(b_V.shape, dtype=wide),
            )
        per_chunk = max(1, LOGITS_PER_CHUNK // len(b_V))
        for i in range(0, len(x_TD), per_chunk):
            x_CD, target_C1, valid_C = (
                x_TD[i : i + per_chunk],
                target_T[i : i + per_chunk, None],
                valid_T[i : i + per_chunk].to(wide),
            )
            logit_CV = torch.addmm(b_V, x_CD, w_VD.t()).to(wide)
            logit_CV -= logit_CV.amax(1, keepdim=True)
            target_logit_C = logit_CV.gather(1, target_C1).squeeze(1)
            p_CV = logit_CV.exp_()
            sum_C = p_CV.sum(1)
            nll += ((sum_C.log() - target_logit_C) * valid_C).sum()
            if train:  # d nll / d logit = softmax - one-hot
                d_CV = p_CV.mul_((valid_C / sum_C)[:, None])
                d_CV.scatter_add_(1, target_C1, -valid_C[:, None])
                d_CV = d_CV.to(x_TD.dtype)
                torch.mm(d_CV, w_VD, out=dx_TD[i : i + per_chunk])
                dw_VD.addmm_(d_CV.t(), x_CD) if wide == x_TD.dtype else dw_VD.add_(d_CV.t() @ x_CD)
                db_V += d_CV.sum(0)
        if train:
            ctx.save_for_backward(dx_TD, dw_VD, db_V)
        return nll

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple:
        dx_TD, dw_VD, db_V = ctx.saved_tensors
        scale, dtype = grad[0], dx_TD.dtype
        return dx_TD * scale.to(dtype), (dw_VD * scale).to(dtype), (db_V * scale).to(dtype), None, None, None
