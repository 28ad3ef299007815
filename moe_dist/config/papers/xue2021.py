"""Go Wider Instead of Deeper (Xue et al. 2021): WideNet and its baselines, for images and text.

A line "Paper" gives the paper's figures, not measurements of this code. docs/paper_map.md compares
its parameter counts with the models.

The paper trains on ImageNet-1K for 300 epochs with 4,096 images per step and LAMB; like its code,
these configs clip the gradient norm at 1 (`optim.max_grad_norm`). They differ from its code as
follows:

- Learning rate: it rises from 0 and falls as half a cosine wave to 0; the code's rises from 1e-5
  and falls linearly to 1e-5.
- LAMB: vectors have neither weight decay nor a trust ratio; the code decays and scales them too.
- Capacity: it is counted per 16 samples; the paper's is counted per device batch.

Images have 224 x 224 pixels in patches of 16, and vocabularies have 30,000 tokens. 8 ranks in a
command are an example.
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
    """A small WideNet for images: 6 blocks of width 96, 4 experts; minutes on two CPU cores.

    Command: `torchrun --nproc-per-node 2 train.py widenet_demo`.
    It trains on 6,000 Fashion-MNIST images; each token uses 2 experts with 192 units. It is not in
    the paper. Its kept result is experiments/results/widenet_demo.json.
    """
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
        baseline="widenet_demo",
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
    """The dense baseline of `widenet_demo`: one FFN of 2 x 192 units for all blocks, equal ops.

    Command: `torchrun --nproc-per-node 2 train.py shared_vit_demo`.
    """
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
    """Returns LAMB with full moments for experts too, and a cosine schedule (see the module)."""
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
    """Returns a run on ImageNet-1K: 300 epochs of 1,281,167 images, 30 of them warm-up.

    The augmentation is the same as in the authors' code.
    """
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
    """Returns a vision transformer that shares nothing between blocks.

    Experts have 4,096 units even if dense blocks have 3,072: only then the parameter count agrees
    with the paper.
    """
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
    """ViT-B: 12 dense blocks of width 768.

    Command: `torchrun --nproc-per-node 8 train.py vit_b`.
    Paper (ImageNet-1K): 87M parameters, 78.6 % accuracy.
    """
    return _vit("vit_b", 12, 768, 12, 3072, "none")


def vit_l() -> Config:
    """ViT-L: 24 dense blocks of width 1,024.

    Command: `torchrun --nproc-per-node 8 train.py vit_l`.
    Paper (ImageNet-1K): 305M parameters, 77.5 % accuracy.
    """
    return _vit("vit_l", 24, 1024, 16, 4096, "none")


def vit_moe_b() -> Config:
    """ViT-MoE-B: ViT-B with experts in blocks 9 and 11, as in V-MoE.

    Command: `torchrun --nproc-per-node 8 train.py vit_moe_b`.
    Paper (ImageNet-1K): 128M parameters, 77.9 % accuracy.
    """
    return _vit("vit_moe_b", 12, 768, 12, 3072, "9,11")


def vit_moe_l() -> Config:
    """ViT-MoE-L: ViT-L with experts in blocks 17, 19, 21 and 23.

    The paper does not name the blocks; with experts in two of them there are only 356M parameters.

    Command: `torchrun --nproc-per-node 8 train.py vit_moe_l`.
    Paper (ImageNet-1K): 406M parameters, 77.4 % accuracy.
    """
    return _vit("vit_moe_l", 24, 1024, 16, 4096, "17,19,21,23")


def widenet_b() -> Config:
    """WideNet-B: 12 blocks of width 768 that share one attention and 4 experts.

    Command: `torchrun --nproc-per-node 8 train.py widenet_b`.
    Paper (ImageNet-1K): 29M parameters, 77.5 % accuracy.
    """
    return _imagenet("widenet_b", EncoderConfig())


def widenet_l() -> Config:
    """WideNet-L: 24 blocks of width 1,024 that share one attention and 4 experts.

    Command: `torchrun --nproc-per-node 8 train.py widenet_l`.
    Paper (ImageNet-1K): 40M parameters, 79.5 % accuracy.
    """
    return _imagenet("widenet_l", EncoderConfig(depth=24, dim=1024, num_heads=16), lr=0.004)


def widenet_h() -> Config:
    """WideNet-H: 32 blocks of width 1,280 that share 4 experts with 5,120 units.

    Command: `torchrun --nproc-per-node 8 train.py widenet_h`.
    Paper (ImageNet-1K): 63M parameters, 80.1 % accuracy.
    """
    moe = SoftmaxMoEConfig(expert_hidden_dim=5120)
    return _imagenet(
        "widenet_h", EncoderConfig(depth=32, dim=1280, num_heads=16, moe=moe), lr=0.004
    )


def widenet_text_demo() -> Config:
    """A small WideNet for sentences: 4 blocks of width 96, 4 experts; minutes on two CPU cores.

    Command: `torchrun --nproc-per-node 2 train.py widenet_text_demo`.
    It classifies the bundled movie reviews as positive or negative; each token uses 2 experts with
    192 units. It is not in the paper. Its kept result is
    experiments/results/widenet_text_demo.json.
    """
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
        baseline="widenet_text_demo",
        data=SentenceDataConfig(),
        model=TextConfig(vocabulary_size=6000, embedding_dim=64, max_tokens=64, encoder=encoder),
        batch=BatchConfig(global_batch_size=64, balance_loss_group_size=32, capacity_group_size=16),
        optim=OptimConfig(
            lr=1e-3, warmup_steps=60, schedule="cosine", weight_decay=0.1, expert_optimizer="adam"
        ),
    )


def albert_demo() -> Config:
    """The dense baseline of `widenet_text_demo`: one block for all depths, equal ops.

    Command: `torchrun --nproc-per-node 2 train.py albert_demo`.
    All blocks share their LayerNorms too.
    """
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
    """Pre-training of `widenet_text_demo` with masked words and sentence order, on bundled text.

    Command: `torchrun --nproc-per-node 2 train.py widenet_pretraining_demo`.
    `widenet_text_demo` starts from its weights with `--set init_from=RUN`.
    """
    demo = widenet_text_demo()
    return dataclasses.replace(
        demo,
        name="widenet_pretraining_demo",
        task="pretraining",
        data=PretrainingDataConfig(),
        baseline=None,
    )


def _pretraining(name: str, encoder: EncoderConfig) -> Config:
    """Returns pre-training with masked words and sentence order, on Wikipedia.

    Wikipedia replaces ALBERT's Wikipedia and books, which are not available. As in ALBERT, there
    are 125,000 steps with 4,096 samples, with LAMB and the same learning rate.
    """
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
    """ALBERT: one dense block used 12 times, with shared LayerNorms.

    Command: `torchrun --nproc-per-node 8 train.py albert`.
    Paper (text models): 12M parameters.
    """
    encoder = EncoderConfig(norm_first=False, moe_blocks="none", blocks_per_norm=None, dropout=0.0)
    return _pretraining("albert", encoder)


def bert_factorised() -> Config:
    """BERT with ALBERT's factorized embedding: 12 blocks that share nothing.

    Command: `torchrun --nproc-per-node 8 train.py bert_factorised`.
    Paper (text models): 89M parameters.
    """
    encoder = EncoderConfig(
        norm_first=False, moe_blocks="none", blocks_per_attention=1, blocks_per_ffn=1, dropout=0.0
    )
    return _pretraining("bert_factorised", encoder)


def _widenet_text(name: str, num_experts: int) -> Config:
    """Returns pre-training of a WideNet with 12 blocks and experts with 3,072 units."""
    moe = SoftmaxMoEConfig(num_experts=num_experts, expert_hidden_dim=3072)
    return _pretraining(name, EncoderConfig(dropout=0.0, moe=moe))


def widenet_text_4() -> Config:
    """WideNet for text, with 4 experts with 3,072 units.

    Command: `torchrun --nproc-per-node 8 train.py widenet_text_4`.
    Paper (text models): 26M parameters.
    """
    return _widenet_text("widenet_text_4", 4)


def widenet_text_8() -> Config:
    """WideNet for text, with 8 experts with 3,072 units.

    Command: `torchrun --nproc-per-node 8 train.py widenet_text_8`.
    Paper (text models): 45M parameters.
    """
    return _widenet_text("widenet_text_8", 8)


def widenet_text_16() -> Config:
    """WideNet for text, with 16 experts with 3,072 units.

    Command: `torchrun --nproc-per-node 8 train.py widenet_text_16`.
    Paper (text models): 83M parameters.
    """
    return _widenet_text("widenet_text_16", 16)


def _fine_tuned(
    name: str, data: SentenceDataConfig | QuestionDataConfig, steps: int, lr: float
) -> Config:
    """Returns fine-tuning of `widenet_text_4` with the paper's settings.

    Other encoders are set with `--set`. If every question has an answer (SQuAD 1.1), the paper uses
    a larger capacity, dropout, and no balance loss.
    """
    is_question = isinstance(data, QuestionDataConfig)
    always_answered = isinstance(data, QuestionDataConfig) and data.no_answer_threshold is None
    moe = SoftmaxMoEConfig(
        expert_hidden_dim=3072,
        capacity_factor=2.0 if always_answered else 1.2,
        balance_loss_weight=0.0 if always_answered else 0.01,
    )
    encoder = EncoderConfig(dropout=0.1 if always_answered else 0.0, moe=moe)
    return Config(
        name=name,
        task="question_answering" if is_question else "text_classification",
        steps=steps,
        data=data,
        model=TextConfig(encoder=encoder),
        batch=BatchConfig(global_batch_size=48 if is_question else 128, capacity_group_size=4),
        optim=OptimConfig(
            lr=lr, warmup_steps=steps // 10, schedule="cosine", expert_optimizer="adam"
        ),
    )


def widenet_squad() -> Config:
    """SQuAD 1.1: 3,649 steps with 48 questions each.

    Command: `torchrun --nproc-per-node 8 train.py widenet_squad --set init_from=RUN`;
    RUN is the folder of a run of `widenet_text_4`.
    Paper: F1 89.6.
    """
    return _fine_tuned("widenet_squad", QuestionDataConfig(), 3649, 5e-5)


def widenet_squad_v2() -> Config:
    """SQuAD 2.0: 8,144 steps with 48 questions each.

    Command: `torchrun --nproc-per-node 8 train.py widenet_squad_v2 --set init_from=RUN`;
    RUN is the folder of a run of `widenet_text_4`.
    Paper: F1 80.6.
    """
    return _fine_tuned(
        "widenet_squad_v2", QuestionDataConfig("squad_v2", no_answer_threshold=0.0), 8144, 3e-5
    )


def widenet_mnli() -> Config:
    """MNLI: 10,000 steps with 128 sentence pairs each.

    Command: `torchrun --nproc-per-node 8 train.py widenet_mnli --set init_from=RUN`;
    RUN is the folder of a run of `widenet_text_4`.
    Paper: 82.6 % accuracy.
    """
    return override(
        _fine_tuned("widenet_mnli", SentenceDataConfig("glue:mnli"), 10_000, 3e-5),
        ["model.num_classes=3"],
    )


def widenet_sst2() -> Config:
    """SST-2: 5,234 steps with 128 sentences each.

    Command: `torchrun --nproc-per-node 8 train.py widenet_sst2 --set init_from=RUN`;
    RUN is the folder of a run of `widenet_text_4`.
    Paper: 91.1 % accuracy.
    """
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
