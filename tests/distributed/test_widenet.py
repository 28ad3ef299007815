"""WideNet and its baselines: the paper's parameters, and tiny models, whose blocks share what they are made of, on 1, 2
and 4 ranks against a slow reference, in float64: values and every gradient.

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
from reference_widenet import Uses, text, vision
from uneven_batch import (
    LAYOUTS,
    LENGTHS,
    NUM_SAMPLES,
    SEED,
    TIMESTEPS,
    Case,
    Layout,
    assert_equal,
    context,
    drawn,
    gathered,
    gradients,
)

from moe_dist.config import papers
from moe_dist.config.papers import xue2021
from moe_dist.config.schema import (
    EncoderConfig,
    OptimConfig,
    SoftmaxMoEConfig,
    TextConfig,
    VisionConfig,
)
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.labels import CommLabel, TrafficKey
from moe_dist.distributed.spawn import run_distributed
from moe_dist.engine.parallelize import ParallelModel, parallelize
from moe_dist.models.text_encoder import PretrainingModel
from moe_dist.models.transformer import Block, build_blocks, norm_divergence
from moe_dist.models.vision_transformer import VisionTransformer
from moe_dist.nn import prng, token_noise
from moe_dist.nn.init import init_bounds, init_parameter
from moe_dist.nn.token_context import TokenContext
from moe_dist.optim.optimizer import Optimizer

pytestmark = pytest.mark.timeout(300)

DIM, NUM_EXPERTS, VOCABULARY_SIZE = 8, 4, 11
MOE = SoftmaxMoEConfig(
    num_experts=NUM_EXPERTS, k=2, expert_hidden_dim=10, capacity_factor=1.0, balance_loss_weight=0.5
)
WIDENET = EncoderConfig(depth=3, dim=DIM, num_heads=2, ffn_hidden_dim=12, dropout=0.25, moe=MOE)
# 5 blocks: attention of 0-1, 2-3, 4; ffn of 0-2 and of 3-4; norms of 0-1, 2-3, 4; assignments of 0-2 and of 3-4
GROUPED = dataclasses.replace(
    WIDENET,
    depth=5,
    moe_blocks="1,2,4",
    blocks_per_attention=2,
    blocks_per_ffn=3,
    blocks_per_norm=2,
    blocks_per_routing=3,
)
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
MASKED = [
    (b, s) for b, length in enumerate(LENGTHS) for s in range(length) if (b + s) % 2
]  # samples and places
GROUPS = Case(balance_loss_group_size=4, capacity_group_size=2)
EXCHANGES = {"counts", "dispatch", "combine", "dispatch_backward", "combine_backward"}


def make(config: VisionConfig | TextConfig) -> VisionTransformer | PretrainingModel:
    return (
        VisionTransformer(config) if isinstance(config, VisionConfig) else PretrainingModel(config)
    )


def parameters_of(config: VisionConfig | TextConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in make(config).named_parameters()}


def num_parameters(config: VisionConfig | TextConfig) -> int:
    return sum(shape.numel() for shape in parameters_of(config).values())


def changed(config: VisionConfig | TextConfig, **changes: Any) -> VisionConfig | TextConfig:
    return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **changes))


# the paper's models


@pytest.mark.parametrize(
    ("name", "parameters", "millions"),
    [
        ("vit_b", 87_147_496, 87),
        ("vit_l", 305_349_608, 305),
        ("vit_moe_b", 128_079_336, 128),
        ("vit_moe_l", 406_090_728, 406),
        ("widenet_b", 29_689_064, 29),
        ("widenet_l", 40_939_496, 40),
        ("widenet_h", 63_339_240, 63),
        ("albert", 11_813_042, 12),
        ("bert_factorised", 89_771_186, 89),
        ("widenet_text_4", 26_018_738, 26),
        ("widenet_text_8", 44_911_538, 45),
        ("widenet_text_16", 82_697_138, 83),
    ],
)
def test_parameters_are_the_papers(name: str, parameters: int, millions: int) -> None:
    """Truncated or rounded to a million."""
    counted = num_parameters(papers.get(name).model)
    assert counted == parameters
    assert millions in (counted // 10**6, round(counted / 10**6))


def test_parameters_of_widenet_b_by_hand() -> None:
    # width 768: attention 4 x 768² + 3 x 768, for keys have no bias; of 4 experts each 2 x 768 x 4096 + 4096 + 768, the
    # router 4 x 768; 12 blocks x 2 norms x 2 x 768; patches 768 x 768 + 768, places 196 x 768, last norm 2 x 768,
    # representation 768 x 768 + 768, classes 768 x 1000 + 1000
    encoder = 2_361_600 + 4 * 6_296_320 + 3_072 + 36_864
    assert (
        num_parameters(xue2021.widenet_b().model)
        == encoder + 590_592 + 150_528 + 1_536 + 590_592 + 769_000
    )


def test_every_named_model_is_tested() -> None:
    tested = {argument[0] for argument in test_parameters_are_the_papers.pytestmark[0].args[1]}
    assert tested == {make_config.__name__ for make_config in (*xue2021.VISION, *xue2021.TEXT)}


def test_initial_weights() -> None:
    """Variance 1 / fan-in, a router's a tenth of it; embeddings of deviation 0.02; biases, gains and classes zero."""
    models = [filled(config) for config, _ in CASES.values()]
    for name, p in (named for model in models for named in model.named_parameters()):
        bound, part = p.init_bound, name.split(".")[-1]
        if "router" in name:
            assert bound == pytest.approx((0.3 / DIM) ** 0.5)
        elif part in ("w1_eDF", "w2_eFD"):
            assert bound == (3 / p.shape[1]) ** 0.5
        elif name in ("words.weight", "kinds.weight", "positions.w_SD"):
            assert bound == pytest.approx(0.02 * 3**0.5)
        elif part == "weight" and name != "head.weight":
            assert bound == (3 / p.shape[1]) ** 0.5, name
        else:
            assert bound == 0 and (name == "head.weight" or part[:2] in ("bi", "b1", "b2", "ga")), (
                name
            )


