"""WideNet and its baselines on one rank: the paper's parameter counts, sharing, padding, divergence
of norms."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from encoder_cases import (
    DIM,
    GROUPED,
    GROUPS,
    VOCABULARY_SIZE,
    WIDENET,
    filled,
    image_context,
    images,
    make,
    places,
    words,
)
from uneven_batch import (
    LENGTHS,
    NUM_SAMPLES,
    TIMESTEPS,
    Case,
    context,
)

from moe_dist.config import papers
from moe_dist.config.papers import xue2021
from moe_dist.config.schema import (
    SoftmaxMoEConfig,
    TextConfig,
    VisionConfig,
)
from moe_dist.models.transformer import Block, build_blocks, norm_divergence
from moe_dist.models.vision_transformer import VisionTransformer

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
def test_parameters_equal_the_paper(name: str, parameters: int, millions: int) -> None:
    """The paper truncates or rounds to a million."""
    counted = num_parameters(papers.get(name).model)
    assert counted == parameters
    assert millions in (counted // 10**6, round(counted / 10**6))


def test_parameters_of_widenet_b_by_hand() -> None:
    # width 768: attention 4 x 768² + 3 x 768, for keys have no bias; of 4 experts each 2 x 768 x
    # 4096 + 4096 + 768, the router 4 x 768; 12 blocks x 2 norms x 2 x 768; patches 768 x 768 + 768,
    # places 196 x 768, last norm 2 x 768, representation 768 x 768 + 768, classes 768 x 1000 + 1000
    encoder = 2_361_600 + 4 * 6_296_320 + 3_072 + 36_864
    assert (
        num_parameters(xue2021.widenet_b().model)
        == encoder + 590_592 + 150_528 + 1_536 + 590_592 + 769_000
    )


def test_every_named_model_is_tested() -> None:
    tested = {argument[0] for argument in test_parameters_equal_the_paper.pytestmark[0].args[1]}
    assert tested == {make_config.__name__ for make_config in (*xue2021.VISION, *xue2021.TEXT)}


def test_initial_weights() -> None:
    """Variance 1 / fan-in, a router's a tenth of it; embeddings with deviation 0.02; biases,
    gains and classes zero."""
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


def test_sharing_changes_only_the_named_parameters() -> None:
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
def test_router_runs_once_per_group_of_blocks(per_routing: int | None) -> None:
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
            "encoder.moe_blocks='0,3': must be all, none, or numbers from 0 to 2 with commas",
        ),
        ({"moe_blocks": "some"}, "encoder.moe_blocks='some': must be all, none"),
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
def test_invalid_encoder_sizes_are_rejected(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as error:
        parameters_of(changed(CASES["vision"][0], **changes))
    assert says in str(error.value)


def test_invalid_image_and_text_sizes_are_rejected() -> None:
    with pytest.raises(
        ValueError, match=r"model\.image_size=225 is not a multiple of model\.patch_size=16"
    ):
        VisionTransformer(VisionConfig(image_size=225))
    with pytest.raises(ValueError, match=r"6 tokens in a sample; at most model\.max_tokens=5"):
        filled(CASES["text"][0])(
            *(torch.zeros(1, 6, dtype=torch.int64),) * 2, torch.tensor([0]), context(0, 1, Case())
        )


def test_text_padding_changes_nothing_else() -> None:
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
    # 2 norms of 3 channels: y = 1/(3 x 2²) x 2 x (1² + 2² + 3²) = 28/12; of biases 1/12 x 2 x 0.5²;
    # the ffn's are equal
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
    with pytest.raises(
        ValueError, match=r"2 names without a block's LayerNorm, such as norm_attention\.0\.gain_D"
    ):
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
