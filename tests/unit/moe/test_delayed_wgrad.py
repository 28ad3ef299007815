"""Weight gradients that are computed after backward, and their memory."""

import weakref

import pytest
import torch
from torch import nn

from moe_dist.moe.delayed_wgrad import DelayedWeightGrads
from moe_dist.moe.experts import Experts
from moe_dist.moe.routing import Routing
from moe_dist.nn.token_context import TokenContext

pytestmark = pytest.mark.timeout(100)
T, D, F, E = 16, 8, 12, 8


@pytest.mark.parametrize("sizes", [[4], [1, 3]])
def test_delayed_wgrads_belong_to_their_own_backward(sizes: list[int]) -> None:
    """The first backward stops before the weights; in the second, expert 3 has no rows."""
    experts = Experts(4, D, F)
    for p in experts.parameters():
        torch.nn.init.uniform_(p, 0.5, 1)
    x_TD, token_T = torch.ones(4, D, requires_grad=True), torch.arange(4)
    ctx = TokenContext(token_T, token_T, token_T >= 0, 0, 0, True, 0, 4, 4, 1)
    counts = torch.ones(4, dtype=torch.int64).split(sizes)
    experts.needs_context = True  # as the certificate's do
    assert all(part.needs_context for part in experts.split_experts(sizes))
    outputs = [
        part(x_TD, Routing(torch.arange(len(c)), torch.ones(len(c)), c), ctx)[0]
        for part, c in zip(experts.split_experts(sizes), counts, strict=True)
    ]
    torch.autograd.grad(sum(y.sum() for y in outputs) * 100, [x_TD], retain_graph=True)
    outputs[0].sum().backward()
    assert experts.w1_eDF.grad is not None
    assert experts.w1_eDF.grad[: sizes[0]].all() and not experts.w1_eDF.grad[sizes[0] :].any()


@pytest.mark.parametrize("backward", [True, False])
def test_delayed_wgrad_releases_memory(backward: bool) -> None:
    later = DelayedWeightGrads([2, 2], nn.Parameter(torch.ones(4, 3)))
    known = weakref.ref(later)
    y = later.chunk(0)[0].sum() + later.chunk(1)[0].sum()
    if backward:
        y.backward()
    del later, y
    assert known() is None
