"""Dense models equal those of timm (ViT) and transformers (ALBERT) on the same weights: logits and
every gradient.

A peer computes with functions of our parameters, so that autograd brings its gradients back in our
names. What differs in how weights are kept is in those functions alone: our gains are offsets from
one, our patch projection is a matrix, our keys have no bias, and blocks that share something are
many blocks there.

Legend: B samples, S tokens of each, N classes or masked tokens, V vocabulary, Q colours, Y and X
    pixels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from moe_dist.config.papers import xue2021
from moe_dist.config.schema import EncoderConfig, TextConfig, VisionConfig
from moe_dist.data.images.torchvision_import import import_torchvision
from moe_dist.models.text_encoder import KINDS, PretrainingModel
from moe_dist.models.transformer import EPS, build_blocks
from moe_dist.models.vision_transformer import VisionTransformer
from moe_dist.nn import prng
from moe_dist.nn.token_context import TokenContext

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
Tensors = dict[str, torch.Tensor]


# the peers, and their weights as functions of ours


def timm_vit(config: VisionConfig) -> nn.Module:
    """Returns timm's model without class token and with explicit attention; the tanh layer,
    which timm does not have, is before its head."""
    import_torchvision()
    from timm.models.vision_transformer import VisionTransformer as Timm

    e = config.encoder
    model = Timm(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.channels,
        class_token=False,
        num_classes=config.num_classes,
        global_pool="avg",
        fc_norm=False,
        embed_dim=e.dim,
        depth=e.depth,
        num_heads=e.num_heads,
        mlp_ratio=e.ffn_hidden_dim / e.dim,
    )
    model.head = nn.Sequential(nn.Linear(e.dim, e.dim), nn.Tanh(), model.head)
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def as_timm(config: VisionConfig, ours: Tensors) -> Tensors:
    kernel = (config.encoder.dim, config.channels, config.patch_size, config.patch_size)
    theirs = {
        "patch_embed.proj.weight": ours["patches.weight"].view(kernel),
        "patch_embed.proj.bias": ours["patches.bias"],
        "pos_embed": ours["positions.w_SD"][None],
        **norm("norm", ours, "encoder.norm"),
        **linear("head.0", ours, "representation"),
        **linear("head.2", ours, "head"),
    }
    for i, block in enumerate(build_blocks(config.encoder)):
        attention, ffn = f"encoder.attention.{block.attention}", f"encoder.ffn.{block.ffn}"
        query, key, value = (
            with_bias(ours, f"{attention}.{part}") for part in ("query", "key", "value")
        )
        theirs |= {
            f"blocks.{i}.attn.qkv.weight": torch.cat([query[0], key[0], value[0]]),
            f"blocks.{i}.attn.qkv.bias": torch.cat([query[1], key[1], value[1]]),
            **linear(f"blocks.{i}.attn.proj", ours, f"{attention}.out"),
            **linear(f"blocks.{i}.mlp.fc1", ours, f"{ffn}.0"),
            **linear(f"blocks.{i}.mlp.fc2", ours, f"{ffn}.2"),
            **norm(f"blocks.{i}.norm1", ours, f"encoder.norm_attention.{block.norm}"),
            **norm(f"blocks.{i}.norm2", ours, f"encoder.norm_ffn.{block.norm}"),
        }
    return theirs


def transformers_albert(config: TextConfig) -> nn.Module:
    """Returns the peer with our epsilon, exact GELU and explicit attention; a group there is
    our blocks that share everything."""
    from transformers import AlbertConfig, AlbertForPreTraining

    e = config.encoder
    return AlbertForPreTraining(
        AlbertConfig(
            vocab_size=config.vocabulary_size,
            embedding_size=config.embedding_dim,
            hidden_size=e.dim,
            num_hidden_layers=e.depth,
            num_hidden_groups=groups_of(e),
            num_attention_heads=e.num_heads,
            intermediate_size=e.ffn_hidden_dim,
            max_position_embeddings=config.max_tokens,
            hidden_act="gelu",
            type_vocab_size=KINDS,
            layer_norm_eps=EPS,
            hidden_dropout_prob=0.0,
            pad_token_id=None,
            attention_probs_dropout_prob=0.0,
            classifier_dropout_prob=0.0,
            attn_implementation="eager",
        )
    )


def groups_of(encoder: EncoderConfig) -> int:
    return len({block.attention for block in build_blocks(encoder)})


def as_transformers(config: TextConfig, ours: Tensors) -> Tensors:
    theirs = {
        "albert.embeddings.word_embeddings.weight": ours["words.weight"],
        "albert.embeddings.token_type_embeddings.weight": ours["kinds.weight"],
        "albert.embeddings.position_embeddings.weight": ours["positions.w_SD"],
        "predictions.bias": ours["masked.bias_V"],
        **norm("albert.embeddings.LayerNorm", ours, "norm"),
        **linear("albert.encoder.embedding_hidden_mapping_in", ours, "widen"),
        **linear("albert.pooler", ours, "pooler"),
        **linear("predictions.dense", ours, "masked.narrow"),
        **norm("predictions.LayerNorm", ours, "masked.norm"),
        **linear("sop_classifier.classifier", ours, "order"),
    }
    for i in range(groups_of(config.encoder)):
        group = f"albert.encoder.albert_layer_groups.{i}.albert_layers.0"
        theirs |= {
            **linear(f"{group}.attention.query", ours, f"encoder.attention.{i}.query"),
            **linear(f"{group}.attention.key", ours, f"encoder.attention.{i}.key"),
            **linear(f"{group}.attention.value", ours, f"encoder.attention.{i}.value"),
            **linear(f"{group}.attention.dense", ours, f"encoder.attention.{i}.out"),
            **linear(f"{group}.ffn", ours, f"encoder.ffn.ffn{i}.0"),
            **linear(f"{group}.ffn_output", ours, f"encoder.ffn.ffn{i}.2"),
            **norm(f"{group}.attention.LayerNorm", ours, f"encoder.norm_attention.{i}"),
            **norm(f"{group}.full_layer_layer_norm", ours, f"encoder.norm_ffn.{i}"),
        }
    return theirs


def linear(theirs: str, ours: Tensors, name: str) -> Tensors:
    weight, bias = with_bias(ours, name)
    return {f"{theirs}.weight": weight, f"{theirs}.bias": bias}


def with_bias(ours: Tensors, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A key's bias is 1: any value works, because it adds the same to all scores of a token."""
    weight = ours[f"{name}.weight"]
    return weight, weight.new_ones(weight.shape[0]) if name.endswith(".key") else ours[
        f"{name}.bias"
    ]


