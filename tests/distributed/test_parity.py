"""The layer and the language model on 1, 2 and 4 ranks against a slow reference, in float64: values
and every gradient.

One global batch of 8 samples with up to 4 tokens each is cut over the ranks unevenly: on two ranks
into 2 and 6 samples or 0 and 8; on four into 2, 2 (padding alone), none at all and 4. The reference
sees the whole batch at once.

Legend: T tokens, B samples, S timesteps, D width, E experts, e experts of a rank, G balance groups.
"""

import dataclasses
import functools
import os
from typing import Any

import pytest
import torch
from reference import Expert, Gate, language_model, moe, relu_experts
from torch import nn
from uneven_batch import (
    DIM,
    FIRST_SAMPLE,
    HIDDEN,
    LAYOUTS,
    LENGTHS,
    NEVER,
    NUM_EXPERTS,
    NUM_SAMPLES,
    SEED,
    TIMESTEPS,
    Case,
    Layout,
    assert_equal,
    batch,
    context,
    drawn,
    gathered,
    gradients,
)

from moe_dist.config.schema import LSTMConfig, MeshConfig, MoEConfig
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.spawn import run_distributed
from moe_dist.engine.parallelize import parallelize
from moe_dist.models.lstm_lm import LSTMLanguageModel
from moe_dist.moe.experts import Experts
from moe_dist.moe.gating.noisy_topk import NoisyTopK
from moe_dist.moe.kernels import cpu_ffn
from moe_dist.moe.layer import MoE
from moe_dist.moe.routing import Routing
from moe_dist.nn import prng, token_noise
from moe_dist.nn.init import init_bounds, init_parameter, uniform_parameter
from moe_dist.nn.token_context import TokenContext

pytestmark = pytest.mark.timeout(300)


CASES = {
    "k1": Case(k=1),
    "k2": Case(k=2),
    "k4": Case(k=4),
    "all_experts": Case(k=NUM_EXPERTS),
    "no_noise": Case(noise=False),
    "evaluation": Case(train=False),
    "all_experts_no_noise": Case(k=NUM_EXPERTS, noise=False),
    "capacity_by_sample": Case(k=2, capacity_factor=1.0),
    "capacity_by_two_samples": Case(k=4, capacity_factor=0.75, capacity_group_size=2),
    "capacity_no_noise": Case(k=1, noise=False, capacity_factor=1.25, capacity_group_size=2),
    "balance_groups": Case(balance_loss_group_size=2),  # the second has no valid token
    "context": Case(experts="by_place"),
    "context_and_capacity": Case(
        k=4, experts="by_place", capacity_factor=1.0, balance_loss_group_size=4
    ),
}


class ExpertsByPlace(nn.Module):
    """Experts whose output depends on where a token stands: y = scale_e * x * sin(1 + sample + 10
    position).
    """

    needs_context = True

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__()
        self.scale_eD = uniform_parameter(num_experts, dim, bound=1.0)

    def forward(
        self, x_TD: torch.Tensor, routing: Routing, ctx: TokenContext
    ) -> tuple[torch.Tensor, None]:
        ctx_R = ctx.select(routing.token_N)
        assert ctx_R.valid_T.all()
        place_R = 1 + ctx_R.sample_T + 10 * ctx_R.position_T
        weight_R = routing.gate_N * place_R.double().sin()
        scale_RD = self.scale_eD.repeat_interleave(routing.count_E, 0) * weight_R[:, None]
        return torch.zeros_like(x_TD).index_add(
            0, routing.token_N, scale_RD * x_TD[routing.token_N]
        ), None


def layer(case: Case) -> MoE:
    gate = NoisyTopK(
        DIM, NUM_EXPERTS, case.k, noise=case.noise, capacity_factor=case.capacity_factor
    )
    experts = (
        Experts(NUM_EXPERTS, DIM, HIDDEN)
        if case.experts == "relu"
        else ExpertsByPlace(NUM_EXPERTS, DIM)
    )
    return MoE(gate, experts)


