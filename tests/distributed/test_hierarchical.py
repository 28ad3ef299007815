"""Groups of experts on 1, 2 and 4 ranks against a slow reference, in float64; and what a group of experts costs.

The batch, its cuts over ranks and the primary gate are those of `test_parity`: what were experts there are groups here,
of three experts each. Groups 4 and 5 no token chooses: with ep = 4 these are all of the rank that has no tokens.

Legend: T tokens, D width, a groups, b experts per group, E = a b experts, G balance groups.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from comparisons import deviation
from reference import relu_experts
from reference_hierarchical import Gates, HierarchicalLayer, hierarchical_moe, load_h
from runs import Run, tiny
from torch import nn
from uneven_batch import (
    DIM,
    HIDDEN,
    LAYOUTS,
    LENGTHS,
    NEVER,
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
from uneven_batch import NUM_EXPERTS as NUM_GROUPS

from moe_dist.config.schema import MeshConfig, OptimConfig
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.spawn import run_distributed
from moe_dist.engine.parallelize import ParallelModel, parallelize
from moe_dist.moe.gating.noisy_topk import NoisyTopK
from moe_dist.moe.hierarchical import ExpertGroups, GroupStats, HierarchicalMoE
from moe_dist.moe.routing import GateStats, Routing
from moe_dist.nn import token_noise
from moe_dist.nn.init import init_bounds, init_parameter
from moe_dist.nn.token_context import TokenContext
from moe_dist.optim.optimizer import Optimizer

pytestmark = pytest.mark.timeout(300)

PER_GROUP = 3
NUM_EXPERTS = NUM_GROUPS * PER_GROUP
BALANCE = {"importance_loss_weight": 0.3, "load_loss_weight": 0.7}
SITE = 1  # of the context
PLACE = "moe"  # of the labels of a dispatcher without a layer name

CASES = {
    "k1": Case(k=1),
    "k2": Case(k=2),
    "whole_group": Case(k=PER_GROUP),
    "no_noise": Case(noise=False),
    "evaluation": Case(train=False),
    "k1_evaluation": Case(k=1, train=False),
    "balance_groups": Case(balance_loss_group_size=2),  # the second has no valid token
    "k1_balance_groups": Case(k=1, balance_loss_group_size=1),
}

TRAINING = ["model.moe.num_experts=16", "model.moe.num_groups=4", "zero_stage=1"]
STEPS, SAVED = 10, 5


def layer(case: Case, **balance: float) -> HierarchicalMoE:
    gate = NoisyTopK(DIM, NUM_GROUPS, case.k, noise=case.noise, **(BALANCE | balance))
    return HierarchicalMoE(
        gate, ExpertGroups(NUM_GROUPS, PER_GROUP, DIM, HIDDEN, case.k, noise=case.noise)
    )


class OneLayer(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.moe = layer(case)


@functools.cache
def secondary() -> dict[str, torch.Tensor]:
    """The gates within all groups (a, D, b); they start at zero, which would leave ties without noise."""
    shape = (NUM_GROUPS, DIM, PER_GROUP)
    return {
        "moe.experts.w_gate.w_gDb": drawn(*shape, key="secondary"),
        "moe.experts.w_noise.w_gDb": 0.5 * drawn(*shape, key="secondary noise"),
    }


@torch.no_grad()
def fill_primary(gate: NoisyTopK) -> None:
    gate.w_gate.w_DE.copy_(batch()["w_gate"])
    gate.w_noise.w_DE.copy_(batch()["w_noise"])


def whole_layer(case: Case, **balance: float) -> HierarchicalMoE:
    """On one process without a mesh, with the values that every layout must start from."""
    model = OneLayer(case)
    model.moe = layer(case, **balance)
    model.double()
    for name, bound in init_bounds(model).items():
        p = model.get_parameter(name)
        init_parameter(p, name, bound, SEED, range(len(p)) if ".experts." in name else None)
    fill_primary(model.moe.gate)
    with torch.no_grad():
        for name, value in secondary().items():
            model.get_parameter(name).copy_(value)
    return model.moe


# what the ranks do


def ranks(layouts: list[Layout], text: str, folder: Path) -> dict[str, Any]:
    """This rank's part, for each layout (all of one world) and of training."""
    meshes.init_process_group()
    results = [run_layout(layout) for layout in layouts]
    trained = {1: train_alone, 2: train_in_two}.get(dist.get_world_size(), lambda *_: None)(
        text, folder
    )
    meshes.shutdown()
    return {"layouts": results, "trained": trained}


