"""Hierarchical experts on 1, 2 and 4 ranks against a slow reference, in float64; and the bytes that
they send.

The batch, its cuts over ranks and the primary gate are those of `test_parity`: what were experts
there are groups here, of three experts each. Groups 4 and 5 no token chooses: with ep = 4 these are
all of the rank that has no tokens.

Legend: T tokens, D width, a groups, b experts per group, E = a b experts, G balance groups.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from comparisons import deviation
from hierarchical_cases import (
    CASES,
    PER_GROUP,
    OneLayer,
    expected,
    fill_primary,
    reference,
    secondary,
)
from runs import Run, tiny
from torch import nn
from uneven_batch import (
    DIM,
    LAYOUTS,
    SEED,
    TIMESTEPS,
    Case,
    Layout,
    assert_equal,
    batch,
    context,
    gathered,
    gradients,
)
from uneven_batch import NUM_EXPERTS as NUM_GROUPS

from moe_dist.config.schema import MeshConfig, OptimConfig
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.spawn import run_distributed
from moe_dist.engine.parallelize import ParallelModel, parallelize
from moe_dist.optim.optimizer import Optimizer

pytestmark = pytest.mark.timeout(300)
PLACE = "moe"  # of the labels of a dispatcher without a layer name

TRAINING = ["model.moe.num_experts=16", "model.moe.num_groups=4", "zero_stage=1"]
STEPS, SAVED = 10, 5


# what the ranks do


def ranks(layouts: list[Layout], text: str, folder: Path) -> dict[str, Any]:
    """Returns this rank's results for each layout (all of one world) and of training."""
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
        for name, p in model.group_gates.items():
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
        **{f"d {name}": p.grad for name, p in model.group_gates.items()},
        "y": y_TD.detach(),
        "dx": x_TD.grad,
        "balance_loss": stats.balance_loss.detach(),
        "importance_E": stats.importance_E,
        "rows_E": stats.load_E,
        "dropped": stats.dropped,
    }


def run_narrow(layout: Layout, mesh: meshes.Mesh) -> dict[str, Any]:
    """Runs the layer in bf16."""
    model = parallel_layer(CASES["k2"], mesh, torch.bfloat16)
    mine = my_tokens(layout, mesh.dp.index)
    x_TD = batch()["x"][mine].bfloat16().requires_grad_()
    y_TD, stats = model.module.moe(
        x_TD, context(*layout.cut[mesh.dp.index : mesh.dp.index + 2], CASES["k2"])
    )
    (y_TD.float().sum() + stats.balance_loss).backward()
    return {
        "gates": {p.dtype for p in model.group_gates.values()},
        "gate gradients": {p.grad.dtype for p in model.group_gates.values()},
        "experts": {p.dtype for p in model.experts.values()},
        "y": y_TD.dtype,
        "balance loss": stats.balance_loss.dtype,
        "finite": all(
            p.grad.isfinite().all() for p in [*model.group_gates.values(), *model.experts.values()]
        ),
        "d w_gate": model.group_gates["moe.experts.w_gate.w_gDb"].grad,
    }


def gate_elements(mesh: meshes.Mesh) -> int:
    """Returns the number of elements of all gate matrices on this rank."""
    model = parallel_layer(CASES["k2"], mesh, torch.float64)
    primary = model.module.moe.gate.parameters()
    return sum(p.numel() for p in [*primary, *model.group_gates.values()])


def run_step(mesh: meshes.Mesh) -> dict[str, Any]:
    """Does one optimizer step of a dense parameter and a secondary gate, with gradients chosen
    for easy arithmetic."""
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
    told = optimizer.group_gates["gate"].tensors(1)
    return {
        "norm": optimizer.norm,
        "gate": gate.flatten().tolist(),
        "mean": told[".exp_avg"].flatten().tolist(),
    }


def train_alone(text: str, folder: Path) -> dict[str, Any]:
    run = Run(tiny(*TRAINING, f"data.text={text}")).steps(0, STEPS)
    return {"weights": run.weights(), "norms": run.norms, "losses": run.losses}


def train_in_two(text: str, folder: Path) -> dict[str, Any]:
    """Trains ten steps without a break; five, a checkpoint, and five more in a new run; and
    the same at ep = 1."""
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
    """Returns whole weights by name, and the secondary gates with their moments, by global
    group."""
    whole = run.weights()
    gates = run.optimizer.group_gates.items()
    for name, t in (
        (n + end, t) for n, gate in gates for end, t in gate.tensors(len(run.losses)).items()
    ):
        parts = [torch.empty_like(t) for _ in range(run.mesh.ep.size)]
        dist.all_gather(parts, t.clone(), group=run.mesh.ep.group)
        whole[name] = torch.cat(parts)
    return whole


@pytest.fixture(scope="module")
def spawned(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns the results of the ranks by world size. One start of processes serves all
    layouts of a world."""

    @functools.cache
    def of(world: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("run")
        return run_distributed(ranks, world, _of_world(world), str(small_text), folder, timeout=240)

    return of


@pytest.fixture(
    scope="module", params=LAYOUTS, ids=lambda layout: f"world{layout.world}-ep{layout.ep}"
)
def ran(request: pytest.FixtureRequest, spawned: Any) -> tuple[Layout, list[dict[str, Any]]]:
    """Returns a layout and the results of its ranks."""
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
def test_token_is_sent_once_for_each_chosen_group(
    ran: tuple[Layout, list[dict[str, Any]]], case: str
) -> None:
    """A token sends k rows, not k², and the counts are of groups, not of experts."""
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


def test_group_gates_are_in_the_norm_and_use_adam(ran: tuple[Layout, list[dict[str, Any]]]) -> None:
    """Rank r has a gradient of (1, -1) (1 + r) for its gate; that of the gate is the sum over its
    replicas, over all
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


def test_training_on_two_ranks_equals_one(spawned: Any) -> None:
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


def test_resume_is_bit_identical(spawned: Any) -> None:
    for rank in spawned(2):
        assert all(rank["trained"]["same"].values()), rank["trained"]["same"]


def test_resume_at_another_ep(spawned: Any) -> None:
    for rank in spawned(2):
        assert (
            deviation(rank["trained"]["moved weights"], spawned(1)[0]["trained"]["weights"]) < 1e-5
        )