def test_a_sharing_changes_the_parameters_that_it_names() -> None:
    tiny = CASES["vision"][0]
    names = parameters_of(tiny).keys()

    def more(**changes: Any) -> Counter[str]:
        """Names that come by, by the part of the encoder."""
        new = parameters_of(changed(tiny, **changes)).keys() - names
        return Counter(name.split(".")[1] for name in new)

    # one to three: 7 tensors of attention, 1 of the router and 4 of experts
    assert more(blocks_per_attention=1) == {"attention": 2 * 7}
    assert more(blocks_per_ffn=1) == {"ffn": 2 * 5}
    assert more(blocks_per_routing=None) == {}
    fewer = names - parameters_of(changed(tiny, blocks_per_norm=None)).keys()
    assert Counter(name.split(".")[1] for name in fewer) == {
        "norm_attention": 2 * 2,
        "norm_ffn": 2 * 2,
    }
    assert more(moe_blocks="none") == {"ffn": 4}, "one dense ffn"
    assert more(moe_blocks="1") == {"ffn": 4}, "one dense ffn beside the experts"
    # LayerNorms of two blocks, gain and bias, twice each
    assert num_parameters(tiny) - num_parameters(changed(tiny, blocks_per_norm=None)) == 2 * 4 * DIM
    assert names - parameters_of(changed(tiny, norm_first=False)).keys() == {
        "encoder.norm.gain_D",
        "encoder.norm.bias_D",
    }


def test_blocks_by_hand() -> None:
    assert build_blocks(GROUPED) == [
        Block(0, 0, "ffn0", False),
        Block(0, 0, "moe0", True),
        Block(1, 1, "moe0", False),
        Block(1, 1, "ffn1", False),
        Block(2, 2, "moe1", True),
    ]
    assert build_blocks(WIDENET) == [Block(0, i, "moe0", True) for i in range(3)]


