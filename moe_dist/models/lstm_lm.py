"""The LSTM-MoE language model of Shazeer et al. 2017, Appendix C.1.

    embedding -> LSTM -> MoE -> LSTM -> softmax, all of one width

The output of every layer but the softmax goes through dropout and then takes the layer's input as residual; the MoE's
output goes through a sigmoid first. The MoE sees all unrolled timesteps at once (section 3.1).

Legend: B samples (lanes of text), S timesteps, T = B S tokens, D width, V vocabulary.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from moe_dist.config.messages import nearest
from moe_dist.config.schema import LSTMConfig
from moe_dist.models.sampled_softmax import Softmax
from moe_dist.moe.experts import Experts, ReluMask, masked_relu
from moe_dist.moe.gating.noisy_topk import NoisyTopK
from moe_dist.moe.hierarchical import ExpertGroups, HierarchicalMoE
from moe_dist.moe.layer import LayerStats, MoE
from moe_dist.nn.init import set_init_bound, uniform_parameter
from moe_dist.nn.token_context import TokenContext
from moe_dist.nn.token_noise import token_dropout

# (h_1BD, c_1BU) of each LSTM in order; by lane
State = tuple[tuple[torch.Tensor, torch.Tensor], ...]


class LSTMLanguageModel(nn.Module):
    """Next-word model with carried state."""

    def __init__(self, config: LSTMConfig, vocabulary_size: int) -> None:
        """Raises ValueError for an unknown `middle`, or numbers that do not fit together."""
        super().__init__()
        if config.middle_layer not in LAYERS:
            raise ValueError(
                f"model.middle_layer={config.middle_layer!r}; {nearest(config.middle_layer, LAYERS)}"
            )
        self.p = config.dropout
        # from a tensor: nn.Embedding's own initialisation costs seconds on the meta device, and ours follows
        by_row = config.softmax_samples is not None
        self.embedding = nn.Embedding.from_pretrained(
            torch.empty(vocabulary_size, config.dim), freeze=False, sparse=by_row
        )
        self.embedding.by_row = by_row  # type: ignore[assignment]
        set_init_bound(self.embedding.weight, EMBEDDING_BOUND)
        self.layers = LAYERS[config.middle_layer]
        for name in self.layers:
            setattr(
                self,
                name,
                MIDDLE[config.middle_layer](config) if name == "middle" else _lstm(config),
            )
        self.softmax = Softmax(config.dim, vocabulary_size, config.softmax_samples)

    def forward(
        self, input_BS: torch.Tensor, target_BS: torch.Tensor, state: State, ctx: TokenContext
    ) -> tuple[torch.Tensor, State, dict[str, LayerStats]]:
        """Words and the words after them -> negative log likelihood summed over valid tokens (nats, a scalar), the
        state after the last timestep, and the statistics of each MoE layer by name."""
        x_TD, after, stats = self.read(input_BS, state, ctx)
        return self.softmax(x_TD, target_BS.flatten(), ctx), after, stats

    def read(
        self, input_BS: torch.Tensor, state: State, ctx: TokenContext
    ) -> tuple[torch.Tensor, State, dict[str, LayerStats]]:
        """Words -> what the softmax sees (T, D), the state after the last timestep, statistics by layer."""
        x_TD = token_dropout(self.embedding(input_BS).flatten(0, 1), self.p, ctx.at_layer(0))
        before, after = iter(state), []
        stats: dict[str, LayerStats] = {}
        for site, name in enumerate(self.layers, start=1):
            layer = getattr(self, name)
            if isinstance(layer, nn.LSTM):
                y_BSD, lstm_state = layer(x_TD.view(*input_BS.shape, -1), next(before))
                y_TD = y_BSD.flatten(0, 1)
                after.append(lstm_state)
            else:
                y_TD, told = layer(x_TD, ctx.at_layer(site))
                y_TD = y_TD.sigmoid()
                stats |= {} if told is None else {name: told}
            x_TD = x_TD + token_dropout(y_TD, self.p, ctx.at_layer(site))
        return x_TD, tuple(after), stats


def state_widths(config: LSTMConfig) -> list[tuple[int, int]]:
    """Widths of h and c of each LSTM in order."""
    return [
        (config.dim, config.lstm_units or config.dim)
        for name in LAYERS[config.middle_layer]
        if name != "middle"
    ]


class FeedForward(nn.Module):
    """ReLU layers for every token: the dense baselines MoE-1-Wide (one layer of k times an expert's units) and
    MoE-1-Deep (several of an expert's units)."""

    def __init__(self, dim: int, hidden: int, num_layers: int = 1) -> None:
        super().__init__()
        self.w1_DF = uniform_parameter(dim, hidden, bound=(3 / dim) ** 0.5)
        self.inner_FF = nn.ParameterList(
            uniform_parameter(hidden, hidden, bound=(3 / hidden) ** 0.5)
            for _ in range(num_layers - 1)
        )
        self.w2_FD = uniform_parameter(hidden, dim, bound=(3 / hidden) ** 0.5)
        self.relu_mask_override: ReluMask | None = None

    def forward(self, x_TD: torch.Tensor, ctx: TokenContext) -> tuple[torch.Tensor, None]:
        hidden_TF = x_TD
        for i, w in enumerate([self.w1_DF, *self.inner_FF]):
            hidden_TF = masked_relu(
                hidden_TF @ w,
                self.relu_mask_override and partial(self.relu_mask_override, which=i, ctx_R=ctx),
            )
        return hidden_TF @ self.w2_FD, None


def _moe(config: LSTMConfig) -> MoE:
    moe = config.moe
    if moe.num_groups is not None and moe.num_experts % moe.num_groups:
        raise ValueError(
            f"model.moe.num_experts={moe.num_experts} is not a multiple of num_groups={moe.num_groups}"
        )
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
        importance_loss_weight=moe.importance_loss_weight,
        load_loss_weight=moe.load_loss_weight,
    )
    if moe.num_groups is None:
        return MoE(gate, Experts(moe.num_experts, config.dim, moe.expert_hidden_dim, moe.recompute))
    sizes = (
        moe.num_groups,
        moe.num_experts // moe.num_groups,
        config.dim,
        moe.expert_hidden_dim,
        moe.k,
    )
    return HierarchicalMoE(gate, ExpertGroups(*sizes, noise=moe.noise, recompute=moe.recompute))


def _ffn(config: LSTMConfig) -> FeedForward:
    return FeedForward(config.dim, config.ffn_hidden_dim, config.ffn_layers)


MIDDLE: dict[str, Any] = {"moe": _moe, "ffn": _ffn}
LAYERS = {
    "moe": ("lstm1", "middle", "lstm2"),
    "ffn": ("lstm1", "middle", "lstm2"),
    "lstm": ("lstm1", "lstm2", "lstm3", "lstm4"),  # 4xLSTM-512
    "none": ("lstm1",),  # LSTM-2048-512
}
EMBEDDING_BOUND = 0.1


def _lstm(config: LSTMConfig) -> nn.LSTM:
    """Of `lstm_units` units, projected to the model's width where they are more."""
    units = config.lstm_units or config.dim
    if units < config.dim:
        raise ValueError(f"model.lstm_units={units}: at least the model's width, dim={config.dim}")
    lstm = nn.LSTM(
        config.dim, units, batch_first=True, proj_size=config.dim if units > config.dim else 0
    )
    for p in lstm.parameters():
        set_init_bound(p, units**-0.5)
    return lstm
