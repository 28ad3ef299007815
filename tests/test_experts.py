"""Recomputed experts: the same gradients, and no hidden activations kept."""

import torch

from moe_dist.experts import Experts


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