def norm(theirs: str, ours: Tensors, name: str) -> Tensors:
    return {
        f"{theirs}.weight": 1 + ours[f"{name}.gain_D"],
        f"{theirs}.bias": ours[f"{name}.bias_D"],
    }


# on the same weights

DENSE = EncoderConfig(
    depth=4, dim=16, num_heads=4, ffn_hidden_dim=24, moe_blocks="none", dropout=0.0
)
UNSHARED = dataclasses.replace(DENSE, blocks_per_attention=1, blocks_per_ffn=1)
VISION = VisionConfig(image_size=12, channels=3, patch_size=4, num_classes=7)
VITS = {
    "vit": dataclasses.replace(VISION, encoder=UNSHARED),
    "widenet_without_experts": dataclasses.replace(VISION, encoder=DENSE),
}
TEXT = TextConfig(vocabulary_size=13, embedding_dim=6, max_tokens=9)
ALBERTS = {
    name: dataclasses.replace(
        TEXT,
        encoder=dataclasses.replace(
            DENSE,
            norm_first=False,
            blocks_per_attention=size,
            blocks_per_ffn=size,
            blocks_per_norm=size,
        ),
    )
    for name, size in {"albert": None, "albert_of_two_groups": 2, "bert_factorised": 1}.items()
}
LENGTHS, TOKENS = (8, 3, 1, 0, 6), 8  # of samples, padded to 8 tokens of at most 9
MASKED = [(0, 0), (0, 5), (0, 7), (1, 1), (1, 2), (2, 0), (4, 3)]  # samples and places


def drawn(*shape: int, key: str) -> torch.Tensor:
    """N(0, 1), float64."""
    return torch.empty(*shape, dtype=torch.float64).normal_(
        generator=prng.generator("test_peers", key)
    )


