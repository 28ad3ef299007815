"""The LSTM-MoE language model from Shazeer et al. 2017, Appendix C.1.

    embedding -> LSTM -> MoE -> LSTM -> softmax, all with the same width

Each layer except the softmax is followed by dropout and a residual connection; the MoE's output
first goes through a sigmoid. The MoE receives all unrolled timesteps at once (section 3.1).

Legend: B samples (lanes of text), S timesteps, T = B S tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from moe_dist.config.messages import nearest
from moe_dist.config.schema import LSTMConfig
from moe_dist.models.sampled_softmax import Softmax
from moe_dist.moe.experts import Experts, ReluMaskOverride, masked_relu
from moe_dist.moe.gating.noisy_topk import NoisyTopK
from moe_dist.moe.hierarchical import ExpertGroups, HierarchicalMoE
from moe_dist.moe.layer import LayerStats, MoE
from moe_dist.nn.init import set_init_bound, uniform_parameter
from moe_dist.nn.token_context import TokenContext
from moe_dist.nn.token_noise import token_dropout

# (h_1BD, c_1BU) for each LSTM in order, with one row for each lane
State = tuple[tuple[torch.Tensor, torch.Tensor], ...]


class LSTMLanguageModel(nn.Module):
    """A next-word model whose LSTM state is carried from call to call."""

    def __init__(self, config: LSTMConfig, vocabulary_size: int) -> None:
        """Creates the layers.

        Args:
            config: The config's section `model`.
            vocabulary_size: How many words there are.

        Raises:
            ValueError: `middle_layer` is unknown, or sizes do not fit together.
        """
        super().__init__()
        if config.middle_layer not in LAYERS:
            raise ValueError(
                f"model.middle_layer={config.middle_layer!r}; "
                f"{nearest(config.middle_layer, LAYERS)}"
            )
        self.p = config.dropout
        # from a tensor: nn.Embedding's initialisation takes seconds on the meta device and would be
        # overwritten
        by_row = config.softmax_samples is not None
        self.embedding = nn.Embedding.from_pretrained(
            torch.empty(vocabulary_size, config.dim), freeze=False, sparse=by_row
        )
        self.embedding.by_row = by_row  # type: ignore[assignment]
        set_init_bound(self.embedding.weight, EMBEDDING_BOUND)
        self.layers = LAYERS[config.middle_layer]
        for name in self.layers:
            layer = MIDDLE[config.middle_layer](config) if name == "middle" else _lstm(config)
            setattr(self, name, layer)
        self.softmax = Softmax(config.dim, vocabulary_size, config.softmax_samples)

    def forward(
        self, input_BS: torch.Tensor, target_BS: torch.Tensor, state: State, ctx: TokenContext
    ) -> tuple[torch.Tensor, State, dict[str, LayerStats]]:
        """Returns the loss, the new state and the MoE statistics.

        Args:
            input_BS: Words.
            target_BS: The next word for each input.
            state: The LSTM state before the first timestep.
            ctx: The tokens' context.

        Returns:
            The negative log likelihood summed over valid tokens (nats, scalar), the state after the
            last timestep, and each MoE layer's statistics by name.
        """
        x_TD, after, stats = self.read(input_BS, state, ctx)
        return self.softmax(x_TD, target_BS.flatten(), ctx), after, stats

    def read(
        self, input_BS: torch.Tensor, state: State, ctx: TokenContext
    ) -> tuple[torch.Tensor, State, dict[str, LayerStats]]:
        """Runs all layers below the softmax.

        Args:
            input_BS: Words.
            state: The LSTM state before the first timestep.
            ctx: The tokens' context.

        Returns:
            The input of the softmax (T, D), the state after the last timestep, and each
            MoE layer's statistics by name.
        """
        x_TD = token_dropout(self.embedding(input_BS).flatten(0, 1), self.p, ctx.at_layer(0))
        states_before = iter(state)
        states_after = []
        stats: dict[str, LayerStats] = {}
        for layer_call, name in enumerate(self.layers, start=1):
            layer = getattr(self, name)
            layer_ctx = ctx.at_layer(layer_call)
            if isinstance(layer, nn.LSTM):
                y_BSD, lstm_state = layer(x_TD.view(*input_BS.shape, -1), next(states_before))
                y_TD = y_BSD.flatten(0, 1)
                states_after.append(lstm_state)
            else:
                y_TD, layer_stats = layer(x_TD, layer_ctx)
                y_TD = y_TD.sigmoid()
                if layer_stats is not None:
                    stats[name] = layer_stats
            x_TD = x_TD + token_dropout(y_TD, self.p, layer_ctx)
        return x_TD, tuple(states_after), stats


def state_widths(config: LSTMConfig) -> list[tuple[int, int]]:
    """Returns the widths of h and c for each LSTM in order."""
    num_lstms = len([name for name in LAYERS[config.middle_layer] if name != "middle"])
    return [(config.dim, config.lstm_units or config.dim)] * num_lstms


class FeedForward(nn.Module):
    """ReLU layers applied to every token.

    These are the dense baselines MoE-1-Wide (one layer with k times an expert's units) and
    MoE-1-Deep (several layers with an expert's units).
    """

    def __init__(self, dim: int, hidden: int, num_layers: int = 1) -> None:
        super().__init__()
        self.w1_DF = uniform_parameter(dim, hidden, bound=(3 / dim) ** 0.5)
        self.inner_FF = nn.ParameterList(
            uniform_parameter(hidden, hidden, bound=(3 / hidden) ** 0.5)
            for _ in range(num_layers - 1)
        )
        self.w2_FD = uniform_parameter(hidden, dim, bound=(3 / hidden) ** 0.5)
        self.relu_mask_override: ReluMaskOverride | None = None

    def forward(self, x_TD: torch.Tensor, ctx: TokenContext) -> tuple[torch.Tensor, None]:
        """Returns the output (T, D), and None for the layer statistics."""
        hidden_TF = x_TD
        for i, w in enumerate([self.w1_DF, *self.inner_FF]):
            mask = self.relu_mask_override
            if mask is not None:
                mask = partial(mask, which=i, ctx_R=ctx)
            hidden_TF = masked_relu(hidden_TF @ w, mask)
        return hidden_TF @ self.w2_FD, None


def build_moe(config: LSTMConfig) -> MoE:
    """Returns a config's flat or hierarchical MoE layer."""
    moe = config.moe
    if moe.num_groups is not None and moe.num_experts % moe.num_groups:
        raise ValueError(
            f"model.moe.num_experts={moe.num_experts} is not a multiple of "
            f"num_groups={moe.num_groups}"
        )
    if moe.num_groups is not None and moe.capacity_factor is not None:
        raise ValueError(
            f"model.moe.capacity_factor={moe.capacity_factor}: with num_groups nothing is dropped; "
            "unset it"
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
    groups = ExpertGroups(
        moe.num_groups,
        moe.num_experts // moe.num_groups,
        config.dim,
        moe.expert_hidden_dim,
        moe.k,
        noise=moe.noise,
        recompute=moe.recompute,
    )
    return HierarchicalMoE(gate, groups)


def build_ffn(config: LSTMConfig) -> FeedForward:
    """Returns a config's dense baseline."""
    return FeedForward(config.dim, config.ffn_hidden_dim, config.ffn_layers)


MIDDLE: dict[str, Callable[[LSTMConfig], MoE | FeedForward]] = {"moe": build_moe, "ffn": build_ffn}
LAYERS = {
    "moe": ("lstm1", "middle", "lstm2"),
    "ffn": ("lstm1", "middle", "lstm2"),
    "lstm": ("lstm1", "lstm2", "lstm3", "lstm4"),  # 4xLSTM-512
    "none": ("lstm1",),  # LSTM-2048-512
}
EMBEDDING_BOUND = 0.1


def _lstm(config: LSTMConfig) -> nn.LSTM:
    """Returns an LSTM with `lstm_units` units, projected to the model's width if there are more."""
    units = config.lstm_units or config.dim
    if units < config.dim:
        raise ValueError(
            f"model.lstm_units={units} is less than model.dim={config.dim}; "
            f"use {config.dim} or more, or leave it out"
        )
    proj_size = config.dim if units > config.dim else 0
    lstm = nn.LSTM(config.dim, units, batch_first=True, proj_size=proj_size)
    for p in lstm.parameters():
        set_init_bound(p, units**-0.5)
    return lstm