@pytest.mark.parametrize("per_routing", [1, 2, 3, 6, None])
def test_a_group_of_blocks_asks_its_router_once(per_routing: int | None) -> None:
    depth = 6
    model = filled(changed(CASES["vision"][0], depth=depth, blocks_per_routing=per_routing))
    asked: list[int] = []
    gate = model.encoder.ffn["moe0"].gate
    gate.register_forward_pre_hook(lambda module, args: asked.append(args[1].layer_call))
    first = list(range(0, depth, per_routing or depth))
    _, stats = model(images(), image_context(0, NUM_SAMPLES))
    assert asked == [2 * i + 2 for i in first]
    assert list(stats) == [f"block{i}" for i in first]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_heads": 3}, "encoder.dim=8 is not a multiple of model.encoder.num_heads=3"),
        (
            {"moe_blocks": "0,3"},
            "encoder.moe_blocks='0,3': all, none, or numbers from 0 to 2 with commas",
        ),
        ({"moe_blocks": "some"}, "encoder.moe_blocks='some': all, none"),
        (
            {"blocks_per_ffn": 1, "blocks_per_routing": 2},
            "encoder.blocks_per_routing=2, but block 1 has experts of its",
        ),
        (
            {"moe": SoftmaxMoEConfig(num_experts=2, k=3)},
            "k=3 experts per token: must be 1 to num_experts=2",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as error:
        parameters_of(changed(CASES["vision"][0], **changes))
    assert says in str(error.value)


def test_images_and_texts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model\.image_size=225 is not a multiple of model\.patch_size=16"
    ):
        VisionTransformer(VisionConfig(image_size=225))
    with pytest.raises(ValueError, match=r"6 tokens in a sample: at most model\.max_tokens=5"):
        filled(CASES["text"][0])(
            *(torch.zeros(1, 6, dtype=torch.int64),) * 2, torch.tensor([0]), context(0, 1, Case())
        )


def test_padding_of_a_text_changes_nothing_else() -> None:
    model, (token_BS, kind_BS) = filled(CASES["text"][0]), words()
    valid_BS = torch.arange(TIMESTEPS) < torch.tensor(LENGTHS)[:, None]
    masked_N = places(0, NUM_SAMPLES)
    told = []
    for padding in (0, 7):
        padded_BS = torch.where(valid_BS, token_BS, padding)
        told.append(model(padded_BS, kind_BS, masked_N, context(0, NUM_SAMPLES, GROUPS)))
    (words_a, order_a, stats_a), (words_b, order_b, stats_b) = told
    some_B = torch.tensor(LENGTHS) > 0
    torch.testing.assert_close(words_a, words_b, atol=1e-12, rtol=0)
    torch.testing.assert_close(order_a[some_B], order_b[some_B], atol=1e-12, rtol=0)
    assert all(torch.equal(stats_a[block].load_E, stats_b[block].load_E) for block in stats_a)


def test_divergence_of_norms_by_hand() -> None:
    # 2 norms of 3 channels: y = 1/(3 x 2²) x 2 x (1² + 2² + 3²) = 28/12; of biases 1/12 x 2 x 0.5²; the ffn's are equal
    named = {
        "encoder.norm_attention.0.gain_D": torch.tensor([1.0, 0.0, -1.0]),
        "encoder.norm_attention.1.gain_D": torch.tensor([2.0, 2.0, 2.0]),
        "encoder.norm_attention.0.bias_D": torch.tensor([0.0, 0.5, 0.0]),
        "encoder.norm_attention.1.bias_D": torch.tensor([0.0, 0.0, 0.0]),
        "encoder.norm_ffn.0.gain_D": torch.tensor([0.1, 0.2, 0.3]),
        "encoder.norm_ffn.1.gain_D": torch.tensor([0.1, 0.2, 0.3]),
        "encoder.norm_ffn.0.bias_D": torch.tensor([7.0, 0.0, 0.0]),
    }
    expected = {
        "attention.gain": 28 / 12,
        "attention.bias": 0.5 / 12,
        "ffn.gain": 0.0,
        "ffn.bias": 0.0,
    }
    assert norm_divergence(named) == pytest.approx(expected)
    others = {"norm.gain_D": torch.ones(2), "encoder.norm_ffn.0.gain_D.exp_avg": torch.ones(3)}
    kept = {f"dense/{name}": p for name, p in named.items()}
    assert norm_divergence(kept | others) == norm_divergence(named), "a checkpoint's, among others"
    with pytest.raises(ValueError, match=r"no norm_attention\.0\.gain_D or its like among 2 names"):
        norm_divergence(others)


