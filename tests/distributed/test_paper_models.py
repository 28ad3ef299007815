"""Every model of the papers trains and resumes, with smaller widths, vocabulary and number of
experts."""

import math
from pathlib import Path

import pytest
import torch
from runs import Run

from moe_dist.config import papers
from moe_dist.config.overrides import override
from moe_dist.config.papers import shazeer2017
from moe_dist.config.schema import Config, LSTMConfig
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.spawn import run_distributed


def divided(name: str, text: str) -> Config:
    """Divides a config: 32 of 512 units, an eighth of the experts and at most 64, 4 lanes."""
    config = papers.get(name)
    assert isinstance(config.model, LSTMConfig)
    model, moe = config.model, config.model.moe
    sets = [
        f"data.text={text}",
        "data.vocabulary_size=300",
        "batch.global_batch_size=4",
        "batch.balance_loss_group_size=none",
    ]
    sets += [f"model.dim={model.dim // 16}", f"model.ffn_hidden_dim={model.ffn_hidden_dim // 16}"]
    sets += [
        f"model.moe.expert_hidden_dim={moe.expert_hidden_dim // 16}",
        "batch.seq_len=5",
        "optim.lr=1e-3",
        "optim.warmup_steps=1",
    ]
    sets += [f"model.lstm_units={model.lstm_units // 16}"] if model.lstm_units else []
    sets += [f"model.moe.num_experts={max(4, min(64, moe.num_experts // 8))}"]
    sets += [f"model.moe.num_groups={min(8, moe.num_groups // 4)}"] if moe.num_groups else []
    return override(config, ["mesh.ep=2", *sets])


@pytest.mark.timeout(200)
def test_every_paper_model_trains_and_resumes(small_text: Path, tmp_path: Path) -> None:
    for told in run_distributed(train_all, 2, str(small_text), tmp_path, timeout=180):
        assert told.keys() == {make.__name__ for make in shazeer2017.CONFIGS}
        for name, (losses, same) in told.items():
            # the uniform distribution over 300 words has a loss of ln 300 = 5.70
            assert losses == pytest.approx([math.log(300)] * 3, abs=0.3), name
            assert len(set(losses)) == 3 and same, name


def train_all(text: str, folder: Path) -> dict[str, tuple[list[float], bool]]:
    """Returns losses of three steps, and whether a run from the checkpoint of the second
    equals them bit by bit."""
    meshes.init_process_group()
    told = {}
    for name in (make.__name__ for make in shazeer2017.CONFIGS):
        config = divided(name, text)
        whole = Run(config).steps(0, 2)
        whole.save(folder / name, 2)
        whole.steps(2, 3)
        again = Run(config)
        again.load(folder / name)
        again.steps(2, 3)
        expected, got = whole.weights(), again.weights()
        same = again.losses == whole.losses[2:] and all(
            torch.equal(expected[k], got[k]) for k in expected
        )
        told[name] = whole.losses, same
    meshes.shutdown()
    return told
