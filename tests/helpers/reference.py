"""The mixture-of-experts layer and the language model of Shazeer et al. 2017, slow and obvious.

Loops over tokens and experts, written from the paper's equations; parameters, drawn noise and
dropout masks are given as plain tensors, and autograd gives every gradient. The fast paths of the
package are compared with this.

Legend: T tokens, B samples, S timesteps, D width, E experts, G balance groups, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from moe_dist.config.schema import LSTMConfig

Expert = Callable[[int, int, torch.Tensor], torch.Tensor]  # (expert i, token t, x_D) -> y_D
State = tuple[torch.Tensor, torch.Tensor]  # (h_BD, c_BD) of an LSTM


@dataclass(frozen=True)
class Layer:
    """The result of one use of the layer, over all tokens."""

    y_TD: torch.Tensor
    balance_loss: torch.Tensor  # sum over balance groups
    importance_GE: torch.Tensor
    load_GE: torch.Tensor
    rows_E: list[int]  # assignments that reach each expert
    dropped: int  # assignments over capacity


@dataclass(frozen=True)
class Gate:
    """A noisy top-k gate and the groups that its statistics and capacity are counted in."""

    w_gate_DE: torch.Tensor
    w_noise_DE: torch.Tensor
    k: int
    noise_TE: torch.Tensor | None  # N(0, 1) of Eq. 4; None: no noise
    valid_T: Sequence[bool]  # False: padding
    balance_group_T: Sequence[int]
    num_balance_groups: int
    token_group_T: Sequence[int] | None = None
    capacity_factor: float | None = None
    importance_loss_weight: float = 0.1
    load_loss_weight: float = 0.1


def moe(x_TD: torch.Tensor, gate: Gate, expert: Expert) -> Layer:
    """Eqs. 1 and 3 to 11."""
    num_experts = gate.w_gate_DE.shape[1]
    every = range(num_experts)
    zero = x_TD.new_zeros(())
    importance_GE = [[zero for _ in every] for _ in range(gate.num_balance_groups)]
    load_GE = [[zero for _ in every] for _ in range(gate.num_balance_groups)]
    chosen: dict[int, list[int]] = {}  # by token: experts, the best first
    weight: dict[tuple[int, int], torch.Tensor] = {}
    for t, x_D in enumerate(x_TD):
        if not gate.valid_T[t]:
            continue
        group = gate.balance_group_T[t]
        clean_E, std_E = x_D @ gate.w_gate_DE, softplus(x_D @ gate.w_noise_DE)
        h_E = clean_E if gate.noise_TE is None else clean_E + gate.noise_TE[t] * std_E  # Eq. 4
        chosen[t] = sorted(every, key=lambda i: -h_E[i].item())[: gate.k]  # Eq. 5
        total = sum(h_E[i].exp() for i in chosen[t])
        for i in chosen[t]:
            weight[t, i] = h_E[i].exp() / total  # Eq. 3: the others are exp(-inf) = 0
            importance_GE[group][i] = importance_GE[group][i] + weight[t, i]  # Eq. 6
        for i in every:
            p = (
                zero + float(i in chosen[t])
                if gate.noise_TE is None
                else probability(clean_E, std_E, h_E, gate.k, i)
            )
            load_GE[group][i] = load_GE[group][i] + p  # Eq. 10
    kept = within_capacity(chosen, gate, num_experts)
    y_TD = [
        sum((weight[t, i] * expert(i, t, x_D) for i in kept.get(t, [])), 0 * x_D)
        for t, x_D in enumerate(x_TD)
    ]  # Eq. 1
    balance_loss = zero
    for importance_E, load_E in zip(importance_GE, load_GE, strict=True):
        balance_loss = (
            balance_loss
            + gate.importance_loss_weight * cv_squared(importance_E)
            + gate.load_loss_weight * cv_squared(load_E)
        )
    return Layer(
        y_TD=torch.stack(y_TD),
        balance_loss=balance_loss,
        importance_GE=torch.stack([torch.stack(row) for row in importance_GE]),
        load_GE=torch.stack([torch.stack(row) for row in load_GE]),
        rows_E=[sum(i in experts for experts in kept.values()) for i in every],
        dropped=sum(map(len, chosen.values())) - sum(map(len, kept.values())),
    )


def probability(
    clean_E: torch.Tensor, std_E: torch.Tensor, h_E: torch.Tensor, k: int, i: int
) -> torch.Tensor:
    """P(x, i) of Eq. 9: only component i's noise is drawn again."""
    if k == len(h_E):
        return torch.ones_like(h_E[i])  # there is no k-th highest of k - 1: -inf
    return normal_cdf((clean_E[i] - kth_excluding(h_E, k, i)) / std_E[i])


def kth_excluding(h_E: torch.Tensor, k: int, i: int) -> torch.Tensor:
    """The k-th highest component of h, leaving out component i."""
    others = torch.cat([h_E[:i], h_E[i + 1 :]])
    return others.sort(descending=True).values[k - 1]


def normal_cdf(z: torch.Tensor) -> torch.Tensor:
    return (1 + torch.erf(z / math.sqrt(2))) / 2


def softplus(v: torch.Tensor) -> torch.Tensor:
    return torch.log(1 + torch.exp(v))


