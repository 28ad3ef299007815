"""Go Wider Instead of Deeper (Xue et al. 2021): WideNet and its baselines, for images and for text.

Models alone, and so not in `configs.CONFIGS`: `train.py` has no task for them yet, and says that it knows no such name.
Parameters are those of docs/paper_map.md. All images are 224 x 224 in patches of 16, of 1,000 classes; all vocabularies
have 30,000 words.
"""

import dataclasses

from moe_dist.config import EncoderConfig, SoftmaxMoEConfig, TextConfig, VisionConfig


def _vit(depth: int, dim: int, num_heads: int, ffn_hidden: int, moe_blocks: str) -> VisionConfig:
    """Experts have 4,096 units, also in the model whose dense blocks have 3,072: only so are its parameters those of
    the paper."""
    encoder = EncoderConfig(
        depth=depth, dim=dim, num_heads=num_heads, ffn_hidden=ffn_hidden, moe_blocks=moe_blocks,
        blocks_per_attention=1, blocks_per_ffn=1, moe=SoftmaxMoEConfig(hidden=4096),
    )  # fmt: skip
    return VisionConfig(encoder=encoder)


def vit_b() -> VisionConfig:
    """ViT-B: 12 dense blocks of width 768. 87M parameters, 78.6 % on ImageNet-1K in the paper."""
    return _vit(12, 768, 12, 3072, "none")


def vit_l() -> VisionConfig:
    """ViT-L: 24 dense blocks of width 1,024. 305M parameters, 77.5 %."""
    return _vit(24, 1024, 16, 4096, "none")


def vit_moe_b() -> VisionConfig:
    """ViT-MoE-B: experts in the last two of every second block, as V-MoE. 128M parameters, 77.9 %."""
    return _vit(12, 768, 12, 3072, "9,11")


def vit_moe_l() -> VisionConfig:
    """ViT-MoE-L: experts in the last four of every second block, for with two it has 356M. 406M parameters, 77.4 %."""
    return _vit(24, 1024, 16, 4096, "17,19,21,23")


def widenet_b() -> VisionConfig:
    """WideNet-B: 12 blocks of width 768 with one attention and 4 experts. 29M parameters, 77.5 %."""
    return VisionConfig()


def widenet_l() -> VisionConfig:
    """WideNet-L: 24 blocks of width 1,024. 40M parameters, 79.5 %."""
    return VisionConfig(encoder=EncoderConfig(depth=24, dim=1024, num_heads=16))


def widenet_h() -> VisionConfig:
    """WideNet-H: 32 blocks of width 1,280, experts of 5,120 units. 63M parameters, 80.1 %."""
    moe = SoftmaxMoEConfig(hidden=5120)
    return VisionConfig(encoder=EncoderConfig(depth=32, dim=1280, num_heads=16, moe=moe))


def albert() -> TextConfig:
    """ALBERT: 12 uses of one dense block, LayerNorms shared too. 12M parameters."""
    return TextConfig(encoder=EncoderConfig(moe_blocks="none", blocks_per_norm=None, dropout=0.0))


def bert_factorised() -> TextConfig:
    """BERT with ALBERT's embedding: 12 blocks that share nothing. 89M parameters."""
    return TextConfig(encoder=EncoderConfig(moe_blocks="none", blocks_per_attention=1, blocks_per_ffn=1, dropout=0.0))


def widenet_text_4() -> TextConfig:
    """WideNet with 4 experts of 3,072 units. 26M parameters."""
    return TextConfig(encoder=EncoderConfig(dropout=0.0, moe=SoftmaxMoEConfig(hidden=3072)))


def widenet_text_8() -> TextConfig:
    """WideNet with 8 experts. 45M parameters."""
    return _with_experts(widenet_text_4(), 8)


def widenet_text_16() -> TextConfig:
    """WideNet with 16 experts. 83M parameters."""
    return _with_experts(widenet_text_4(), 16)


def _with_experts(config: TextConfig, num_experts: int) -> TextConfig:
    moe = dataclasses.replace(config.encoder.moe, num_experts=num_experts)
    return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, moe=moe))


VISION = (vit_b, vit_l, vit_moe_b, vit_moe_l, widenet_b, widenet_l, widenet_h)
TEXT = (albert, bert_factorised, widenet_text_4, widenet_text_8, widenet_text_16)
