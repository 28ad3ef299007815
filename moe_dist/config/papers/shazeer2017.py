"""Outrageously Large Neural Networks (Shazeer et al. 2017): the language models of Appendices C and D.

Parameters are counted as Table 7 counts them, without embedding and softmax.

The paper trains with about 300,000 words a step over 16 GPUs, warms up over 1,000 steps and names no base learning
rate; 15,000 lanes of 20 words are its batch here, and 1e-3 is ours.
"""

import dataclasses

from moe_dist.config.overrides import override
from moe_dist.config.schema import (
    BatchConfig,
    Config,
    LSTMConfig,
    MoEConfig,
    OptimConfig,
    TextDataConfig,
)


def lstm_moe_demo() -> Config:
    """A width-128 model with 64 experts, one pass over the bundled text: minutes on two CPU cores.

    `make train`, which is `torchrun --nproc-per-node 2 train.py lstm_moe_demo --set mesh.ep=2`.
    """
    return Config(
        name="lstm_moe_demo",
        steps=1000,
        eval_every=250,
        save_every=250,
        baseline="experiments/results/lstm_moe_demo.json",
        model=LSTMConfig(
            dim=128, dropout=0.1, moe=MoEConfig(num_experts=64, k=4, expert_hidden_dim=256)
        ),
        batch=BatchConfig(global_batch_size=64, seq_len=32, balance_loss_group_size=32),
        optim=OptimConfig(lr=8e-3, warmup_steps=200),
    )


def lstm_wide_demo() -> Config:
    """The dense baseline of `lstm_moe_demo`: one always-on layer of 4 x 256 ReLU units, equal ops per timestep."""
    wide = [
        "name=lstm_wide_demo",
        "model.middle_layer=ffn",
        "model.ffn_hidden_dim=1024",
        "baseline=none",
    ]
    return override(lstm_moe_demo(), wide)


def _billion_words(name: str, model: LSTMConfig) -> Config:
    """Appendix C.1 samples its softmax and does not say how much; 8,192 words a step are Jozefowicz et al.'s (2016)."""
    model = dataclasses.replace(model, softmax_samples=8192)
    return Config(
        name=name,
        steps=27_000,
        data=TextDataConfig(text="lm1b", streamed=True, vocabulary_size=793_471),
        model=model,
        batch=BatchConfig(global_batch_size=15_000, seq_len=20),
        optim=OptimConfig(lr=1e-3, warmup_steps=1000),
    )


def _moe(num_experts: int, num_groups: int | None = None, dropout: float = 0.1) -> LSTMConfig:
    """Experts of 1,024 units: 4 of a flat layer per word, or 2 in each of 2 groups."""
    moe = MoEConfig(num_experts=num_experts, num_groups=num_groups, k=2 if num_groups else 4)
    return LSTMConfig(dropout=dropout, moe=moe)


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
    return _billion_words("moe_1_wide", LSTMConfig(middle_layer="ffn", ffn_hidden_dim=4096))


def moe_1_deep() -> Config:
    """MoE-1-Deep of Table 7: one expert of four layers of 1,024 units. 8.4M ops per timestep, 8.4M parameters."""
    return _billion_words(
        "moe_1_deep", LSTMConfig(middle_layer="ffn", ffn_hidden_dim=1024, ffn_layers=4)
    )


def lstm_4x512() -> Config:
    """4xLSTM-512 of Table 7: two more LSTMs in place of the MoE. 8.4M ops per timestep, 8.4M parameters."""
    return _billion_words("lstm_4x512", LSTMConfig(middle_layer="lstm"))


def lstm_2048_512() -> Config:
    """LSTM-2048-512 of Table 7: one LSTM of 2,048 units projected to 512. 9.4M ops per timestep, 9.4M parameters."""
    return _billion_words("lstm_2048_512", LSTMConfig(middle_layer="none", lstm_units=2048))


def moe_34m() -> Config:
    """MoE-34M of Table 7 (Appendix C.2): width 1,024, 1,024 experts. 33.8M ops, 4,313.9M parameters."""
    moe = MoEConfig(num_experts=1024, num_groups=16, k=2, expert_hidden_dim=2048)
    return _billion_words("moe_34m", LSTMConfig(dim=1024, dropout=0.3, moe=moe))


def moe_143m() -> Config:
    """MoE-143M of Table 7 (Appendix C.2): LSTMs of 4,096 units, projected. 142.7M ops, 4,371.1M parameters."""
    moe = MoEConfig(num_experts=256, num_groups=16, k=2, expert_hidden_dim=8192)
    return _billion_words("moe_143m", LSTMConfig(dim=1024, lstm_units=4096, dropout=0.4, moe=moe))


def _hundred_billion_words(name: str, num_experts: int, num_groups: int) -> Config:
    """Appendix D: one pass over 100 billion words, about 2.5 million a step. It names no dropout; 0.1 is kept.

    Its news corpus is not public; this is as much text of the web.
    """
    base = _billion_words(name, _moe(num_experts, num_groups))
    more = [
        "steps=40000",
        "data.text=HuggingFaceFW/fineweb:sample-100BT",
        "batch.global_batch_size=125000",
    ]
    return override(base, more)


def moe_256_h_100b() -> Config:
    """MoE-256-h of Table 8: 32 groups of 8 experts. 8.4M ops per timestep, 272.9M parameters."""
    return _hundred_billion_words("moe_256_h_100b", 256, 32)


def moe_1024_h_100b() -> Config:
    """MoE-1024-h of Table 8: 32 groups of 32 experts. 8.5M ops per timestep, 1,079M parameters."""
    return _hundred_billion_words("moe_1024_h_100b", 1024, 32)


def moe_4096_h_100b() -> Config:
    """MoE-4096-h of Table 8: 64 groups of 64 experts. 8.6M ops per timestep, 4,303.4M parameters."""
    return _hundred_billion_words("moe_4096_h_100b", 4096, 64)


def moe_16384_h() -> Config:
    """MoE-16384-h of Table 8: 128 groups of 128 experts. 8.8M ops per timestep, 17,201M parameters."""
    return _hundred_billion_words("moe_16384_h", 16384, 128)


def moe_65536_h() -> Config:
    """MoE-65536-h of Table 8: 256 groups of 256 experts. 9.2M ops per timestep, 68,791M parameters."""
    return _hundred_billion_words("moe_65536_h", 65536, 256)


def moe_131072_h() -> Config:
    """MoE-131072-h of Table 8: 256 groups of 512 experts. 9.7M ops per timestep, 137,577.6M parameters."""
    return _hundred_billion_words("moe_131072_h", 131_072, 256)


CONFIGS = (
    lstm_moe_demo,
    lstm_wide_demo,
    moe_4,
    moe_32,
    moe_256,
    moe_256_h,
    moe_1024_h,
    moe_4096_h,
    moe_34m,
    moe_143m,
    moe_1_wide,
    moe_1_deep,
    lstm_4x512,
    lstm_2048_512,
    moe_256_h_100b,
    moe_1024_h_100b,
    moe_4096_h_100b,
    moe_16384_h,
    moe_65536_h,
    moe_131072_h,
)
