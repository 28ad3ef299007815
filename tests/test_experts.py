"""Recomputed experts: the same gradients, and no hidden activations kept. Gradients in the memory of earlier ones."""

import pytest
import torch

from moe_dist.experts import Experts
from moe_dist.outside import Master


def run(recompute: bool) -> tuple[list[torch.Tensor], int]:
    """Output and gradients of 50 rows over 3 experts, one without rows; elements that autograd keeps of hidden size."""
    generator = torch.Generator().manual_seed(0)
    experts = Experts(3, 8, 64, recompute)
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    x_RD = torch.randn(50, 8, generator=generator, requires_grad=True)
    gate_R = torch.rand(50, generator=generator, requires_grad=True)
    kept = 0

    def pack(t: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += t.numel() if t.shape == (50, 64) else 0
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y_RD, _ = experts(x_RD, gate_R, torch.tensor([20, 0, 30]), None)
    forward_kept = kept
    y_RD.square().sum().backward()
    leaves = [x_RD, gate_R, *experts.parameters()]
    return [y_RD.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)], forward_kept


def test_recompute_gives_the_same_and_keeps_no_hidden_activations() -> None:
    (plain, kept), (again, recomputed) = run(False), run(True)
    assert len(plain) == len(again) == 5
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert kept > 0 and recomputed == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_a_gradient_takes_the_memory_of_the_last_one(recompute: bool) -> None:
    """Over two micro-batches a step: the first takes it, the second is added."""
    generator = torch.Generator().manual_seed(0)
    experts = Experts(3, 8, 64, recompute)
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    masters = [Master(p) for p in experts.parameters()]
    fresh: list[torch.Tensor] = []
    memory: list[list[int]] = []
    others = []  # memory that is given back goes to them
    for clear in (Master.clear, Master.clear_to_reuse):
        for count_e in ([20, 0, 30], [0, 50, 0]):
            for master in masters:
                clear(master)
                others.append(torch.empty_like(master.p))
            inputs = torch.Generator().manual_seed(1)
            for _ in range(2):
                x_RD = torch.randn(50, 8, generator=inputs)
                y_RD, _ = experts(x_RD, torch.ones(50), torch.tensor(count_e), None)
                y_RD.square().sum().backward()
            memory.append([master.gradient().data_ptr() for master in masters])
            fresh += [master.gradient().clone() for master in masters]
    assert all(torch.equal(a, b) for a, b in zip(fresh[:4], fresh[4:], strict=True))
    assert memory[1] == memory[2] == memory[3]