class OneLayer(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.moe = layer(case)


MODEL = LSTMConfig(
    dim=DIM, dropout=0.25, moe=MoEConfig(num_experts=NUM_EXPERTS, k=2, expert_hidden_dim=HIDDEN)
)
DENSE_MODEL = LSTMConfig(dim=DIM, dropout=0.25, middle_layer="ffn", ffn_hidden_dim=2 * HIDDEN)
VOCABULARY_SIZE, WINDOWS = 11, (3, 4)  # windows are numbered by step


def text(window: int) -> torch.Tensor:
    """Returns the words of all lanes (B, S + 1)."""
    generator = prng.generator("test_parity", "text", window)
    return torch.randint(VOCABULARY_SIZE, (NUM_SAMPLES, TIMESTEPS + 1), generator=generator)


def window_context(window: int, first: int, last: int) -> TokenContext:
    return dataclasses.replace(
        context(first, last, Case(balance_loss_group_size=4)), step=window, layer_call=0
    )


def fill_zeros(model: nn.Module) -> None:
    """Gives the parameters that start at zero other values."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.any():
                p.copy_(drawn(*p.shape, key=name))


# what the ranks do


def ranks(layouts: list[Layout]) -> list[dict[str, Any]]:
    """Returns this rank's values and gradients for each layout (all of one world): {case name:
    {quantity: tensor}}."""
    meshes.init_process_group()
    results = []
    for layout in layouts:
        os.environ["LOCAL_WORLD_SIZE"] = (
            "2" if layout.exchange == "dedup_node" else str(layout.world)
        )
        mesh, cpu_ffn.MIN_BYTES_PER_EXPERT = meshes.build_mesh(layout.ep), layout.worth_it
        results.append({name: run_layer(case, layout, mesh) for name, case in CASES.items()})
        results[-1]["model"] = run_model(MODEL, mesh, layout)
        results[-1]["dense_model"] = run_model(DENSE_MODEL, mesh, layout)
    meshes.shutdown()
    return results


def run_layer(case: Case, layout: Layout, mesh: meshes.Mesh) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        plain = OneLayer(case)
    model = parallelize(
        plain,
        mesh,
        SEED,
        torch.float64,
        MeshConfig(dispatcher=layout.exchange, overlap_chunks=layout.pieces),
    )
    moe_layer: Any = model.module.moe
    with torch.no_grad():
        moe_layer.gate.w_gate.w_DE.copy_(batch()["w_gate"])
        moe_layer.gate.w_noise.w_DE.copy_(batch()["w_noise"])
    first, last = layout.cut[mesh.dp.index : mesh.dp.index + 2]
    mine = slice(first * TIMESTEPS, last * TIMESTEPS)
    ctx = context(first, last, case)
    x_TD = batch()["x"][mine].clone().requires_grad_()
    y_TD, stats = moe_layer(x_TD, ctx)
    ((batch()["weight"][mine] * y_TD).sum() + stats.balance_loss).backward()
    with torch.no_grad():
        _, told = moe_layer.gate(x_TD, ctx)
    return gradients(model) | {
        "y": y_TD.detach(),
        "dx": x_TD.grad,
        "balance_loss": stats.balance_loss.detach(),
        "importance_E": stats.importance_E,
        "importance_GE": told.importance_GE,
        "load_GE": told.load_GE,
        "rows_E": stats.load_E,
        "dropped": stats.dropped,
    }


def run_model(config: LSTMConfig, mesh: meshes.Mesh, layout: Layout) -> dict[str, torch.Tensor]:
    """Runs two windows of text, the second from the state of the first; gradients flow through
    both."""
    with torch.device("meta"):
        plain = LSTMLanguageModel(config, VOCABULARY_SIZE)
    model = parallelize(
        plain,
        mesh,
        SEED,
        torch.float64,
        MeshConfig(dispatcher=layout.exchange, overlap_chunks=layout.pieces),
    )
    fill_zeros(model.module)
    share = NUM_SAMPLES // mesh.dp.size
    mine = slice(mesh.dp.index * share, (mesh.dp.index + 1) * share)
    zeros = torch.zeros(1, share, DIM, dtype=torch.float64)
    state: Any = ((zeros, zeros), (zeros, zeros))
    nlls, balance_loss = [], torch.zeros((), dtype=torch.float64)
    for window in WINDOWS:
        ctx = window_context(window, mine.start, mine.stop)
        nll, state, stats = model.module(
            text(window)[mine, :-1], text(window)[mine, 1:], state, ctx
        )
        nlls.append(nll)
        balance_loss = balance_loss + sum(s.balance_loss for s in stats.values())
    (sum(nlls) + balance_loss).backward()
    values = {"nlls": torch.stack(nlls).detach(), "balance_loss": balance_loss.detach()}
    return (
        gradients(model)
        | values
        | {f"state{i}": t[0].detach() for i, t in enumerate([*state[0], *state[1]])}
    )


# what they should have found


@functools.cache
def expected_layer(case: Case) -> dict[str, torch.Tensor]:
    ctx = context(0, NUM_SAMPLES, case)
    leaf = {
        name: value.clone().requires_grad_() for name, value in batch().items() if name != "weight"
    }
    whole = layer(case).double()
    for name, bound in init_bounds(whole.experts).items():
        p = whole.experts.get_parameter(name)
        init_parameter(p, f"moe.experts.{name}", bound, SEED, range(NUM_EXPERTS))
    experts = {name: p.detach().requires_grad_() for name, p in whole.experts.named_parameters()}
    noisy = case.noise and case.train
    gate = Gate(
        leaf["w_gate"],
        leaf["w_noise"],
        case.k,
        token_noise.token_normal(ctx, "gate", torch.arange(NUM_EXPERTS), torch.float64)
        if noisy
        else None,
        valid_T=ctx.valid_T.tolist(),
        balance_group_T=[
            t // (TIMESTEPS * case.balance_loss_group_size) for t in range(len(leaf["x"]))
        ],
        num_balance_groups=NUM_SAMPLES // case.balance_loss_group_size,
        token_group_T=[t // (TIMESTEPS * case.capacity_group_size) for t in range(len(leaf["x"]))],
        capacity_factor=case.capacity_factor,
    )
    result = moe(
        leaf["x"],
        gate,
        relu_experts(*experts.values())
        if case.experts == "relu"
        else by_place(experts["scale_eD"]),
    )
    ((batch()["weight"] * result.y_TD).sum() + result.balance_loss).backward()
    grad = {
        name: torch.zeros_like(leaf[name]) if leaf[name].grad is None else leaf[name].grad
        for name in leaf
    }
    return {
        "y": result.y_TD.detach(),
        "dx": grad["x"],
        "d moe.gate.w_gate.w_DE": grad["w_gate"],
        "d moe.gate.w_noise.w_DE": grad["w_noise"],
        "balance_loss": result.balance_loss.detach(),
        "importance_E": result.importance_GE.detach().sum(0),
        "importance_GE": result.importance_GE.detach(),
        "load_GE": result.load_GE.detach(),
        "rows_E": torch.tensor(result.rows_E),
        "dropped": torch.tensor(result.dropped),
        **{f"moe.experts.{name}": p.detach() for name, p in experts.items()},
        **{f"d moe.experts.{name}": p.grad for name, p in experts.items()},
    }


@functools.cache
def expected_model(config: LSTMConfig) -> dict[str, torch.Tensor]:
    whole = LSTMLanguageModel(config, VOCABULARY_SIZE).double()
    for name, bound in init_bounds(whole).items():
        ids = range(NUM_EXPERTS) if ".experts." in name else None
        init_parameter(whole.get_parameter(name), name, bound, SEED, ids)
    fill_zeros(whole)
    parameters = {name: p.detach().requires_grad_() for name, p in whole.named_parameters()}
    zeros = torch.zeros(NUM_SAMPLES, DIM, dtype=torch.float64)
    state = ((zeros, zeros), (zeros, zeros))
    nlls, balance_loss = [], torch.zeros((), dtype=torch.float64)
    for window in WINDOWS:
        ctx = window_context(window, 0, NUM_SAMPLES)
        ones_TD = torch.ones(NUM_SAMPLES * TIMESTEPS, DIM, dtype=torch.float64)
        result = language_model(
            config,
            parameters,
            text(window)[:, :-1],
            text(window)[:, 1:],
            ctx.valid_T.view(NUM_SAMPLES, TIMESTEPS),
            state,
            mask=[
                token_noise.token_dropout(ones_TD, config.dropout, ctx.at_layer(site))
                for site in range(4)
            ],
            noise_TE=token_noise.token_normal(
                ctx.at_layer(2), "gate", torch.arange(NUM_EXPERTS), torch.float64
            ),
            balance_group_B=[b // 4 for b in range(NUM_SAMPLES)],
        )
        state = result.state
        nlls.append(result.nll)
        balance_loss = balance_loss + (result.layer.balance_loss if result.layer else 0)
    (sum(nlls) + balance_loss).backward()
    return {
        "nlls": torch.stack(nlls).detach(),
        "balance_loss": balance_loss.detach(),
        **{f"state{i}": t.detach() for i, t in enumerate([*state[0], *state[1]])},
        **{f"d {name}": p.grad for name, p in parameters.items()},
        **{name: p.detach() for name, p in parameters.items() if ".experts." in name},
    }


def by_place(scale_ED: torch.Tensor) -> Expert:
    def expert(i: int, t: int, x_D: torch.Tensor) -> torch.Tensor:
        sample, position = FIRST_SAMPLE + t // TIMESTEPS, t % TIMESTEPS
        return (
            scale_ED[i]
            * x_D
            * torch.tensor(1.0 + sample + 10 * position, dtype=torch.float64).sin()
        )

    return expert


@pytest.fixture(
    scope="module",
    params=LAYOUTS,
    ids=lambda x: f"world{x.world}-ep{x.ep}-{x.exchange}-{x.pieces}-{x.worth_it}",
)
def ran(request: pytest.FixtureRequest) -> tuple[Layout, list[dict[str, Any]]]:
    """Returns a layout and the results of its ranks."""
    layout = request.param
    return layout, [
        results[_of_world(layout.world).index(layout)] for results in _spawned(layout.world)
    ]


def _of_world(world: int) -> list[Layout]:
    return [layout for layout in LAYOUTS if layout.world == world]


@functools.cache
def _spawned(world: int) -> list[list[dict[str, Any]]]:
    """Starts the processes of a world once for all its layouts."""
    return run_distributed(ranks, world, _of_world(world), timeout=240)


@pytest.mark.parametrize("case", CASES)
def test_layer_equals_reference(ran: tuple[Layout, list[dict[str, Any]]], case: str) -> None:
    layout, by_rank = ran
    assert_equal(gathered([rank[case] for rank in by_rank], layout.ep), expected_layer(CASES[case]))


@pytest.mark.parametrize("name", ["model", "dense_model"])
def test_language_model_equals_reference(
    ran: tuple[Layout, list[dict[str, Any]]], name: str
) -> None:
    layout, by_rank = ran
    expected = expected_model({"model": MODEL, "dense_model": DENSE_MODEL}[name])
    assert_equal(gathered([rank[name] for rank in by_rank], layout.ep), expected)


def test_parity_cases_have_their_properties() -> None:
    expected = {name: expected_layer(case) for name, case in CASES.items()}
    valid = sum(LENGTHS)  # 18
    assert [int(expected[name]["rows_E"].sum()) for name in ("k1", "k2", "k4")] == [
        valid,
        2 * valid,
        4 * valid,
    ]
    assert all(
        expected[name]["rows_E"][list(NEVER)].sum() == 0
        for name in CASES
        if CASES[name].k < NUM_EXPERTS
    )
    assert all((expected["k4"]["rows_E"] > 0)[i] for i in range(NUM_EXPERTS) if i not in NEVER)
    for name, case in CASES.items():
        assert (expected[name]["dropped"] > 0) == (case.capacity_factor is not None), name
        assert expected[name]["rows_E"].sum() + expected[name]["dropped"] == case.k * valid
    assert expected["balance_groups"]["load_GE"].sum(1).tolist() == pytest.approx(
        [12, 0, 10, 14], abs=3
    )
    assert expected["balance_groups"]["load_GE"][1].tolist() == [0] * NUM_EXPERTS
    assert expected["k2"]["d moe.gate.w_noise.w_DE"].abs().sum() > 0.01