def run_layout(layout: Layout) -> dict[str, Any]:
    mesh = meshes.build_mesh(layout.ep)
    told: dict[str, Any] = {"layer": {}, "sent": {}, "dedup_rank": {}}
    for name, case in CASES.items():
        mesh.ep.bytes_sent.clear()
        told["layer"][name] = run_layer(case, layout, mesh, "all_to_all")
        told["sent"][name] = dict(mesh.ep.bytes_sent)
        told["dedup_rank"][name] = run_layer(case, layout, mesh, "dedup_rank")
    told |= {
        "narrow": run_narrow(layout, mesh),
        "gate_elements": gate_elements(mesh),
        "step": run_step(mesh),
    }
    return told


def parallel_layer(
    case: Case, mesh: meshes.Mesh, dtype: torch.dtype, exchange: str = "auto"
) -> ParallelModel:
    with torch.device("meta"):
        plain = OneLayer(case)
    model = parallelize(plain, mesh, SEED, dtype, MeshConfig(dispatcher=exchange))
    fill_primary(model.module.moe.gate)
    mine = mesh.local_experts(NUM_GROUPS)
    with torch.no_grad():
        for name, p in model.gates.items():
            assert not p.any(), "gates start at zero"
            p.copy_(secondary()[name][mine.start : mine.stop])
    return model


def my_tokens(layout: Layout, rank: int) -> slice:
    return slice(layout.cut[rank] * TIMESTEPS, layout.cut[rank + 1] * TIMESTEPS)


def run_layer(
    case: Case, layout: Layout, mesh: meshes.Mesh, exchange: str
) -> dict[str, torch.Tensor]:
    model = parallel_layer(case, mesh, torch.float64, exchange)
    mine = my_tokens(layout, mesh.dp.index)
    x_TD = batch()["x"][mine].clone().requires_grad_()
    y_TD, stats = model.module.moe(
        x_TD, context(*layout.cut[mesh.dp.index : mesh.dp.index + 2], case)
    )
    ((batch()["weight"][mine] * y_TD).sum() + stats.balance_loss).backward()
    return {
        **gradients(model),
        **{f"d {name}": p.grad for name, p in model.gates.items()},
        "y": y_TD.detach(),
        "dx": x_TD.grad,
        "balance_loss": stats.balance_loss.detach(),
        "importance_E": stats.importance_E,
        "rows_E": stats.load_E,
        "dropped": stats.dropped,
    }


def run_narrow(layout: Layout, mesh: meshes.Mesh) -> dict[str, Any]:
    """The layer in bf16."""
    model = parallel_layer(CASES["k2"], mesh, torch.bfloat16)
    mine = my_tokens(layout, mesh.dp.index)
    x_TD = batch()["x"][mine].bfloat16().requires_grad_()
    y_TD, stats = model.module.moe(
        x_TD, context(*layout.cut[mesh.dp.index : mesh.dp.index + 2], CASES["k2"])
    )
    (y_TD.float().sum() + stats.balance_loss).backward()
    return {
        "gates": {p.dtype for p in model.gates.values()},
        "gate gradients": {p.grad.dtype for p in model.gates.values()},
        "experts": {p.dtype for p in model.experts.values()},
        "y": y_TD.dtype,
        "balance loss": stats.balance_loss.dtype,
        "finite": all(
            p.grad.isfinite().all() for p in [*model.gates.values(), *model.experts.values()]
        ),
        "d w_gate": model.gates["moe.experts.w_gate.w_gDb"].grad,
    }


def gate_elements(mesh: meshes.Mesh) -> int:
    """Of all gate matrices that this rank holds."""
    model = parallel_layer(CASES["k2"], mesh, torch.float64)
    primary = model.module.moe.gate.parameters()
    return sum(p.numel() for p in [*primary, *model.gates.values()])


