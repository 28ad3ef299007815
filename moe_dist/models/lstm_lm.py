"""The LSTM-MoE language model of Shazeer et al. 2017, Appendix C.1.

    embedding -> LSTM -> MoE -> LSTM -> softmax, all of one width

The output of every layer but the softmax goes through dropout and then takes the layer's input as residual; the MoE's
output goes through a sigmoid first. The MoE sees all unrolled timesteps at once (section 3.1).

Legend: B samples (lanes of text), S timesteps, T = B S tokens, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import nn

from moe_dist.config import ModelConfig, nearest
from moe_dist.context import Context
from moe_dist.experts import Experts
from moe_dist.gating.topk import NoisyTopK
from moe_dist.hierarchical import Groups, HierarchicalMoE
from moe_dist.keyed import dropout
from moe_dist.layer import LayerStats, MoE
from moe_dist.models.softmax import Softmax
from moe_dist.parameters import parameter, with_bound

# (h_1BD, c_1BD) of each LSTM; by lane
State = tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class LSTMLanguageModel(nn.Module):
    """Next-word model with carried state."""

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        """Raises ValueError for an unknown `middle`."""
        super().__init__()
        if config.middle not in MIDDLE:
            raise ValueError(f"model.middle={config.middle!r}; {nearest(config.middle, MIDDLE)}")
        self.p = config.dropout
        # from a tensor: nn.Embedding's own initialisation costs seconds on the meta device, and ours follows
        self.embedding = nn.Embedding.from_pretrained(torch.empty(vocabulary_size, config.dim), freeze=False)
        with_bound(self.embedding.weight, EMBEDDING_BOUND)
        self.lstm1 = _lstm(config.dim)
        self.middle = MIDDLE[config.middle](config)
        self.lstm2 = _lstm(config.dim)
        self.softmax = Softmax(config.dim, vocabulary_size)

    def forward(
        self, input_BS: torch.Tensor, target_BS: torch.Tensor, state: State, ctx: Context
    ) -> tuple[torch.Tensor, State, dict[str, LayerStats]]:
        """Words and the words after them -> negative log likelihood summed over valid tokens (nats, a scalar), the
        state after the last timestep, and the statistics of each MoE layer by name."""
        x_BSD = self.embedding(input_BS)
        x_BSD = _dropout(x_BSD, self.p, ctx.at(0))
        y_BSD, state1 = self.lstm1(x_BSD, state[0])
        x_BSD = x_BSD + _dropout(y_BSD, self.p, ctx.at(1))
        y_TD, stats = self.middle(x_BSD.flatten(0, 1), ctx.at(2))
        x_BSD = x_BSD + _dropout(y_TD.sigmoid().view_as(x_BSD), self.p, ctx.at(2))
        y_BSD, state2 = self.lstm2(x_BSD, state[1])
        x_BSD = x_BSD + _dropout(y_BSD, self.p, ctx.at(3))
        nll = self.softmax(x_BSD.flatten(0, 1), target_BS.flatten(), ctx.valid_T)
        return nll, (state1, state2), {} if stats is None else {"middle": stats}


class FeedForward(nn.Module):
    """One ReLU layer for every token: the dense baseline MoE-1-Wide, of k times an expert's units."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1_DF = parameter(dim, hidden, bound=(3 / dim) ** 0.5)
        self.w2_FD = parameter(hidden, dim, bound=(3 / hidden) ** 0.5)

    def forward(self, x_TD: torch.Tensor, ctx: Context) -> tuple[torch.Tensor, None]:
        return (x_TD @ self.w1_DF).relu() @ self.w2_FD, None


def _moe(config: ModelConfig) -> MoE:
    moe = config.moe
    if moe.num_groups is not None and moe.num_experts % moe.num_groups:
        raise ValueError(f"model.moe.num_experts={moe.num_experts} is not a multiple of num_groups={moe.num_groups}")
    if moe.num_groups is not None and moe.capacity_factor is not None:
        raise ValueError(
            f"model.moe.capacity_factor={moe.capacity_factor}: with num_groups nothing is dropped; unset it"
        )
    gate = NoisyTopK(
        config.dim,
        moe.num_groups or moe.num_experts,
        moe.k,
        noise=moe.noise,
        capacity_factor=moe.capacity_factor,
        w_importance=moe.w_importance,
        w_load=moe.w_load,
    )
    if moe.num_groups is None:
        return MoE(gate, Experts(moe.num_experts, config.dim, moe.hidden))
    per_group = moe.num_experts // moe.num_groups
    return HierarchicalMoE(gate, Groups(moe.num_groups, per_group, config.dim, moe.hidden, moe.k, moe.noise))


def _ffn(config: ModelConfig) -> FeedForward:
    return FeedForward(config.dim, config.ffn_hidden)


MIDDLE: dict[str, Any] = {"moe": _moe, "ffn": _ffn}
EMBEDDING_BOUND = 0.1


def _lstm(dim: int) -> nn.LSTM:
    lstm = nn.LSTM(dim, dim, batch_first=True)
    for p in lstm.parameters():
        with_bound(p, dim**-0.5)
    return lstm


def _dropout(x_BSD: torch.Tensor, p: float, ctx: Context) -> torch.Tensor:
    return dropout(x_BSD.flatten(0, 1), p, ctx).view_as(x_BSD)