def cv_squared(x_E: list[torch.Tensor]) -> torch.Tensor:
    """variance / mean² (Eq. 7); 0 for a group without a token."""
    mean = sum(x_E) / len(x_E)
    if mean == 0:
        return torch.zeros_like(mean)
    return sum((x - mean) ** 2 for x in x_E) / len(x_E) / mean**2


def within_capacity(
    chosen: dict[int, list[int]], gate: Gate, num_experts: int
) -> dict[int, list[int]]:
    """Returns the choices within capacity: all first choices in order of tokens, then all
    second ones, and so on."""
    if gate.capacity_factor is None:
        return chosen
    assert gate.token_group_T is not None
    kept: dict[int, list[int]] = {t: [] for t in chosen}
    used: dict[tuple[int, int], int] = {}
    for choice in range(gate.k):
        for t in sorted(chosen):
            group, i = gate.token_group_T[t], chosen[t][choice]
            tokens = sum(gate.token_group_T[other] == group for other in chosen)
            capacity = math.ceil(
                Fraction(str(gate.capacity_factor)) * gate.k * tokens / num_experts
            )
            if used.get((group, i), 0) < capacity:
                used[group, i] = used.get((group, i), 0) + 1
                kept[t].append(i)
    return kept


def relu_experts(w1_EDF: torch.Tensor, w2_EFD: torch.Tensor) -> Expert:
    """One hidden layer, no biases (Appendix C.1)."""
    return lambda i, t, x_D: torch.relu(x_D @ w1_EDF[i]) @ w2_EFD[i]


@dataclass(frozen=True)
class LanguageModel:
    """The result of one window of the language model."""

    nll: torch.Tensor  # summed over valid tokens, nats
    state: tuple[State, State]
    layer: Layer | None


def language_model(
    config: LSTMConfig,
    parameters: dict[str, torch.Tensor],
    input_BS: torch.Tensor,
    target_BS: torch.Tensor,
    valid_BS: torch.Tensor,
    state: tuple[State, State],
    mask: list[torch.Tensor],
    noise_TE: torch.Tensor | None,
    balance_group_B: list[int],
) -> LanguageModel:
    """Appendix C.1. `mask`: the dropout of each layer's output (T, D), 0 or 1 / (1 - p)."""
    num_samples, timesteps = input_BS.shape
    mask = [m.view(num_samples, timesteps, config.dim) for m in mask]

    x_BSD = parameters["embedding.weight"][input_BS] * mask[0]
    y_BSD, state1 = lstm(x_BSD, state[0], "lstm1", parameters)
    x_BSD = x_BSD + y_BSD * mask[1]

    x_TD, layer = x_BSD.reshape(-1, config.dim), None
    if config.middle_layer == "moe":
        gate = Gate(
            parameters["middle.gate.w_gate.w_DE"],
            parameters["middle.gate.w_noise.w_DE"],
            config.moe.k,
            noise_TE,
            valid_T=valid_BS.flatten().tolist(),
            balance_group_T=[group for group in balance_group_B for _ in range(timesteps)],
            num_balance_groups=max(balance_group_B) + 1,
            importance_loss_weight=config.moe.importance_loss_weight,
            load_loss_weight=config.moe.load_loss_weight,
        )
        experts = relu_experts(
            parameters["middle.experts.w1_eDF"], parameters["middle.experts.w2_eFD"]
        )
        layer = moe(x_TD, gate, experts)
        y_TD = layer.y_TD
    else:
        y_TD = torch.relu(x_TD @ parameters["middle.w1_DF"]) @ parameters["middle.w2_FD"]
    x_BSD = x_BSD + sigmoid(y_TD).view_as(x_BSD) * mask[2]

    y_BSD, state2 = lstm(x_BSD, state[1], "lstm2", parameters)
    x_BSD = x_BSD + y_BSD * mask[3]

    nll = x_BSD.new_zeros(())
    for b in range(num_samples):
        for s in range(timesteps):
            if valid_BS[b, s]:
                logit_V = parameters["softmax.w_VD"] @ x_BSD[b, s] + parameters["softmax.b_V"]
                p_V = torch.exp(logit_V) / torch.exp(logit_V).sum()
                nll = nll - torch.log(p_V[target_BS[b, s]])
    return LanguageModel(nll, (state1, state2), layer)


def lstm(
    x_BSD: torch.Tensor, state: State, name: str, parameters: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, State]:
    """One layer over all timesteps; the gates i, f, g, o lie in this order along the rows of both
    matrices.
    """
    w_in, w_hidden, b_in, b_hidden = (
        parameters[f"{name}.{p}_l0"] for p in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    h_BD, c_BD = state
    y_SBD = []
    for s in range(x_BSD.shape[1]):
        i, f, g, o = (x_BSD[:, s] @ w_in.T + b_in + h_BD @ w_hidden.T + b_hidden).chunk(4, dim=1)
        c_BD = sigmoid(f) * c_BD + sigmoid(i) * torch.tanh(g)
        h_BD = sigmoid(o) * torch.tanh(c_BD)
        y_SBD.append(h_BD)
    return torch.stack(y_SBD, dim=1), (h_BD, c_BD)


def sigmoid(v: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-v))
