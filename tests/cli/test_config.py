"""Configs and the command line."""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from runs import TINY, tiny
from wandb_file import wandb_log

from moe_dist.checkpoint import format as checkpoint_format
from moe_dist.checkpoint import manifest
from moe_dist.config import papers, schema
from moe_dist.config.overrides import SYNONYMS, dotted_keys, from_json, override, to_json
from moe_dist.config.schema import Config
from moe_dist.distributed.batch_layout import BatchLayout
from moe_dist.tasks.registry import TASKS
from moe_dist.training.model_stats import count_params_and_flops


def train(*args: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


def test_override_reaches_every_kind_of_field() -> None:
    config = override(
        papers.get("lstm_moe_demo"),
        [
            "mesh.ep=2",
            "optim.lr=1e-4",
            "model.moe.noise=false",
            "zero_stage=3",
            "optim.max_grad_norm=none",
            "data.text=a=b",
        ],
    )
    assert (config.mesh.ep, config.optim.lr, config.model.moe.noise) == (2, 1e-4, False)
    assert (config.zero_stage, config.optim.max_grad_norm, config.data.text) == (3, None, "a=b")
    assert override(config, ["zero_stage=none"]).zero_stage is None


@pytest.mark.parametrize(
    ("name", "key", "says"),
    [
        # other programs' names, in the right section, in another one, and in none
        ("lstm_moe_demo", "optim.learning_rate", "did you mean 'optim.lr'?"),
        ("lstm_moe_demo", "train.batch-size", "did you mean 'batch.global_batch_size'?"),
        ("widenet_demo", "num_epochs", "did you mean 'steps'?"),
        ("widenet_text_demo", "vocab_size", "did you mean 'model.vocabulary_size'?"),
        ("lstm_moe_demo", "data.vocab_size", "did you mean 'data.vocabulary_size'?"),
        ("lstm_moe_demo", "model.num_experts_per_tok", "did you mean 'model.moe.k'?"),
        # a field in another section
        ("widenet_demo", "model.num_experts", "did you mean 'model.encoder.moe.num_experts'?"),
        ("widenet_demo", "weight_decay", "did you mean 'optim.weight_decay'?"),
        # a slip
        ("lstm_moe_demo", "optim.wieght_decay", "did you mean 'optim.weight_decay'?"),
        # nothing near: the fields of its section, or all
        ("lstm_moe_demo", "data.path", "known: data.streamed, data.text, data.vocabulary_size"),
        ("lstm_moe_demo", "foo", "known: async_save, baseline, batch.balance_loss_group_size, "),
    ],
)
def test_an_unknown_field_names_the_nearest(name: str, key: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"no field {key!r}; {says}")):
        override(papers.get(name), [f"{key}=1"])


def test_every_synonym_names_a_field() -> None:
    every = [papers.get(name) for name in ("lstm_moe_demo", "widenet_demo", "widenet_squad")]
    last_parts = {key.rpartition(".")[2] for config in every for key in dotted_keys(config)}
    assert last_parts.issuperset(SYNONYMS.values()) and last_parts.isdisjoint(SYNONYMS)


@pytest.mark.parametrize("name", papers.CONFIGS)
def test_json_round_trip_of_every_config(name: str) -> None:
    config = papers.get(name)
    assert config.name == name and from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optim": {"rate": 1}}, "no field 'optim.rate'"),
        ({"steps": "many"}, "steps='many', expected a whole number"),
        ({"mesh": 3}, "mesh is 3, expected an object"),
        ({"data": {"text": 1}}, "data.text=1, expected text"),
    ],
)
def test_a_spoilt_json_is_refused(change: dict, says: str) -> None:
    with pytest.raises(ValueError) as error:
        from_json(json.dumps(dataclasses.asdict(tiny()) | change))
    assert says in str(error.value)
    with pytest.raises(ValueError, match="expected an object"):
        from_json("[]")


def test_every_field_can_be_set() -> None:
    assert {
        "mesh.ep",
        "model.moe.capacity_factor",
        "batch.grad_accum_steps",
        "wandb.mode",
        "ds_config",
        "zero_stage",
    } <= set(dotted_keys(tiny()))


