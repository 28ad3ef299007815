"""WideNet and its baselines: tiny models on 1, 2 and 4 ranks against a slow reference, in float64:
values and every gradient.

The batch of 8 samples is cut over the ranks as in `test_parity`: unevenly, one rank without any.

Legend: T tokens, B samples, S tokens of each, D width, E experts, N classes or masked tokens.
"""

import dataclasses
import functools
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from encoder_cases import (
    DIM,
    GROUPED,
    MASKED,
    MOE,
    NUM_EXPERTS,
    VOCABULARY_SIZE,
    WIDENET,
    fill_zeros,
    filled,
    image_context,
    images,
    make,
    places,
    text_context,
    words,
)
from reference_widenet import Uses, text, vision
from uneven_batch import (
    LAYOUTS,
    NUM_SAMPLES,
    SEED,
    TIMESTEPS,
    Layout,
    assert_equal,
    drawn,
    gathered,
    gradients,
)

from moe_dist.config.schema import (
    OptimConfig,
    TextConfig,
    VisionConfig,
)
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.labels import CommLabel, TrafficKey
from moe_dist.distributed.spawn import run_distributed
from moe_dist.engine.parallelize import ParallelModel, parallelize
from moe_dist.nn import token_noise
from moe_dist.optim.optimizer import Optimizer

pytestmark = pytest.mark.timeout(300)
POST_LN = dataclasses.replace(WIDENET, depth=2, norm_first=False, blocks_per_norm=None)
CASES: dict[str, tuple[VisionConfig | TextConfig, list[int]]] = {  # and which blocks have experts
    "vision": (
        VisionConfig(image_size=4, channels=3, patch_size=2, num_classes=5, encoder=WIDENET),
        [0, 1, 2],
    ),
    "text": (
        TextConfig(VOCABULARY_SIZE, embedding_dim=6, max_tokens=5, encoder=WIDENET),
        [0, 1, 2],
    ),
    "text_grouped": (
        TextConfig(VOCABULARY_SIZE, embedding_dim=6, max_tokens=5, encoder=GROUPED),
        [1, 2, 4],
    ),
    "text_post_ln": (
        TextConfig(VOCABULARY_SIZE, embedding_dim=6, max_tokens=5, encoder=POST_LN),
        [0, 1],
    ),
}
EXCHANGES = {"counts", "dispatch", "combine", "dispatch_backward", "combine_backward"}