def run_step(mesh: meshes.Mesh) -> dict[str, Any]:
    """One optimizer step of a dense parameter and a secondary gate, with gradients that make arithmetic easy."""
    dense, gate = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 1, 2))
    optimizer = Optimizer(
        [dense], {}, {"gate": gate}, {}, OptimConfig(max_grad_norm=2.5), mesh, zero_stage=0
    )
    optimizer.start_step(lr=0.5)
    dense.grad, gate.grad = (
        torch.tensor([3.0, 4.0]),
        torch.tensor([[[1.0, -1.0]]]) * (1 + mesh.dp.index),
    )
    optimizer.step()
    told = optimizer.gates["gate"].tensors(1)
    return {
        "norm": optimizer.norm,
        "gate": gate.flatten().tolist(),
        "mean": told[".exp_avg"].flatten().tolist(),
    }


def train_alone(text: str, folder: Path) -> dict[str, Any]:
    run = Run(tiny(*TRAINING, f"data.text={text}")).steps(0, STEPS)
    return {"weights": run.weights(), "norms": run.norms, "losses": run.losses}


def train_in_two(text: str, folder: Path) -> dict[str, Any]:
    """Ten steps without a break; five, a checkpoint, and five more in a run made anew; and the same at ep = 1."""
    sets = [*TRAINING, f"data.text={text}", "batch.grad_accum_steps=2"]
    config = tiny(*sets, "mesh.ep=2")
    whole, first, second = Run(config).steps(0, STEPS), Run(config).steps(0, SAVED), Run(config)
    first.save(folder, SAVED)
    second.load(folder)
    before, after = state(first), state(second)
    second.steps(SAVED, STEPS)
    moved = Run(tiny(*sets, "mesh.ep=1"))
    moved.load(folder)
    moved.steps(SAVED, STEPS)
    expected, got = state(whole), state(second)
    return {
        "weights": whole.weights(),
        "norms": whole.norms,
        "losses": whole.losses,
        "moved weights": moved.weights(),
        "same": {
            "loaded": all(torch.equal(before[k], after[k]) for k in before),
            "keys": before.keys() == after.keys() == expected.keys() == got.keys(),
            "state": all(torch.equal(expected[k], got[k]) for k in expected),
            "losses": first.losses + second.losses == whole.losses,
            "norms": first.norms + second.norms == whole.norms,
        },
    }


def state(run: Run) -> dict[str, torch.Tensor]:
    """Whole weights by name, and the secondary gates with their moments, by global group."""
    whole = run.weights()
    gates = run.optimizer.gates.items()
    for name, t in (
        (n + end, t) for n, gate in gates for end, t in gate.tensors(len(run.losses)).items()
    ):
        parts = [torch.empty_like(t) for _ in range(run.mesh.ep.size)]
        dist.all_gather(parts, t.clone(), group=run.mesh.ep.group)
        whole[name] = torch.cat(parts)
    return whole


# what they should have found


@functools.cache
def reference(case: Case) -> tuple[HierarchicalLayer, dict[str, torch.Tensor]]:
    """The layer over the whole batch, and its leaves by the names of their gradients."""
    ctx = context(0, NUM_SAMPLES, case)
    plain = whole_layer(case)
    names = {"x": "dx", "w_gate": "d moe.gate.w_gate.w_DE", "w_noise": "d moe.gate.w_noise.w_DE"}
    leaf = {
        names[name]: value.clone().requires_grad_()
        for name, value in batch().items()
        if name in names
    }
    leaf |= {f"d {name}": value.clone().requires_grad_() for name, value in secondary().items()}
    leaf |= {f"d moe.experts.experts.{n}": p for n, p in plain.experts.experts.named_parameters()}
    noisy = case.noise and case.train
    gates = Gates(
        leaf["d moe.gate.w_gate.w_DE"],
        leaf["d moe.gate.w_noise.w_DE"],
        leaf["d moe.experts.w_gate.w_gDb"],
        leaf["d moe.experts.w_noise.w_gDb"],
        case.k,
        noise_of(ctx, 0, NUM_GROUPS) if noisy else None,
        noise_of(ctx, 1, NUM_EXPERTS) if noisy else None,
        valid_T=ctx.valid_T.tolist(),
        balance_group_T=[
            t // (TIMESTEPS * case.balance_loss_group_size) for t in range(len(ctx.valid_T))
        ],
        num_balance_groups=NUM_SAMPLES // case.balance_loss_group_size,
        **BALANCE,
    )
    experts = relu_experts(
        *(leaf[f"d moe.experts.experts.{name}"] for name in ("w1_eDF", "w2_eFD"))
    )
    return hierarchical_moe(leaf["dx"], gates, experts), leaf