def test_every_field_is_documented_in_order() -> None:
    """The reference page of the config is made from the `Attributes:` sections."""
    sections = [each for each in vars(schema).values() if dataclasses.is_dataclass(each)]
    assert Config in sections and len(sections) == 17
    for section in sections:
        _, _, attributes = inspect.getdoc(section).partition("Attributes:\n")
        documented = re.findall(r"^ {4}(\w+): ", attributes, re.MULTILINE)
        assert documented == [field.name for field in dataclasses.fields(section)], section


def test_layout_by_hand() -> None:
    # 24 samples, 2 micro-batches of 12 over 3 ranks of 4: rank 1 has 4..7 of the first and 16..19 of the second
    layout = BatchLayout(
        world=3,
        global_batch_size=24,
        grad_accum_steps=2,
        balance_loss_group_size=12,
        capacity_group_size=1,
    )
    assert [list(layout.local_samples(micro, 1)) for micro in (0, 1)] == [
        [4, 5, 6, 7],
        [16, 17, 18, 19],
    ]
    held = [s for micro in (0, 1) for rank in range(3) for s in layout.local_samples(micro, rank)]
    assert held == list(range(24)), "the global order, each sample once"


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
def test_parameters_and_ops_are_the_papers(name: str, parameters: float, ops: float) -> None:
    config = papers.get(name)
    count = count_params_and_flops(TASKS[config.task].build_model(config), config)
    assert count["parameters_without_embedding_and_softmax"] == pytest.approx(parameters, rel=0.01)
    assert count["ops_per_timestep"] == pytest.approx(ops, rel=0.01)


def test_demo_and_its_baseline_have_equal_ops_and_differ_in_the_middle_alone() -> None:
    moe, wide = papers.get("lstm_moe_demo"), papers.get("lstm_wide_demo")
    assert moe.model.moe.k * moe.model.moe.expert_hidden_dim == wide.model.ffn_hidden_dim
    same = {"name": "", "baseline": None, "model": Config("").model}
    assert dataclasses.replace(moe, **same) == dataclasses.replace(wide, **same)  # type: ignore[arg-type]


def test_a_reader_that_leaves_is_no_error() -> None:
    """As `| head -c 1` does; what a run prints later is left out, and the run goes on."""
    command = f"{sys.executable} -c 'from moe_dist.monitoring.console import print_on_main as say; say(str(0) * 100_000); say(str(1) * 100_000)'"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -c 1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0", "")


def test_list_and_dry_run() -> None:
    listed = train("--list")
    assert listed.returncode == 0 and all(name in listed.stdout for name in papers.CONFIGS)
    dry = train("moe_256_h", "--dry-run", "--json", "--set", "batch.global_batch_size=64")
    assert dry.returncode == 0
    said = json.loads(dry.stdout)
    assert (said["world"], said["global_batch_size"]) == (1, 64)
    # experts 256 x 2 x 512 x 1024, LSTMs 2 x (8 x 512 x 512 + 8 x 512), primary gate 2 x 512 x 16, others 16 times that
    parameters = 268_435_456 + 4_202_496 + 16_384 + 262_144
    assert said["parameters_without_embedding_and_softmax"] == parameters
    dry = train("moe_32", "--dry-run")
    assert dry.returncode == 0 and "32 in all, 32 per rank, 4 per word" in dry.stdout


@pytest.mark.timeout(200)
def test_a_run_leaves_what_it_promises_and_can_be_evaluated(
    small_text: Path, tmp_path: Path
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
    # at most (importance_loss_weight + load_loss_weight) x CV² of one expert for all, which is num_experts - 1
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
    again = train("--evaluate", str(run))
    assert again.returncode == 0, again.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("test perplexity")]
    assert said == [
        line for line in again.stdout.splitlines() if line.startswith("test perplexity")
    ]
    assert sorted(run.rglob("*")) == before, "evaluation writes nothing"
    wrong = train("--resume", str(run), "--set", "steps=40", "--set", "model.dim=32")
    assert wrong.returncode == 2 and "--set model.dim" in wrong.stderr
    assert from_json((run / "config.json").read_text()) == tiny(*more), (
        "a refused resume changes nothing"
    )
    taken = train("lstm_moe_demo", "--folder", str(run))
    assert taken.returncode == 2 and "holds a run already" in taken.stderr