def weights(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weights of the loss: L = sum of weights x logits, of classes or masked words
    and of the order, + balance losses."""
    if name == "vision":
        return drawn(NUM_SAMPLES, 5, key="classes"), torch.empty(0)
    return drawn(len(MASKED), VOCABULARY_SIZE, key="masked"), drawn(NUM_SAMPLES, 2, key="order")


def ranks(layouts: list[Layout]) -> list[dict[str, Any]]:
    """Returns this rank's values and gradients for each layout (all of one world): {case name:
    {quantity: tensor}}."""
    meshes.init_process_group()
    results = []
    for layout in layouts:
        mesh = meshes.build_mesh(layout.ep)
        results.append({name: run_case(name, layout, mesh) for name in CASES})
        results[-1]["step"] = run_step(layout, mesh)
    meshes.shutdown()
    return results


def run_case(name: str, layout: Layout, mesh: meshes.Mesh) -> dict[str, Any]:
    model = on_mesh(name, mesh)
    labels: set[CommLabel] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes.Axis, "record_bytes", lambda axis, label, bytes_P: labels.add(label))
        values = forward_backward(name, model, *layout.cut[mesh.dp.index : mesh.dp.index + 2])
    return gradients(model) | values | {"labels": labels}


def run_step(layout: Layout, mesh: meshes.Mesh) -> dict[str, Any]:
    """Does a whole step with the expert update in backward, in which a second gradient of an
    expert is an error. Returns the number of collectives, bytes of expert gradients, and the
    experts that changed."""
    model = on_mesh("vision", mesh)
    config = OptimConfig(max_grad_norm=None, fuse_expert_update_in_backward=True)
    optimizer = Optimizer(
        model.dense_parameters().values(), model.experts, {}, {}, config, mesh, zero_stage=0
    )
    before = {key: p.detach().clone() for key, p in model.experts.items()}
    optimizer.start_step(1e-3)
    with pytest.MonkeyPatch.context() as patch:
        calls: Counter[str] = Counter()
        for name in ("all_to_all_single", "reduce"):
            call = getattr(dist, name)
            patch.setattr(
                dist, name, lambda *a, n=name, c=call, **k: (calls.update([n]), c(*a, **k))[1]
            )
        forward_backward("vision", model, *layout.cut[mesh.dp.index : mesh.dp.index + 2])
        optimizer.step()
    changed_ = [key for key, p in model.experts.items() if not torch.equal(p, before[key])]
    return {
        "calls": dict(calls),
        "bytes": mesh.expert_dp.bytes_sent[TrafficKey("experts", "gradients", False)],
        "changed": changed_,
    }


def on_mesh(name: str, mesh: meshes.Mesh) -> ParallelModel:
    with torch.device("meta"):
        plain = make(CASES[name][0])
    model = parallelize(plain, mesh, SEED, torch.float64)
    mine = mesh.local_experts(NUM_EXPERTS)
    fill_zeros([*model.dense_parameters().items()])
    fill_zeros([*model.experts.items()], slice(mine.start, mine.stop))
    return model


def forward_backward(
    name: str, model: ParallelModel, first: int, last: int
) -> dict[str, torch.Tensor]:
    weight, weight_order = weights(name)
    if name == "vision":
        y, stats = model.module(images()[first:last], image_context(first, last))
        loss = (weight[first:last] * y).sum()
    else:
        token_BS, kind_BS = words()
        y, order_B2, stats = model.module(
            token_BS[first:last],
            kind_BS[first:last],
            places(first, last),
            text_context(first, last),
        )
        mine = torch.tensor([first <= b < last for b, _ in MASKED])
        loss = (weight[mine] * y).sum() + (weight_order[first:last] * order_B2).sum()
    balance_loss = torch.stack([s.balance_loss for s in stats.values()]).sum()
    (loss + balance_loss).backward()
    return {
        "y": y.detach(),
        "loss": loss.detach(),
        "balance_loss": balance_loss.detach(),
        "rows": torch.stack([s.load_E for s in stats.values()]),
        "dropped": torch.stack([s.dropped for s in stats.values()]),
    }


@functools.cache
def expected_case(name: str) -> dict[str, torch.Tensor]:
    config, moe_blocks = CASES[name]
    parameters = {key: p.detach().requires_grad_() for key, p in filled(config).named_parameters()}
    ctx = image_context(0, NUM_SAMPLES) if name == "vision" else text_context(0, NUM_SAMPLES)
    ones_TD = torch.ones(NUM_SAMPLES * TIMESTEPS, DIM, dtype=torch.float64)
    uses = Uses(
        valid_T=ctx.valid_T.tolist(),
        # the patches of an image see each other, whether it is padding or not
        seen_T=[name == "vision" or valid for valid in ctx.valid_T.tolist()],
        balance_group_T=[t // (4 * TIMESTEPS) for t in range(len(ones_TD))],
        token_group_T=[t // (2 * TIMESTEPS) for t in range(len(ones_TD))],
        noise=lambda site: token_noise.token_normal(
            ctx.at_layer(site), "gate", torch.arange(NUM_EXPERTS), torch.float64
        ),
        mask=lambda site: token_noise.token_dropout(
            ones_TD, config.encoder.dropout, ctx.at_layer(site)
        ),
    )
    weight, weight_order = weights(name)
    if name == "vision":
        y, layers = vision(config.encoder, parameters, images(), 2, moe_blocks, uses)
        loss = (weight * y).sum()
    else:
        masked_N = [b * TIMESTEPS + s for b, s in MASKED]
        y, order_B2, layers = text(config.encoder, parameters, *words(), masked_N, moe_blocks, uses)
        loss = (weight * y).sum() + (weight_order * order_B2).sum()
    balance_loss = torch.stack([layer.balance_loss for layer in layers]).sum()
    (loss + balance_loss).backward()
    return {
        "y": y.detach(),
        "loss": loss.detach(),
        "balance_loss": balance_loss.detach(),
        "rows": torch.tensor([layer.rows_E for layer in layers]),
        "dropped": torch.tensor([layer.dropped for layer in layers]),
        **{f"d {key}": p.grad for key, p in parameters.items()},
        **{key: p.detach() for key, p in parameters.items() if ".experts." in key},
    }


@functools.cache
def _spawned(world: int) -> list[list[dict[str, Any]]]:
    """Starts the processes of a world once for all its layouts."""
    return run_distributed(
        ranks, world, [layout for layout in LAYOUTS if layout.world == world], timeout=240
    )


@pytest.fixture(
    scope="module", params=LAYOUTS, ids=lambda layout: f"world{layout.world}-ep{layout.ep}"
)
def ran(request: pytest.FixtureRequest) -> tuple[Layout, list[dict[str, Any]]]:
    """Returns a layout and the results of its ranks."""
    layout = request.param
    place = [other for other in LAYOUTS if other.world == layout.world].index(layout)
    return layout, [results[place] for results in _spawned(layout.world)]


@pytest.mark.parametrize("name", CASES)
def test_models_equal_the_reference(ran: tuple[Layout, list[dict[str, Any]]], name: str) -> None:
    layout, by_rank = ran
    tensors = [
        {key: value for key, value in rank[name].items() if key != "labels"} for rank in by_rank
    ]
    assert_equal(gathered(tensors, layout.ep), expected_case(name))


def test_shared_experts_dispatch_at_every_depth_and_reduce_once(
    ran: tuple[Layout, list[dict[str, Any]]],
) -> None:
    """T blocks are T exchanges each way, each with the shared layer's name and its own layer call,
    also if blocks share
    a routing; a gradient is reduced once."""
    layout, by_rank = ran
    away, replicas = layout.ep > 1, layout.world // layout.ep
    for name, (config, moe_blocks) in CASES.items():
        labels = set()
        for i in moe_blocks if away else ():
            layer = i // (config.encoder.blocks_per_ffn or config.encoder.depth)
            for direction in EXCHANGES:
                labels.add(CommLabel(f"encoder.ffn.moe{layer}", direction, 2 * i + 2))
        assert all(rank[name]["labels"] == labels for rank in by_rank)
    calls = {}
    # each use: counts, rows and weights there, rows back; and all but the counts again in backward
    if away:
        calls["all_to_all_single"] = WIDENET.depth * (4 + 3)
    if replicas > 1:  # 4 stacks, each in a part for every replica
        calls["reduce"] = 4 * replicas
    bytes_of_experts = (
        8
        * NUM_EXPERTS
        // layout.ep
        * (2 * DIM * MOE.expert_hidden_dim + MOE.expert_hidden_dim + DIM)
    )
    for rank in by_rank:
        assert rank["step"]["calls"] == calls
        assert rank["step"]["bytes"] == bytes_of_experts * (replicas - 1) // replicas, (
            "the mean share of a ring"
        )
        assert len(rank["step"]["changed"]) == 4


def test_widenet_cases_have_their_properties() -> None:
    for name, (config, _) in CASES.items():
        expected = expected_case(name)
        assert (expected["dropped"] > 0).all() and (expected["rows"].sum(1) > 0).all()
        assert expected["balance_loss"] > 0
        assert len({tuple(rows.tolist()) for rows in expected["rows"]}) > 1, (
            "routes differ by depth"
        )
        still = [key for key, value in expected.items() if key.startswith("d ") and not value.any()]
        assert not still, f"{name}: no gradient of {still}"
        assert config.encoder.dropout > 0 and config.encoder.moe.noise
