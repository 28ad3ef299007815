"""Fast paths of the experts, by device; each equals the plain one in `experts.py`."""

from collections.abc import Callable
from functools import partial

import torch

from moe_dist.moe.kernels import cpu_ffn, triton_ffn
from moe_dist.moe.kernels.cpu_ffn import ReluMask as ReluMask

# feedforward(x_TD, copies, gate_N, count_e, w1_eDF, w2_eFD, recompute=.., defer=..): (T, D)
FeedForward = Callable[..., torch.Tensor]


def select_kernel(
    num_rows: int,
    x_TD: torch.Tensor,
    w1_eDF: torch.Tensor,
    w2_eFD: torch.Tensor,
    relu_mask: ReluMask | None,
    use_triton: bool,
) -> FeedForward | None:
    """The device's for work of this size, None where the plain one is as good. `on` decides in place of ReLU's sign;
    `triton`: that of a GPU may be taken."""
    if cpu_ffn.is_profitable(num_rows, w1_eDF):
        return partial(cpu_ffn.feedforward, relu_mask=relu_mask)
    if use_triton and relu_mask is None and triton_ffn.supported(num_rows, x_TD, w1_eDF, w2_eFD):
        return triton_ffn.feedforward
    return None
