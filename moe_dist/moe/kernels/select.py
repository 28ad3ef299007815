"""Fast paths of the experts, by device; each equals the plain one in `experts.py`."""

from collections.abc import Callable
from functools import partial

import torch

from moe_dist.moe.kernels import cpu_ffn, triton_ffn
from moe_dist.moe.kernels.cpu_ffn import On as On

# feedforward(x_TD, copies, gate_N, count_e, w1_eDF, w2_eFD, recompute=.., put_off=..): (T, D)
FeedForward = Callable[..., torch.Tensor]


def fast_path(
    num_rows: int, x_TD: torch.Tensor, w1_eDF: torch.Tensor, w2_eFD: torch.Tensor, on: On | None, triton: bool
) -> FeedForward | None:
    """The device's for work of this size, None where the plain one is as good. `on` decides in place of ReLU's sign;
    `triton`: that of a GPU may be taken."""
    if cpu_ffn.is_worth_it(num_rows, w1_eDF):
        return partial(cpu_ffn.feedforward, on=on)
    if triton and on is None and triton_ffn.supported(num_rows, x_TD, w1_eDF, w2_eFD):
        return triton_ffn.feedforward
    return None