def noise_of(ctx: TokenContext, level: int, channels: int) -> torch.Tensor:
    """Drawn on the whole batch: (T, channels), by global id of a group or an expert."""
    return token_noise.token_normal(
        dataclasses.replace(ctx, gate_level=level), "gate", torch.arange(channels), torch.float64
    )


@functools.cache
def expected(case: Case) -> dict[str, torch.Tensor]:
    result, leaf = reference(case)
    ((batch()["weight"] * result.y_TD).sum() + result.balance_loss).backward()
    return {
        **{name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in leaf.items()},
        **{name[2:]: p.detach() for name, p in leaf.items() if ".experts.experts." in name},
        "y": result.y_TD.detach(),
        "balance_loss": result.balance_loss.detach(),
        "importance_E": result.importance_GE.detach().sum(0),
        "rows_E": torch.tensor(result.rows_E),
        "dropped": torch.tensor(0),
    }


@pytest.fixture(scope="module")
def spawned(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By world: what its ranks returned. One start of processes serves all layouts of a world."""

    @functools.cache
    def of(world: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("run")
        return run_distributed(ranks, world, _of_world(world), str(small_text), folder, timeout=240)

    return of


@pytest.fixture(
    scope="module", params=LAYOUTS, ids=lambda layout: f"world{layout.world}-ep{layout.ep}"
)
def ran(request: pytest.FixtureRequest, spawned: Any) -> tuple[Layout, list[dict[str, Any]]]:
    """A layout and what its ranks returned."""
    layout = request.param
    place = _of_world(layout.world).index(layout)
    return layout, [result["layouts"][place] for result in spawned(layout.world)]


def _of_world(world: int) -> list[Layout]:
    return [layout for layout in LAYOUTS if layout.world == world]


# on any layout


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("exchange", ["layer", "dedup_rank"], ids=["all_to_all", "dedup_rank"])
def test_layer_equals_reference(
    ran: tuple[Layout, list[dict[str, Any]]], case: str, exchange: str
) -> None:
    layout, by_rank = ran
    assert_equal(
        gathered([rank[exchange][case] for rank in by_rank], layout.ep), expected(CASES[case])
    )


@pytest.mark.parametrize("case", CASES)
def test_a_token_crosses_once_for_each_chosen_group(
    ran: tuple[Layout, list[dict[str, Any]]], case: str
) -> None:
    """k rows a token and not k²; and counts of groups, not of experts."""
    layout, by_rank = ran
    groups_T, per_rank = reference(CASES[case])[0].groups_T, NUM_GROUPS // layout.ep
    for rank, result in enumerate(by_rank):
        mine = groups_T[my_tokens(layout, rank)]
        rows = sum(
            group // per_rank != rank % layout.ep for groups in mine for group in groups
        )  # to other ranks
        sent = result["sent"][case]
        # float64 rows and weights, and two int64 that say where a token stands
        assert sent.get((PLACE, "dispatch", False), 0) == rows * (DIM * 8 + 8 + 2 * 8)
        assert sent.get((PLACE, "combine_backward", False), 0) == rows * DIM * 8
        assert sent.get((PLACE, "counts", False), 0) == (layout.ep - 1) * per_rank * 8
        assert sent.keys() <= {
            (PLACE, d, False)
            for d in ("counts", "dispatch", "dispatch_backward", "combine", "combine_backward")
        }
    assert {len(groups) for groups in groups_T} == {0, CASES[case].k}
    if (layout.ep, case) == (2, "k2"):
        assert sum(r["sent"][case][PLACE, "dispatch", False] for r in by_rank) > 0


def test_no_rank_holds_a_gate_over_all_experts(ran: tuple[Layout, list[dict[str, Any]]]) -> None:
    layout, by_rank = ran
    elements = 2 * DIM * (NUM_GROUPS + PER_GROUP * NUM_GROUPS // layout.ep)  # W_g and W_noise
    assert [rank["gate_elements"] for rank in by_rank] == [elements] * layout.world


def test_secondary_gates_stay_in_float32(ran: tuple[Layout, list[dict[str, Any]]]) -> None:
    _, by_rank = ran
    for rank in by_rank:
        narrow = rank["narrow"]
        assert narrow["gates"] == narrow["gate gradients"] == {torch.float32} and narrow["finite"]
        assert narrow["experts"] == {torch.bfloat16} and narrow["y"] == torch.bfloat16
        assert narrow["balance loss"] == torch.float64, (
            "made of sums over a batch, whose differences count"
        )
    gradient = torch.cat([rank["narrow"]["d w_gate"] for rank in by_rank])
    assert not torch.equal(gradient, gradient.bfloat16().float()), (
        "computed in float32, not rounded on the way"
    )


# training


def test_gates_are_in_the_norm_and_under_adam(ran: tuple[Layout, list[dict[str, Any]]]) -> None:
    """Rank r has a gradient of (1, -1) (1 + r) for its gate; that of the gate is the sum over its replicas, over all
    ranks. The dense gradient is (3, 4), so norm² = 25 + 2 sum of squares of the gates'."""
    layout, by_rank = ran
    gradient = [
        sum(1 + r for r in range(e, layout.world, layout.ep)) / layout.world
        for e in range(layout.ep)
    ]
    norm = (25 + sum(2 * g**2 for g in gradient)) ** 0.5
    for rank, result in enumerate(by_rank):
        step, g = result["step"], gradient[rank % layout.ep] * 2.5 / norm  # clipped to 2.5
        owned = rank < layout.ep  # the first of a gate's replicas updates it
        assert step["norm"] == pytest.approx(norm)
        assert step["mean"] == pytest.approx(
            [0.1 * g, -0.1 * g] if owned else []
        )  # 1 - beta1 = 0.1
        assert step["gate"] == pytest.approx(
            [-0.5, 0.5]
        )  # the first step of Adam is the learning rate


def test_training_on_two_ranks_is_training_on_one(spawned: Any) -> None:
    """Ten clipped steps at ep 2 with accumulation 2."""
    alone = spawned(1)[0]["trained"]
    gates = [name for name in alone["weights"] if ".experts.w_" in name]
    assert sorted(gates) == ["middle.experts.w_gate.w_gDb", "middle.experts.w_noise.w_gDb"]
    assert all(alone["weights"][name].abs().max() > 1e-4 for name in gates), "they have learnt"
    for rank in spawned(2):
        told = rank["trained"]
        assert told["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        assert told["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert deviation(told["weights"], alone["weights"]) < 1e-5


def test_a_checkpoint_goes_on_bit_identically(spawned: Any) -> None:
    for rank in spawned(2):
        assert all(rank["trained"]["same"].values()), rank["trained"]["same"]


def test_a_checkpoint_goes_on_at_another_ep(spawned: Any) -> None:
    for rank in spawned(2):
        assert (
            deviation(rank["trained"]["moved weights"], spawned(1)[0]["trained"]["weights"]) < 1e-5
        )


# in one process


@pytest.mark.parametrize("case", CASES)
def test_importance_sums_to_the_valid_tokens(case: str) -> None:
    _, stats = whole_layer(CASES[case])(batch()["x"], context(0, NUM_SAMPLES, CASES[case]))
    assert stats.importance_E.sum().item() == pytest.approx(sum(LENGTHS), abs=1e-12)
    assert stats.load_E.sum() == CASES[case].k ** 2 * sum(LENGTHS)


@pytest.mark.parametrize("case", ["k1", "k2", "balance_groups"])
def test_the_load_loss_teaches_the_primary_gate(case: str) -> None:
    """Why Eq. 14 has the factor Load_prim: the load of a group's experts alone has no derivative by the primary
    gate."""
    moe = whole_layer(CASES[case], importance_loss_weight=0.0)
    moe(batch()["x"], context(0, NUM_SAMPLES, CASES[case]))[1].balance_loss.backward()
    for p in (
        *moe.gate.parameters(),
        *moe.experts.w_gate.parameters(),
        *moe.experts.w_noise.parameters(),
    ):
        assert p.grad.abs().max() > 1e-3
    assert all(p.grad is None for p in moe.experts.experts.parameters())


@pytest.mark.parametrize("case", CASES)
def test_empty_groups_give_no_nan(case: str) -> None:
    moe, x_TD = whole_layer(CASES[case]), batch()["x"].clone().requires_grad_()
    y_TD, stats = moe(x_TD, context(0, NUM_SAMPLES, CASES[case]))
    assert all(stats.load_E.view(NUM_GROUPS, PER_GROUP)[i].sum() == 0 for i in NEVER)
    (y_TD.square().sum() + stats.balance_loss).backward()
    for p in (x_TD, *moe.parameters()):
        assert p.grad is None or p.grad.isfinite().all()
    for i in NEVER:
        assert not moe.experts.w_gate.w_gDb.grad[i].any()


def test_no_token_at_all() -> None:
    case = CASES["balance_groups"]
    moe, x_TD = whole_layer(case), batch()["x"].clone().requires_grad_()
    ctx = dataclasses.replace(
        context(0, NUM_SAMPLES, case), valid_T=torch.zeros(len(x_TD), dtype=torch.bool)
    )
    y_TD, stats = moe(x_TD, ctx)
    (y_TD.sum() + stats.balance_loss).backward()
    assert stats.balance_loss == 0 and not y_TD.any()
    assert not any(p.grad.any() for p in moe.parameters())


def test_eq_14_by_hand() -> None:
    """Two groups of two experts, two balance groups; the load loss alone, of weight 1.

    Balance group 1: Load_prim = (3, 1), |X^(1)| = 4, |X^(2)| = 2, Load_1 = (3, 1), Load_2 = (1, 1).
      Load_H = (3·3/4, 3·1/4, 1·1/2, 1·1/2) = (2.25, 0.75, 0.5, 0.5), mean 1,
      CV² = (1.25² + 0.25² + 0.5² + 0.5²) / 4 = 2.125 / 4 = 0.53125.
      dCV²/dLoad_H = (Load_H - 1) / 2 - CV² / 2 = (0.359375, -0.390625, -0.515625, -0.515625), so
      dCV²/dLoad_prim = (0.359375·3/4 - 0.390625·1/4, -2·0.515625·1/2) = (0.171875, -0.515625).
    Balance group 2: Load_prim = (2, 0.5), but no token chose group 2: |X| = (2, 0), Load_1 = (1, 1).
      Load_H = (2·1/2, 2·1/2, 0, 0) = (1, 1, 0, 0), mean 0.5, CV² = 4·0.5² / 4 / 0.5² = 1.
      dCV²/dLoad_H of the first two = 2 (1 - 0.5) - 1 = 0, and an empty group takes no derivative.
    """
    load_prim = torch.tensor([[3.0, 1.0], [2.0, 0.5]], requires_grad=True)
    load_i = torch.tensor([[3.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]], requires_grad=True)
    rows = torch.tensor([[4.0, 2.0], [2.0, 0.0]])
    count_E = torch.tensor([5, 1, 1, 1])
    moe = HierarchicalMoE(
        NoisyTopK(1, 2, 1, importance_loss_weight=0.0, load_loss_weight=1.0),
        ExpertGroups(2, 2, 1, 1, 1, noise=True),
    )
    stats = moe.stats(
        Routing(torch.zeros(8, dtype=torch.int64), torch.ones(8), torch.tensor([6, 2])),
        GateStats(torch.ones(2, 2), load_prim, torch.tensor(0)),
        GroupStats(torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), load_i, rows, count_E),
    )
    assert stats.balance_loss.item() == pytest.approx(0.53125 + 1)
    stats.balance_loss.backward()
    assert load_prim.grad.tolist() == [pytest.approx([0.171875, -0.515625]), pytest.approx([0, 0])]
    assert load_i.grad.isfinite().all()
    assert stats.importance_E.tolist() == [6, 8, 10, 12]
    assert torch.equal(stats.load_E, count_E)
    for group, load_h_E in enumerate([[2.25, 0.75, 0.5, 0.5], [1, 1, 0, 0]]):
        assert [
            v.item()
            for v in load_h(list(load_prim[group]), list(load_i[group]), rows[group].tolist())
        ] == load_h_E


def test_eqs_12_and_13_by_hand() -> None:
    """Two groups of two experts, all chosen; x = 1, and expert (i, j) gives (10, 20; 30, 40).

    Primary logits (ln 3, 0): G_prim = (3/4, 1/4). Secondary (ln 2, 0; 0, 0): G_1 = (2/3, 1/3), G_2 = (1/2, 1/2).
    y = 3/4·2/3·10 + 3/4·1/3·20 + 1/4·1/2·30 + 1/4·1/2·40 = 5 + 5 + 3.75 + 5 = 18.75.
    Importance_H of four such tokens: 4·(1/2, 1/4, 1/8, 1/8) = (2, 1, 0.5, 0.5), mean 1,
    CV² = (1 + 0 + 0.25 + 0.25) / 4 = 0.375. Load_H = 4·4/4 each, CV² = 0.
    """
    ctx = context(0, 1, Case(train=False))  # four valid tokens
    moe = HierarchicalMoE(
        NoisyTopK(1, 2, 2, importance_loss_weight=1.0, load_loss_weight=1.0),
        ExpertGroups(2, 2, 1, 1, 2, noise=True),
    ).double()
    with torch.no_grad():
        for p in moe.parameters():
            p.zero_()
        moe.gate.w_gate.w_DE.copy_(torch.tensor([[3.0, 1.0]]).log())
        moe.experts.w_gate.w_gDb.copy_(torch.tensor([[[2.0, 1.0]], [[1.0, 1.0]]]).log())
        moe.experts.experts.w1_eDF.fill_(1.0)
        moe.experts.experts.w2_eFD.copy_(torch.tensor([10.0, 20, 30, 40]).view(4, 1, 1))
    x_TD = torch.ones(4, 1, dtype=torch.float64)
    y_TD, stats = moe(x_TD, ctx)
    gates = Gates(
        moe.gate.w_gate.w_DE,
        moe.gate.w_noise.w_DE,
        moe.experts.w_gate.w_gDb,
        moe.experts.w_noise.w_gDb,
        2,
        None,
        None,
        [True] * 4,
        [0] * 4,
        1,
        importance_loss_weight=1.0,
        load_loss_weight=1.0,
    )
    slow = hierarchical_moe(
        x_TD, gates, relu_experts(moe.experts.experts.w1_eDF, moe.experts.experts.w2_eFD)
    )
    for y, importance_E, loss in (
        (y_TD, stats.importance_E, stats.balance_loss),
        (slow.y_TD, slow.importance_GE[0], slow.balance_loss),
    ):
        assert y.flatten().tolist() == pytest.approx(
            [18.75] * 4, rel=1e-7
        )  # logits are float32 logarithms
        assert importance_E.tolist() == pytest.approx([2, 1, 0.5, 0.5], rel=1e-7)
        assert loss.item() == pytest.approx(0.375, rel=1e-6)


@pytest.mark.parametrize("k", [0, 3])
def test_more_experts_than_a_group_has_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} experts per group: must be 1 to 2"):
        ExpertGroups(4, 2, DIM, HIDDEN, k, noise=True)


