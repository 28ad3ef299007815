"""The command line of train.py, and the files that a run writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from processes import check_plan, train_forked
from runs import TINY, tiny
from wandb_file import wandb_log

from moe_dist.checkpoint import format as checkpoint_format
from moe_dist.checkpoint import manifest
from moe_dist.config import papers
from moe_dist.config.overrides import from_json
from moe_dist.training.run_spec import parse_run


def train(*args: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


def test_closed_stdout_is_no_error() -> None:
    """`| head -c 1` closes stdout; later output is dropped and the run continues."""
    command = f"{sys.executable} -c 'from moe_dist.monitoring.console import print_on_main as say; say(str(0) * 100_000); say(str(1) * 100_000)'"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -c 1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0", "")


def test_list_and_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*args: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            parse_run(list(args), None)
        assert exit_.value.code in (None, 0)
        return capsys.readouterr().out

    listed = printed("--list")
    assert all(name in listed for name in papers.CONFIGS)
    said = json.loads(
        printed("moe_256_h", "--dry-run", "--json", "--set", "batch.global_batch_size=64")
    )
    assert (said["world"], said["global_batch_size"]) == (1, 64)
    # experts 256 x 2 x 512 x 1024, LSTMs 2 x (8 x 512 x 512 + 8 x 512), primary gate 2 x 512 x 16,
    # others 16 times that
    parameters = 268_435_456 + 4_202_496 + 16_384 + 262_144
    assert said["parameters_without_embedding_and_softmax"] == parameters
    assert "32 in all, 32 per rank, 4 per word" in printed("moe_32", "--dry-run")


@pytest.mark.timeout(200)
def test_run_writes_all_its_files_and_can_be_evaluated(
    small_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [f"data.text={small_text}", "eval_every=10", "write_report=true", "wandb.mode=offline"]
    sets = [part for s in [*TINY, *more] for part in ("--set", s)]
    run = tmp_path / "run"
    done = train("lstm_moe_demo", "--folder", str(run), *sets, timeout=100)
    assert done.returncode == 0, done.stderr
    assert f"run folder: {run}" in done.stdout and "unigram model" in done.stdout
    assert from_json((run / "config.json").read_text()) == tiny(*more)
    assert json.loads((run / "layout.json").read_text())["world"] == 1
    assert "<h1>run</h1>" in (run / "report.html").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # at most (importance_loss_weight + load_loss_weight) x CV² of one expert for all, which is
    # num_experts - 1
    assert lines[0]["throughput/tflops_per_device"] > 0
    assert 0 < lines[0]["train/balance_loss"] < 0.2 * 7
    assert lines[0]["moe/middle/dead_experts"] == lines[0]["moe/middle/tokens_per_expert"].count(0)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert (
        len(lines[0]["moe/middle/tokens_per_expert"]) == 8
        and sum(lines[0]["moe/middle/tokens_per_expert"]) == 8 * 6 * 2
    )  # samples x words x k
    run_id, config, history = wandb_log(run)
    assert run_id == checkpoint_format.read_state(manifest.require_checkpoints(run)[-1])["wandb_id"]
    assert {key: config[key] for key in ("model", "optim", "batch")} == {
        key: json.loads((run / "config.json").read_text())[key]
        for key in ("model", "optim", "batch")
    }
    assert [line["train/loss"] for line in history] == losses
    assert [line["valid/loss"] for line in history if "valid/loss" in line] == [
        line["valid/loss"] for line in lines if "valid/loss" in line
    ]
    assert [line["_step"] for line in history if "report/load_middle/path" in line] == [10, 20]
    pictures = {path.stem for path in (run / "report").glob("*.png")}
    of_steps = {"speed", "step_time", "optimizer", "memory"}
    assert pictures == {"loss", "perplexity", "load_middle", "balance_middle"} | of_steps
    before = sorted(run.rglob("*"))
    status, again, stderr = train_forked("--evaluate", str(run))
    assert status == 0, stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("test perplexity")]
    assert said == [line for line in again.splitlines() if line.startswith("test perplexity")]
    assert sorted(run.rglob("*")) == before, "evaluation writes nothing"
    wrong = ["--resume", str(run), "--set", "steps=40", "--set", "model.dim=32"]
    check_plan(wrong, "--set model.dim", capsys)
    assert from_json((run / "config.json").read_text()) == tiny(*more), (
        "a refused resume changes nothing"
    )
    check_plan(["lstm_moe_demo", "--folder", str(run)], "holds a run already", capsys)
