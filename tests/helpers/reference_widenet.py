"""WideNet (Xue et al. 2021), slow and obvious: its router in loops over tokens and experts, its
blocks in loops over samples, heads and tokens. Parameters, drawn noise and dropout masks are given
as plain tensors; autograd gives every gradient.

Legend: T tokens, B samples, S tokens of each, D width, E experts, G balance groups, C channels of a
    head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from reference import Expert, Gate, Layer, within_capacity

from moe_dist.config.schema import EncoderConfig

Parameters = dict[str, torch.Tensor]


def moe(
    x_TD: torch.Tensor,
    gate: Gate,
    balance_loss_weight: float,
    expert: Expert,
    at_TD: torch.Tensor | None = None,
) -> Layer:
    """MoE(x) = sum_i g(x)_i e(x)_i with g = TopK(softmax(f(x) + eps)), and balance_loss_weight E
    sum_i m_i P_i by balance group.
    `gate.noise_TE` is N(0, 1); `at_TD`: what the router sees, `x_TD` where it is None."""
    num_experts = gate.w_gate_DE.shape[1]
    every = range(num_experts)
    chosen: dict[int, list[int]] = {}
    p: dict[int, torch.Tensor] = {}
    for t, x_D in enumerate(x_TD if at_TD is None else at_TD):
        if gate.valid_T[t]:
            logit_E = x_D @ gate.w_gate_DE
            if gate.noise_TE is not None:
                logit_E = logit_E + gate.noise_TE[t] / num_experts
            p[t] = torch.exp(logit_E) / torch.exp(logit_E).sum()
            chosen[t] = sorted(every, key=lambda i: -p[t][i].item())[: gate.k]
    kept = within_capacity(chosen, gate, num_experts)
    y_TD = [
        sum((p[t][i] * expert(i, t, x_D) for i in kept.get(t, [])), 0 * x_D)
        for t, x_D in enumerate(x_TD)
    ]
    balance_loss = x_TD.new_zeros(())
    sums = []
    for group in range(gate.num_balance_groups):
        tokens = [t for t in chosen if gate.balance_group_T[t] == group]
        choices = [sum(i in chosen[t] for t in tokens) for i in every]
        mass = [sum((p[t][i] for t in tokens), x_TD.new_zeros(())) for i in every]
        sums.append((torch.stack(mass), torch.tensor(choices, dtype=x_TD.dtype)))
        for i in every if tokens else ():
            m, mean = choices[i] / (gate.k * len(tokens)), mass[i] / len(tokens)
            balance_loss = balance_loss + balance_loss_weight * num_experts * m * mean
    return Layer(
        y_TD=torch.stack(y_TD),
        balance_loss=balance_loss,
        importance_GE=torch.stack([mass for mass, _ in sums]),
        load_GE=torch.stack([choices for _, choices in sums]),
        rows_E=[sum(i in experts for experts in kept.values()) for i in every],
        dropped=sum(map(len, chosen.values())) - sum(map(len, kept.values())),
    )


def gelu_experts(parameters: Parameters, name: str) -> Expert:
    w1, b1, w2, b2 = (parameters[f"{name}.{p}"] for p in ("w1_eDF", "b1_e1F", "w2_eFD", "b2_e1D"))
    return lambda i, t, x_D: gelu(x_D @ w1[i] + b1[i, 0]) @ w2[i] + b2[i, 0]


@dataclass(frozen=True)
class Uses:
    """The known quantities of a batch and the random numbers of each use of a layer."""

    valid_T: list[bool]
    seen_T: list[bool]  # by the other tokens of the sample
    balance_group_T: list[int]
    token_group_T: list[int]
    noise: Callable[[int], torch.Tensor]  # (T, E), N(0, 1)
    mask: Callable[[int], torch.Tensor]  # (T, D), 0 or 1 / (1 - p)


def encoder(
    config: EncoderConfig,
    parameters: Parameters,
    x_TD: torch.Tensor,
    tokens: int,
    moe_blocks: list[int],
    uses: Uses,
) -> tuple[torch.Tensor, list[Layer]]:
    """`tokens` of each sample. The layers of all routings."""

    def shared(block: int, size: int | None) -> int:
        return 0 if size is None else block // size

    layers: list[Layer] = []
    routed: dict[
        int, tuple[torch.Tensor, torch.Tensor]
    ] = {}  # by assignment: what its router saw, and its noise
    for i in range(config.depth):
        norm, ffn = shared(i, config.blocks_per_norm), shared(i, config.blocks_per_ffn)
        h_TD = (
            layer_norm(x_TD, parameters, f"encoder.norm_attention.{norm}")
            if config.norm_first
            else x_TD
        )
        attention = f"encoder.attention.{shared(i, config.blocks_per_attention)}"
        h_TD = torch.cat(
            [
                attend(
                    h_SD,
                    config.num_heads,
                    uses.seen_T[b * tokens : (b + 1) * tokens],
                    parameters,
                    attention,
                )
                for b, h_SD in enumerate(h_TD.split(tokens))
            ]
        )
        x_TD = x_TD + h_TD * uses.mask(2 * i + 1)
        if not config.norm_first:
            x_TD = layer_norm(x_TD, parameters, f"encoder.norm_attention.{norm}")
        h_TD = (
            layer_norm(x_TD, parameters, f"encoder.norm_ffn.{norm}") if config.norm_first else x_TD
        )
        if i in moe_blocks:
            assignment = shared(i, config.blocks_per_routing)
            new = assignment not in routed
            at_TD, noise_TE = routed.setdefault(assignment, (h_TD, uses.noise(2 * i + 2)))
            gate = Gate(
                parameters[f"encoder.ffn.moe{ffn}.gate.router.w_DE"],
                torch.empty(0),
                config.moe.k,
                noise_TE,
                valid_T=uses.valid_T,
                balance_group_T=uses.balance_group_T,
                num_balance_groups=max(uses.balance_group_T) + 1,
                token_group_T=uses.token_group_T,
                capacity_factor=config.moe.capacity_factor,
            )
            expert = gelu_experts(parameters, f"encoder.ffn.moe{ffn}.experts")
            layer = moe(h_TD, gate, config.moe.balance_loss_weight, expert, at_TD)
            layers += [layer] if new else []
            h_TD = layer.y_TD
        else:
            h_TD = gelu(linear(h_TD, parameters, f"encoder.ffn.ffn{ffn}.0"))
            h_TD = linear(h_TD, parameters, f"encoder.ffn.ffn{ffn}.2")
        x_TD = x_TD + h_TD * uses.mask(2 * i + 2)
        if not config.norm_first:
            x_TD = layer_norm(x_TD, parameters, f"encoder.norm_ffn.{norm}")
    return layer_norm(x_TD, parameters, "encoder.norm") if config.norm_first else x_TD, layers


def attend(
    x_SD: torch.Tensor, num_heads: int, seen_S: list[bool], parameters: Parameters, name: str
) -> torch.Tensor:
    """softmax(q k / sqrt(C)) v for each token and head, over what is seen and the token itself."""
    q_SD, v_SD = (linear(x_SD, parameters, f"{name}.{part}") for part in ("query", "value"))
    k_SD = x_SD @ parameters[f"{name}.key.weight"].T
    channels = x_SD.shape[1] // num_heads
    rows = []
    for s in range(len(x_SD)):
        seen = [other for other in range(len(x_SD)) if seen_S[other] or other == s]
        row = []
        for head in range(num_heads):
            c = slice(head * channels, (head + 1) * channels)
            weight = torch.stack(
                [torch.exp(q_SD[s, c] @ k_SD[other, c] / math.sqrt(channels)) for other in seen]
            )
            row.append(
                sum(
                    w * v_SD[other, c] for w, other in zip(weight / weight.sum(), seen, strict=True)
                )
            )
        rows.append(torch.cat(row))
    return linear(torch.stack(rows), parameters, f"{name}.out")


def layer_norm(x_TD: torch.Tensor, parameters: Parameters, name: str) -> torch.Tensor:
    mean_T1 = x_TD.mean(1, keepdim=True)
    variance_T1 = ((x_TD - mean_T1) ** 2).mean(1, keepdim=True)
    scaled_TD = (x_TD - mean_T1) / torch.sqrt(variance_T1 + 1e-6)
    return scaled_TD * (1 + parameters[f"{name}.gain_D"]) + parameters[f"{name}.bias_D"]


def linear(x: torch.Tensor, parameters: Parameters, name: str) -> torch.Tensor:
    return x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def vision(
    config: EncoderConfig,
    parameters: Parameters,
    image_BQYX: torch.Tensor,
    side: int,
    moe_blocks: list[int],
    uses: Uses,
) -> tuple[torch.Tensor, list[Layer]]:
    """Logits (B, N). The patch embedding is a convolution."""
    w_DP = parameters["patches.weight"]
    kernel = w_DP.view(len(w_DP), image_BQYX.shape[1], side, side)
    x_BDyx = torch.nn.functional.conv2d(image_BQYX, kernel, parameters["patches.bias"], stride=side)
    x_BSD = x_BDyx.flatten(2).transpose(1, 2) + parameters["positions.w_SD"]
    x_TD = x_BSD.flatten(0, 1) * uses.mask(0)
    x_TD, layers = encoder(config, parameters, x_TD, x_BSD.shape[1], moe_blocks, uses)
    mean_BD = torch.stack([x_SD.mean(0) for x_SD in x_TD.split(x_BSD.shape[1])])
    return linear(
        torch.tanh(linear(mean_BD, parameters, "representation")), parameters, "head"
    ), layers


def text(
    config: EncoderConfig,
    parameters: Parameters,
    token_BS: torch.Tensor,
    kind_BS: torch.Tensor,
    masked_N: list[int],
    moe_blocks: list[int],
    uses: Uses,
) -> tuple[torch.Tensor, torch.Tensor, list[Layer]]:
    """Logits of masked words (N, V) and of the order (B, 2)."""
    tokens = token_BS.shape[1]
    x_BSE = parameters["words.weight"][token_BS] + parameters["kinds.weight"][kind_BS]
    x_BSE = x_BSE + parameters["positions.w_SD"][:tokens]
    x_TE = layer_norm(x_BSE.flatten(0, 1), parameters, "norm")
    x_TD = linear(x_TE, parameters, "widen") * uses.mask(0)
    x_TD, layers = encoder(config, parameters, x_TD, tokens, moe_blocks, uses)
    h_NE = layer_norm(
        gelu(linear(x_TD[masked_N], parameters, "masked.narrow")), parameters, "masked.norm"
    )
    logit_NV = h_NE @ parameters["words.weight"].T + parameters["masked.bias_V"]
    first_BD = torch.tanh(linear(x_TD[::tokens], parameters, "pooler"))
    return logit_NV, linear(first_BD, parameters, "order"), layers
