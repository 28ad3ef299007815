"""Watching layers for NaN and infinity, without ranks."""

from types import SimpleNamespace
from typing import Any

import torch
from contexts import context

from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import MoE
from moe_dist.moe.routing import GateStats, Routing, build_routing, sum_chosen_by_group
from moe_dist.training.nan_detector import NonFiniteDetector


class OneWeight(torch.nn.Module):
    """A gate with a parameter of its own: every token visits expert 0 with this weight."""

    num_experts = 2
    k = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x_TD: torch.Tensor, ctx: Any) -> tuple[Routing, GateStats]:
        expert_T1 = torch.zeros(len(x_TD), 1, dtype=torch.int64)
        gate_T1 = self.weight.expand(len(x_TD), 1)
        routing = build_routing(expert_T1, gate_T1, torch.ones_like(expert_T1).bool(), 2)
        sums_GE = sum_chosen_by_group(expert_T1, gate_T1, 2, ctx)
        return routing, GateStats(sums_GE, sums_GE.detach(), torch.zeros((), dtype=torch.int64))

    def balance_loss(self, importance_GE: torch.Tensor, load_GE: torch.Tensor) -> torch.Tensor:
        return importance_GE.sum() * 0


def test_gate_with_parameters_of_its_own_is_not_watched_as_a_tensor() -> None:
    layer = MoE(OneWeight(), Experts(2, 3, 4))
    for p in layer.experts.parameters():
        torch.nn.init.ones_(p)
    mesh: Any = SimpleNamespace(is_main=True)
    detector = NonFiniteDetector(layer, mesh)
    detector.start_step()
    y_TD, stats = layer(torch.ones(2, 3, requires_grad=True), context(2))
    (y_TD.sum() + stats.balance_loss).backward()
    assert [name for name, _ in detector._outputs] == [".experts"]
    assert layer.get_submodule("gate").weight.grad == 2 * 3 * 4 * 3  # 2 tokens, 3 x relu(3) of 4
