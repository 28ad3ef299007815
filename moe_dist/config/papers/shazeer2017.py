"""Outrageously Large Neural Networks (Shazeer et al. 2017): language models in Appendices C and D.

A line "Paper" gives the paper's figures, not measurements of this code: parameters without
embedding and softmax, and multiply-adds per timestep ("ops"), as in Tables 7 and 8.
`tests/cli/test_config.py` compares them with the models.

The paper trains with about 300,000 words per step on 16 GPUs and warms up over 1,000 steps. It does
not give the batch in lanes or a base learning rate: this project chooses 15,000 lanes with 20 words
and 1e-3. 8 ranks in a command are an example.
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
    """A small MoE language model: width 128, 64 experts, bundled text; minutes on two CPU cores.

    Command: `make train`, or `torchrun --nproc-per-node 2 train.py lstm_moe_demo`.
    It is not in the paper. Its kept result is experiments/results/lstm_moe_demo.json.
    """
    return Config(
        name="lstm_moe_demo",
        steps=1000,
        eval_every=250,
        save_every=250,
        baseline="lstm_moe_demo",
        model=LSTMConfig(
            dim=128, dropout=0.1, moe=MoEConfig(num_experts=64, k=4, expert_hidden_dim=256)
        ),
        batch=BatchConfig(global_batch_size=64, seq_len=32, balance_loss_group_size=32),
        optim=OptimConfig(lr=8e-3, warmup_steps=200),
    )


def lstm_wide_demo() -> Config:
    """The dense baseline of `lstm_moe_demo`: one layer of 1,024 ReLU units, equal ops.

    Command: `torchrun --nproc-per-node 2 train.py lstm_wide_demo`.
    1,024 units are the 4 x 256 units per word in `lstm_moe_demo`.
    """
    changes = [
        "name=lstm_wide_demo",
        "model.middle_layer=ffn",
        "model.ffn_hidden_dim=1024",
        "baseline=none",
    ]
    return override(lstm_moe_demo(), changes)


def _billion_words(name: str, model: LSTMConfig) -> Config:
    """Returns a model from Appendix C.1 on the 1-billion-word benchmark, 10 passes.

    The paper samples the softmax but gives no number; 8,192 words per step are from Jozefowicz et
    al. (2016).
    """
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
    """Returns a model with 1,024 units per expert: 4 experts per word, or 2 in each of 2 groups."""
    moe = MoEConfig(num_experts=num_experts, num_groups=num_groups, k=2 if num_groups else 4)
    return LSTMConfig(dropout=dropout, moe=moe)


def moe_4() -> Config:
    """MoE-4: 4 experts with 1,024 units, all of them used for every word.

    Command: `torchrun --nproc-per-node 8 train.py moe_4`.
    Paper (Table 7): 8.4M parameters, 8.4M ops.
    """
    return _billion_words("moe_4", _moe(4))


def moe_32() -> Config:
    """MoE-32: 32 experts with 1,024 units, 4 per word.

    Command: `torchrun --nproc-per-node 8 train.py moe_32`.
    Paper (Table 7): 37.8M parameters, 8.4M ops.
    """
    return _billion_words("moe_32", _moe(32))


def moe_256() -> Config:
    """MoE-256: 256 experts with one flat gate.

    Command: `torchrun --nproc-per-node 8 train.py moe_256`.
    Paper (Table 7): 272.9M parameters, 8.6M ops.
    """
    return _billion_words("moe_256", _moe(256))


def moe_256_h() -> Config:
    """MoE-256-h: 16 groups with 16 experts.

    Command: `torchrun --nproc-per-node 8 train.py moe_256_h`.
    Paper (Table 7): 272.9M parameters, 8.4M ops.
    """
    return _billion_words("moe_256_h", _moe(256, 16))


def moe_1024_h() -> Config:
    """MoE-1024-h: 16 groups with 64 experts.

    Command: `torchrun --nproc-per-node 8 train.py moe_1024_h`.
    Paper (Table 7): 1,079M parameters, 8.5M ops.
    """
    return _billion_words("moe_1024_h", _moe(1024, 16, dropout=0.2))


def moe_4096_h() -> Config:
    """MoE-4096-h: 16 groups with 256 experts.

    Command: `torchrun --nproc-per-node 8 train.py moe_4096_h`.
    Paper (Table 7): 4,303.4M parameters, 8.9M ops.
    """
    return _billion_words("moe_4096_h", _moe(4096, 16, dropout=0.2))


def moe_1_wide() -> Config:
    """MoE-1-Wide: one dense layer of 4,096 units instead of experts.

    Command: `torchrun --nproc-per-node 8 train.py moe_1_wide`.
    Paper (Table 7): 8.4M parameters, 8.4M ops.
    """
    return _billion_words("moe_1_wide", LSTMConfig(middle_layer="ffn", ffn_hidden_dim=4096))


def moe_1_deep() -> Config:
    """MoE-1-Deep: four dense layers of 1,024 units instead of experts.

    Command: `torchrun --nproc-per-node 8 train.py moe_1_deep`.
    Paper (Table 7): 8.4M parameters, 8.4M ops.
    """
    return _billion_words(
        "moe_1_deep", LSTMConfig(middle_layer="ffn", ffn_hidden_dim=1024, ffn_layers=4)
    )


def lstm_4x512() -> Config:
    """4xLSTM-512: two more LSTMs instead of experts.

    Command: `torchrun --nproc-per-node 8 train.py lstm_4x512`.
    Paper (Table 7): 8.4M parameters, 8.4M ops.
    """
    return _billion_words("lstm_4x512", LSTMConfig(middle_layer="lstm"))


def lstm_2048_512() -> Config:
    """LSTM-2048-512: one LSTM of 2,048 units, projected to 512.

    Command: `torchrun --nproc-per-node 8 train.py lstm_2048_512`.
    Paper (Table 7): 9.4M parameters, 9.4M ops.
    """
    return _billion_words("lstm_2048_512", LSTMConfig(middle_layer="none", lstm_units=2048))


def moe_34m() -> Config:
    """MoE-34M: width 1,024, 1,024 experts with 2,048 units in 16 groups.

    Command: `torchrun --nproc-per-node 8 train.py moe_34m`.
    Paper (Table 7, Appendix C.2): 4,313.9M parameters, 33.8M ops.
    """
    moe = MoEConfig(num_experts=1024, num_groups=16, k=2, expert_hidden_dim=2048)
    return _billion_words("moe_34m", LSTMConfig(dim=1024, dropout=0.3, moe=moe))


def moe_143m() -> Config:
    """MoE-143M: LSTMs of 4,096 units, projected to 1,024; 256 experts with 8,192 units.

    Command: `torchrun --nproc-per-node 8 train.py moe_143m`.
    Paper (Table 7, Appendix C.2): 4,371.1M parameters, 142.7M ops.
    """
    moe = MoEConfig(num_experts=256, num_groups=16, k=2, expert_hidden_dim=8192)
    return _billion_words("moe_143m", LSTMConfig(dim=1024, lstm_units=4096, dropout=0.4, moe=moe))


def _hundred_billion_words(name: str, num_experts: int, num_groups: int) -> Config:
    """Returns a model from Appendix D: one pass over 100 billion words, 2.5 million per step.

    The paper's news corpus is not public. An equally long sample of web text replaces it. The paper
    gives no dropout; 0.1 is kept from Appendix C.1.
    """
    base = _billion_words(name, _moe(num_experts, num_groups))
    changes = [
        "steps=40000",
        "data.text=HuggingFaceFW/fineweb:sample-100BT",
        "batch.global_batch_size=125000",
    ]
    return override(base, changes)


def moe_256_h_100b() -> Config:
    """MoE-256-h: 32 groups with 8 experts, trained on 100 billion words.

    Command: `torchrun --nproc-per-node 8 train.py moe_256_h_100b`.
    Paper (Table 8): 272.9M parameters, 8.4M ops.
    """
    return _hundred_billion_words("moe_256_h_100b", 256, 32)


def moe_1024_h_100b() -> Config:
    """MoE-1024-h: 32 groups with 32 experts, trained on 100 billion words.

    Command: `torchrun --nproc-per-node 8 train.py moe_1024_h_100b`.
    Paper (Table 8): 1,079M parameters, 8.5M ops.
    """
    return _hundred_billion_words("moe_1024_h_100b", 1024, 32)


def moe_4096_h_100b() -> Config:
    """MoE-4096-h: 64 groups with 64 experts, trained on 100 billion words.

    Command: `torchrun --nproc-per-node 8 train.py moe_4096_h_100b`.
    Paper (Table 8): 4,303.4M parameters, 8.6M ops.
    """
    return _hundred_billion_words("moe_4096_h_100b", 4096, 64)


def moe_16384_h() -> Config:
    """MoE-16384-h: 128 groups with 128 experts, trained on 100 billion words.

    Command: `torchrun --nproc-per-node 8 train.py moe_16384_h`.
    Paper (Table 8): 17,201M parameters, 8.8M ops.
    """
    return _hundred_billion_words("moe_16384_h", 16384, 128)


def moe_65536_h() -> Config:
    """MoE-65536-h: 256 groups with 256 experts, trained on 100 billion words.

    Command: `torchrun --nproc-per-node 8 train.py moe_65536_h`.
    Paper (Table 8): 68,791M parameters, 9.2M ops.
    """
    return _hundred_billion_words("moe_65536_h", 65536, 256)


def moe_131072_h() -> Config:
    """MoE-131072-h: 256 groups with 512 experts, trained on 100 billion words.

    Command: `torchrun --nproc-per-node 8 train.py moe_131072_h`.
    Paper (Table 8): 137,577.6M parameters, 9.7M ops.
    """
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
