"""Outrageously Large Neural Networks (Shazeer et al. 2017): the language models of Appendix C.1.

Parameters are counted as Table 7 counts them, without embedding and softmax.

The paper trains with about 300,000 words a step over 16 GPUs, warms up over 1,000 steps and names no base learning
rate; 15,000 lanes of 20 words are its batch here, and 1e-3 is ours.
"""

import dataclasses

from moe_dist.config import BatchConfig, Config, DataConfig, ModelConfig, MoEConfig, OptimConfig


def lstm_moe_demo() -> Config:
    """A width-128 model with 64 experts, one pass over the embedded text: minutes on two CPU cores.

    `make train`, which is `torchrun --nproc-per-node 2 train.py lstm_moe_demo --set mesh.ep=2`.
    """
    return Config(
        name="lstm_moe_demo",
        steps=1000,
        eval_every=250,
        save_every=250,
        compare="experiments/results/lstm_moe_demo.json",
        model=ModelConfig(dim=128, dropout=0.1, moe=MoEConfig(num_experts=64, k=4, hidden=256)),
        batch=BatchConfig(samples=64, timesteps=32, samples_per_balance_group=32),
        optim=OptimConfig(lr=8e-3, warmup_steps=200),
    )


def lstm_wide_demo() -> Config:
    """The dense baseline of `lstm_moe_demo`: one always-on layer of 4 x 256 ReLU units, equal ops per timestep."""
    demo = lstm_moe_demo()
    model = dataclasses.replace(demo.model, middle="ffn", ffn_hidden=demo.model.moe.k * demo.model.moe.hidden)
    return dataclasses.replace(demo, name="lstm_wide_demo", model=model, compare=None)


def _billion_words(name: str, model: ModelConfig) -> Config:
    return Config(
        name=name,
        steps=27_000,
        data=DataConfig(text="lm1b.txt", vocabulary_size=793_471),
        model=model,
        batch=BatchConfig(samples=15_000, timesteps=20),
        optim=OptimConfig(lr=1e-3, warmup_steps=1000),
    )


def _moe(num_experts: int, num_groups: int | None = None, dropout: float = 0.1) -> ModelConfig:
    """Experts of 1,024 units: 4 of a flat layer per word, or 2 in each of 2 groups."""
    moe = MoEConfig(num_experts=num_experts, num_groups=num_groups, k=2 if num_groups else 4)
    return ModelConfig(dropout=dropout, moe=moe)


def moe_4() -> Config:
    """MoE-4 of Table 7: 4 experts, all for every word. 8.4M ops per timestep, 8.4M parameters."""
    return _billion_words("moe_4", _moe(4))


def moe_32() -> Config:
    """MoE-32 of Table 7: 32 experts of 1,024 units, 4 for every word. 8.4M ops per timestep, 37.8M parameters."""
    return _billion_words("moe_32", _moe(32))


def moe_256() -> Config:
    """MoE-256 of Table 7, flat. 8.6M ops per timestep, 272.9M parameters."""
    return _billion_words("moe_256", _moe(256))


def moe_256_h() -> Config:
    """MoE-256-h of Table 7: 16 groups of 16 experts. 8.4M ops per timestep, 272.9M parameters."""
    return _billion_words("moe_256_h", _moe(256, 16))


def moe_1024_h() -> Config:
    """MoE-1024-h of Table 7: 16 groups of 64 experts. 8.5M ops per timestep, 1,079M parameters."""
    return _billion_words("moe_1024_h", _moe(1024, 16, dropout=0.2))


def moe_4096_h() -> Config:
    """MoE-4096-h of Table 7: 16 groups of 256 experts. 8.9M ops per timestep, 4,303.4M parameters."""
    return _billion_words("moe_4096_h", _moe(4096, 16, dropout=0.2))


def moe_1_wide() -> Config:
    """MoE-1-Wide of Table 7: one expert of 4,096 units. 8.4M ops per timestep, 8.4M parameters."""
    return _billion_words("moe_1_wide", ModelConfig(middle="ffn", ffn_hidden=4096))


CONFIGS = (lstm_moe_demo, lstm_wide_demo, moe_4, moe_32, moe_256, moe_256_h, moe_1024_h, moe_4096_h, moe_1_wide)