def test_cases_are_what_they_say() -> None:
    valid = sum(LENGTHS)  # 18
    results = {name: reference(case)[0] for name, case in CASES.items()}
    for name, result in results.items():
        rows_ab = torch.tensor(result.rows_E).view(NUM_GROUPS, PER_GROUP)
        assert rows_ab.sum() == CASES[name].k ** 2 * valid
        assert not rows_ab[list(NEVER)].any()
        assert not result.load_GE.view(-1, NUM_GROUPS, PER_GROUP)[:, list(NEVER)].any()
    assert all(
        results["whole_group"].rows_E[i * PER_GROUP] > 0
        for i in range(NUM_GROUPS)
        if i not in NEVER
    )
    # without noise Eq. 14 counts: Load_prim(X)_i = |X^(i)|
    assert results["evaluation"].load_GE[0].tolist() == pytest.approx(results["evaluation"].rows_E)
    by_group = results["balance_groups"].importance_GE.sum(1)
    assert by_group.tolist() == pytest.approx([6, 0, 5, 7])  # valid tokens of each
    one_token_a = results["k1_balance_groups"].load_GE[4].view(NUM_GROUPS, PER_GROUP).sum(1)
    assert (one_token_a == 0).sum() == NUM_GROUPS - 1, "groups empty in a balance group alone"
