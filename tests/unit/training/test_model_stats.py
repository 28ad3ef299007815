"""Parameters, operations and memory of a model, by hand and from the papers."""

import dataclasses
import json

import pytest
import torch
from rank_memory import planned
from runs import tiny

from moe_dist.config import papers
from moe_dist.config.schema import Config
from moe_dist.models.lstm_lm import LSTMLanguageModel
from moe_dist.tasks.registry import TASKS
from moe_dist.training.model_stats import count_params_and_flops, param_kinds
from moe_dist.training.run_spec import parse_run


@pytest.mark.parametrize(
    ("name", "parameters", "ops"),
    [
        ("moe_4", 8.4e6, 8.4e6),
        ("moe_32", 37.8e6, 8.4e6),
        ("moe_256", 272.9e6, 8.6e6),
        ("moe_256_h", 272.9e6, 8.4e6),
        ("moe_1024_h", 1079.0e6, 8.5e6),
        ("moe_4096_h", 4303.4e6, 8.9e6),
        ("moe_34m", 4313.9e6, 33.8e6),
        ("moe_143m", 4371.1e6, 142.7e6),
        ("moe_1_wide", 8.4e6, 8.4e6),
        ("moe_1_deep", 8.4e6, 8.4e6),
        ("lstm_4x512", 8.4e6, 8.4e6),
        ("lstm_2048_512", 9.4e6, 9.4e6),
        ("moe_256_h_100b", 272.9e6, 8.4e6),  # from here Table 8
        ("moe_1024_h_100b", 1079.0e6, 8.5e6),
        ("moe_4096_h_100b", 4303.4e6, 8.6e6),
        ("moe_16384_h", 17201.0e6, 8.8e6),
        ("moe_65536_h", 68791.0e6, 9.2e6),
        ("moe_131072_h", 137577.6e6, 9.7e6),
    ],
)  # Table 7
def test_parameters_and_ops_equal_the_paper(name: str, parameters: float, ops: float) -> None:
    config = papers.get(name)
    count = count_params_and_flops(TASKS[config.task].build_model(config), config)
    assert count["parameters_without_embedding_and_softmax"] == pytest.approx(parameters, rel=0.01)
    assert count["ops_per_timestep"] == pytest.approx(ops, rel=0.01)


def test_demo_and_baseline_have_equal_ops_and_differ_only_in_the_middle() -> None:
    moe, wide = papers.get("lstm_moe_demo"), papers.get("lstm_wide_demo")
    assert moe.model.moe.k * moe.model.moe.expert_hidden_dim == wide.model.ffn_hidden_dim
    same = {"name": "", "baseline": None, "model": Config("").model}
    assert dataclasses.replace(moe, **same) == dataclasses.replace(wide, **same)  # type: ignore[arg-type]


def test_parameter_kinds_and_active_parameters_by_hand() -> None:
    config = tiny("model.moe.num_experts=8", "model.moe.num_groups=4", "model.softmax_samples=5")
    with torch.device("meta"):
        model = LSTMLanguageModel(config.model, 300)
    assert {name: kind for name, kind in param_kinds(model).items() if kind != "dense"} == {
        "embedding.weight": "rows",
        "softmax.w_VD": "rows",
        "softmax.b_V": "rows",
        "middle.experts.w_gate.w_gDb": "gates",
        "middle.experts.w_noise.w_gDb": "gates",
        "middle.experts.experts.w1_eDF": "experts",
        "middle.experts.experts.w2_eFD": "experts",
    }
    # width 16: an embedding of 16; 6 rows of the softmax with a bias, the target's and of 5 draws
    # the 4.7 that are distinct on average; two LSTMs of 8 x 16 x 16 + 8 x 16; primary gate 2 x 16 x
    # 4;
    # in 2 of 4 groups gates of 2 x 16 x 2, and 4 of 8 experts of 2 x 16 x 24
    active = 16 + 6 * 17 + 2 * (2048 + 128) + 128 + 2 * 64 + 4 * 768
    assert count_params_and_flops(model, config)["active_parameters_per_word"] == active


def test_layout_table_shows_nodes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = {
        "WORLD_SIZE": "8",
        "RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
        "GROUP_WORLD_SIZE": "2",
    }
    for key, value in launch.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit) as end:
        parse_run(["lstm_moe_demo", "--dry-run", "--set", "mesh.ep=4"], None)
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "8 on 2 nodes = 2 expert-data (edp) x 4 expert parallel (ep)" in said
    assert "64 in all, 16 per rank, 4 per word" in said


def test_dry_run_accepts_ranks_and_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    """Experts are spread over both nodes if set, otherwise over the ranks of each node."""
    for sets, ep, exchange, experts in (
        (
            ["--set", "mesh.ep=4", "--set", "mesh.dispatcher=dedup_node"],
            4,
            "dedup_node",
            [[0, 31], [32, 63]],
        ),
        ([], 2, "dedup_rank", [[0, 63]]),
    ):
        with pytest.raises(SystemExit) as end:
            parse_run(
                ["lstm_moe_demo", "--dry-run", "--json", "--ranks", "4", "--nodes", "2", *sets],
                None,
            )
        assert end.value.code == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["world"], told["nodes"], told["ep"], told["dispatcher"]) == (
            4,
            2,
            ep,
            exchange,
        )
        assert told["experts_by_node"] == experts


def test_replicas_share_state_and_fused_gradients_are_one_stack() -> None:
    # two matrices of 33 experts of 64 x 128 on both ranks, of which the first updates 17
    sets = ["mesh.ep=1", "model.moe.num_experts=33", "optim.max_grad_norm=none"]
    memory = planned("bf16", 1, *sets)[1]["memory_bytes"]
    assert memory["expert gradients"] == 2 * 33 * 64 * 128 * 4
    assert memory["expert optimizer"] == 2 * 17 * (64 + 128 + 64 * 128) * 4
    freed = planned("bf16", 1, *sets, "optim.fuse_expert_update_in_backward=true")[1][
        "memory_bytes"
    ]
    assert freed == memory | {"expert gradients": 33 * 64 * 128 * 4}