def test_divergence_of_norms_equals_loops() -> None:
    depth = 12
    named = dict(filled(changed(CASES["text"][0], depth=depth)).named_parameters())
    expected = {}
    for part in ("attention", "ffn"):
        for what in ("gain", "bias"):
            norms = [named[f"encoder.norm_{part}.{i}.{what}_D"].tolist() for i in range(depth)]
            squares = [(a[i] - b[i]) ** 2 for a in norms for b in norms for i in range(DIM)]
            expected[f"{part}.{what}"] = sum(squares) / (DIM * depth**2)
    assert norm_divergence(named) == pytest.approx(expected, rel=1e-12)
    assert all(y > 0 for y in expected.values())
    shared = dict(filled(changed(CASES["text"][0], blocks_per_norm=None)).named_parameters())
    assert not any(norm_divergence(shared).values()), "of one norm"


# what the ranks do


def image_context(first: int, last: int) -> TokenContext:
    """Every patch is valid, but sample 3 is padding."""
    ctx = context(first, last, GROUPS)
    return dataclasses.replace(ctx, valid_T=ctx.sample_T != ctx.first_sample + 3, layer_call=0)


def text_context(first: int, last: int) -> TokenContext:
    return dataclasses.replace(context(first, last, GROUPS), layer_call=0)


def images() -> torch.Tensor:
    return drawn(NUM_SAMPLES, 3, 4, 4, key="images")


def words() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their kinds (B, S)."""
    generator = prng.generator("test_widenet", "words")
    token_BS = torch.randint(VOCABULARY_SIZE, (NUM_SAMPLES, TIMESTEPS), generator=generator)
    return token_BS, torch.randint(2, (NUM_SAMPLES, TIMESTEPS), generator=generator)


def places(first: int, last: int) -> torch.Tensor:
    """Of the masked among the tokens of samples `first` to `last`."""
    return torch.tensor(
        [(b - first) * TIMESTEPS + s for b, s in MASKED if first <= b < last], dtype=torch.int64
    )


def weights(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """L = sum of these times logits, of the classes or masked words and of the order, + balance losses."""
    if name == "vision":
        return drawn(NUM_SAMPLES, 5, key="classes"), torch.empty(0)
    return drawn(len(MASKED), VOCABULARY_SIZE, key="masked"), drawn(NUM_SAMPLES, 2, key="order")


def ranks(layouts: list[Layout]) -> list[dict[str, Any]]:
    """This rank's values and gradients for each layout (all of one world): {case name: {quantity: tensor}}."""
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
    """A whole step that updates experts within backward, where a second gradient of one would be an error: how often
    ranks talk, bytes of gradients of experts, and the experts that changed."""
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


@torch.no_grad()
def fill_zeros(named: list[tuple[str, torch.nn.Parameter]], mine: slice = slice(None)) -> None:
    """Gives gains and biases, which start at zero, other values: of `mine` of all experts, where they are a stack."""
    for name, p in named:
        if not p.any():
            shape = (NUM_EXPERTS, *p.shape[1:]) if ".experts." in name else p.shape
            p.copy_(drawn(*shape, key=name)[mine])


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


# what they should have found


def filled(config: VisionConfig | TextConfig) -> Any:
    """The whole model on one rank, with the weights that `parallelize` and `on_mesh` give."""
    model = make(config).double()
    for name, bound in init_bounds(model).items():
        init_parameter(
            model.get_parameter(name),
            name,
            bound,
            SEED,
            range(NUM_EXPERTS) if ".experts." in name else None,
        )
    fill_zeros([*model.named_parameters()])
    return model


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
    """One start of processes serves all layouts of a world."""
    return run_distributed(
        ranks, world, [layout for layout in LAYOUTS if layout.world == world], timeout=240
    )


@pytest.fixture(
    scope="module", params=LAYOUTS, ids=lambda layout: f"world{layout.world}-ep{layout.ep}"
)
def ran(request: pytest.FixtureRequest) -> tuple[Layout, list[dict[str, Any]]]:
    """A layout and what its ranks returned."""
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


def test_shared_experts_exchange_at_every_depth_and_are_reduced_once(
    ran: tuple[Layout, list[dict[str, Any]]],
) -> None:
    """T blocks are T exchanges each way, each with the shared layer's name and its own layer call, also if blocks share
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
    if away:  # each use: counts, rows and weights there, rows back; and all but the counts again in backward
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


def test_cases_are_what_they_say() -> None:
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