@torch.no_grad()
def filled(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Draws all parameters, also those that start at zero: matrices by their fan-in. Larger
    gains and biases make tokens alike, and gradients of queries so small that float32 has only
    four digits."""
    for name, p in model.named_parameters():
        p.copy_(drawn(*p.shape, key=name) * (p.shape[1] ** -0.5 if p.dim() == 2 else 0.1))
    return model.to(dtype)


def context(valid_BS: torch.Tensor) -> TokenContext:
    num_samples, tokens = valid_BS.shape
    return TokenContext(
        sample_T=torch.arange(num_samples).repeat_interleave(tokens),
        position_T=torch.arange(tokens).repeat(num_samples),
        valid_T=valid_BS.flatten(),
        seed=0,
        step=0,
        train=True,
        first_sample=0,
        num_samples=num_samples,
        balance_loss_group_size=num_samples,
        capacity_group_size=num_samples,
    )


def assert_same(model: nn.Module, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Compares outputs, and the gradients of their randomly weighted sum, to the tolerance of
    the dtype: absolutely, and relative to the largest value of the tensor."""
    names = dict(model.named_parameters())
    weights = [drawn(*y.shape, key=f"weight{i}").to(y) for i, y in enumerate(ours)]
    gradients = []
    for outputs in (ours, theirs):
        loss = torch.stack(
            [(weight * y).mean() for weight, y in zip(weights, outputs, strict=True)]
        ).sum()
        gradients.append(torch.autograd.grad(loss, list(names.values())))
    mine = {f"output {i}": y for i, y in enumerate(ours)} | dict(
        zip(names, gradients[0], strict=True)
    )
    peers = {f"output {i}": y for i, y in enumerate(theirs)} | dict(
        zip(names, gradients[1], strict=True)
    )
    for name, expected in peers.items():
        largest, error = expected.abs().max().item(), (mine[name] - expected).abs().max().item()
        assert largest > 0, f"{name}: nothing to compare"
        assert error <= TOLERANCE[expected.dtype] * min(largest, 1), f"{name}: {error} of {largest}"


def computed(peer: nn.Module, parameters: Tensors, *args: Any, **kwargs: Any) -> Any:
    """Returns the peer's result with `parameters`, which are all that it has."""
    assert {name: p.shape for name, p in parameters.items()} == shapes(peer)
    return functional_call(
        peer.to(next(iter(parameters.values())).dtype).eval(), parameters, args, kwargs
    )


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", VITS)
def test_vit_equals_timm(name: str, dtype: torch.dtype) -> None:
    config = VITS[name]
    image_BQYX = drawn(5, 3, 12, 12, key="images").to(dtype)
    model = filled(VisionTransformer(config), dtype)
    ours_BN, _ = model(image_BQYX, context(torch.ones(5, 9, dtype=torch.bool)))
    theirs_BN = computed(
        timm_vit(config), as_timm(config, dict(model.named_parameters())), image_BQYX
    )
    assert_same(model, [ours_BN], [theirs_BN])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ALBERTS)
def test_albert_equals_transformers(name: str, dtype: torch.dtype) -> None:
    config = ALBERTS[name]
    generator = prng.generator("test_peers", "tokens")
    token_BS = torch.randint(config.vocabulary_size, (len(LENGTHS), TOKENS), generator=generator)
    kind_BS = torch.randint(KINDS, token_BS.shape, generator=generator)
    valid_BS = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]
    some_B = valid_BS.any(1)
    masked_N = torch.tensor([b * TOKENS + s for b, s in MASKED])
    model = filled(PretrainingModel(config), dtype)
    ours_NV, ours_B2, _ = model(token_BS, kind_BS, masked_N, context(valid_BS))
    theirs = computed(
        transformers_albert(config),
        as_transformers(config, dict(model.named_parameters())),
        input_ids=token_BS,
        token_type_ids=kind_BS,
        attention_mask=valid_BS.long(),
    )
    theirs_NV = theirs.prediction_logits.flatten(0, 1)[masked_N]
    assert_same(model, [ours_NV, ours_B2[some_B]], [theirs_NV, theirs.sop_logits[some_B]])


@pytest.mark.parametrize(
    ("config", "make", "make_peer", "as_theirs"),
    [
        (xue2021.vit_b().model, VisionTransformer, timm_vit, as_timm),
        (xue2021.vit_l().model, VisionTransformer, timm_vit, as_timm),
        (xue2021.albert().model, PretrainingModel, transformers_albert, as_transformers),
        (xue2021.bert_factorised().model, PretrainingModel, transformers_albert, as_transformers),
    ],
    ids=["vit_b", "vit_l", "albert", "bert_factorised"],
)
def test_paper_models_have_the_parameters_of_their_peers(
    config: Any,
    make: Callable[..., nn.Module],
    make_peer: Callable[..., nn.Module],
    as_theirs: Callable[..., Tensors],
) -> None:
    """Compares names and shapes at full size."""
    with torch.device("meta"):
        theirs = as_theirs(config, dict(make(config).named_parameters()))
        assert {name: p.shape for name, p in theirs.items()} == shapes(make_peer(config))


def test_albert_has_the_published_parameters() -> None:
    # 30,000 words, 512 places and 2 kinds of width 128, LayerNorm 2 x 128, widened by 768 x 128 +
    # 768; of the block attention 4 x (768² + 768), ffn 2 x 768 x 3072 + 3072 + 768, LayerNorms 4 x
    # 768; pooler 768² +
    # 768
    embedding, block, pooler = 30_514 * 128 + 256 + 99_072, 2_362_368 + 4_722_432 + 3_072, 590_592
    assert embedding + block + pooler == 11_683_584, "of albert-base-v2 without heads"
    with torch.device("meta"):
        model = PretrainingModel(xue2021.albert().model)
    counted = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.split(".")[0] not in ("masked", "order")
    )
    assert counted == embedding + block + pooler - 768, "keys have no bias"
