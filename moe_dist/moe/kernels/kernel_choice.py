"""Selects the fast kernel for the experts' feed-forward networks, by device and problem size."""

from collections.abc import Callable
from functools import partial

import torch

from moe_dist.moe.kernels import cpu_ffn, triton_ffn
from moe_dist.moe.kernels.cpu_ffn import ReluMask as ReluMask

# feedforward(x_TD, permutation, gate_N, count_e, w1_eDF, w2_eFD, recompute=.., defer=..): (T, D)
FeedForward = Callable[..., torch.Tensor]


def select_kernel(
    num_rows: int,
    x_TD: torch.Tensor,
    w1_eDF: torch.Tensor,
    w2_eFD: torch.Tensor,
    relu_mask: ReluMask | None,
    use_triton: bool,
) -> FeedForward | None:
    """Selects a kernel.

    Args:
        num_rows: Rows for all experts on this rank.
        x_TD: Tokens (T, D).
        w1_eDF: First matrices.
        w2_eFD: Second matrices.
        relu_mask: Selects the active hidden units. None: those with a positive input.
        use_triton: If True, allows Triton's kernels on a GPU.

    Returns:
        The kernel, None if plain torch is as fast.
    """
    if cpu_ffn.is_profitable(num_rows, w1_eDF):
        return partial(cpu_ffn.feedforward, relu_mask=relu_mask)
    if use_triton and relu_mask is None and triton_ffn.supported(num_rows, x_TD, w1_eDF, w2_eFD):
        return triton_ffn.feedforward
    return None
