"""Configs and the command line: what a mistake says, and what it costs (nothing)."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import TINY, tiny
from wandb_file import wandb_log

from moe_dist import checkpoint, configs, engine
from moe_dist.cli import plan
from moe_dist.config import Config, dotted_keys, from_json, override, to_json
from moe_dist.parallel.mesh import Layout, lay_out
from moe_dist.summary import counts
from moe_dist.tasks import TASKS

ROOT = Path(__file__).parent.parent


def train(*args: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


def test_override_reaches_every_kind_of_field() -> None:
    config = override(
        configs.get("lstm_moe_demo"),
        ["mesh.ep=2", "optim.lr=1e-4", "model.moe.noise=false", "zero=3", "optim.clip_norm=none", "data.text=a=b"],
    )
    assert (config.mesh.ep, config.optim.lr, config.model.moe.noise) == (2, 1e-4, False)
    assert (config.zero, config.optim.clip_norm, config.data.text) == (3, None, "a=b")
    assert override(config, ["zero=none"]).zero is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mesh.eq=2", "'mesh.ep'"),
        ("optim.learning_rate=1", "no field 'optim.learning_rate'"),
        ("mesh=2", "no field 'mesh'"),
        ("mesh.ep", "KEY=VALUE"),
        ("mesh.ep=two", "expected int"),
        ("model.moe.noise=maybe", "expected bool"),
        ("zero=first", "expected int or none"),
    ],
)
def test_a_wrong_override_names_what_would_do(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace(".", r"\.")) as error:
        override(configs.get("lstm_moe_demo"), [text])
    assert text in str(error.value)


def test_an_unknown_config_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="no config 'moe_33'; did you mean 'moe_32'"):
        configs.get("moe_33")


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_json_round_trip_of_every_config(name: str) -> None:
    config = configs.get(name)
    assert config.name == name and from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optim": {"rate": 1}}, "no field 'optim.rate'"),
        ({"steps": "many"}, "steps='many', expected int"),
        ({"mesh": 3}, "mesh is 3, expected an object"),
        ({"data": {"text": 1}}, "data.text=1, expected str"),
    ],
)
def test_a_spoilt_json_is_refused(change: dict, says: str) -> None:
    with pytest.raises(ValueError) as error:
        from_json(json.dumps(dataclasses.asdict(tiny()) | change))
    assert says in str(error.value)
    with pytest.raises(ValueError, match="expected an object"):
        from_json("[]")


def test_every_field_can_be_set() -> None:
    assert {"mesh.ep", "model.moe.capacity_factor", "batch.accumulation", "wandb.mode", "ds_config", "zero"} <= set(
        dotted_keys()
    )


@pytest.mark.parametrize(
    ("world", "sets", "says"),
    [
        (2, ["mesh.ep=3"], "mesh.ep=3 does not divide 2 ranks; possible: 1, 2"),
        (4, ["mesh.ep=4", "model.moe.num_experts=6"], "nearest: 8"),  # round(6 / 4) = 2 -> 8
        (3, [], "batch.samples=8 is not a multiple of accumulation x ranks = 1 x 3; nearest: 9"),
        (1, ["batch.accumulation=0"], "at least 1"),
        # half of 8 samples is a micro-batch; a balance group of the whole batch does not fit into it
        (1, ["batch.accumulation=2", "batch.samples_per_balance_group=none"], "micro-batch of 4 samples"),
        (1, ["batch.samples_per_balance_group=3"], "nearest: 2"),
        # 8 samples over 4 ranks: 2 a rank
        (
            4,
            ["model.moe.capacity_factor=1.0", "batch.samples_per_token_group=4"],
            "micro-batch of 2 samples; nearest: 2",
        ),
    ],
)
def test_an_illegal_layout_names_the_nearest_legal_one(world: int, sets: list[str], says: str) -> None:
    with pytest.raises(ValueError) as error:
        lay_out(tiny(*sets), world)
    assert says in str(error.value)


def test_layout_by_hand() -> None:
    # 24 samples, 2 micro-batches of 12 over 3 ranks of 4: rank 1 has 4..7 of the first and 16..19 of the second
    layout = Layout(world=3, samples=24, accumulation=2, samples_per_balance_group=12, samples_per_token_group=1)
    assert [list(layout.my_samples(micro, 1)) for micro in (0, 1)] == [[4, 5, 6, 7], [16, 17, 18, 19]]
    held = [s for micro in (0, 1) for rank in range(3) for s in layout.my_samples(micro, rank)]
    assert held == list(range(24)), "the global order, each sample once"


@pytest.mark.parametrize(
    ("ds", "says"),
    [
        ({"train_batch_size": 8}, "'train_batch_size' is set by batch.samples"),
        ({"gradient_clipping": 1.0}, "optim.clip_norm"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer' is set by optim"),
        ({"fp16": {"enabled": True}}, "use bf16 or fp32"),
        ({"zero_optimization": {"stage": 4}}, "zero=4"),
    ],
)
def test_a_ds_config_that_contradicts_the_run(
    ds: dict, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(ds))
    monkeypatch.setattr(engine, "DS_CONFIGS", tmp_path)
    with pytest.raises(ValueError) as error:
        engine.read_ds_config(tiny("ds_config=mine"))
    assert says in str(error.value)


def test_an_unknown_ds_config_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'bf16'"):
        engine.read_ds_config(tiny("ds_config=bf61"))


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
    config = configs.get(name)
    count = counts(TASKS[config.task].plain_model(config), config)
    assert count["parameters_without_embedding_and_softmax"] == pytest.approx(parameters, rel=0.01)
    assert count["ops_per_timestep"] == pytest.approx(ops, rel=0.01)


def test_demo_and_its_baseline_have_equal_ops_and_differ_in_the_middle_alone() -> None:
    moe, wide = configs.get("lstm_moe_demo"), configs.get("lstm_wide_demo")
    assert moe.model.moe.k * moe.model.moe.hidden == wide.model.ffn_hidden
    same = {"name": "", "compare": None, "model": Config("").model}
    assert dataclasses.replace(moe, **same) == dataclasses.replace(wide, **same)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["moe_33"], "did you mean 'moe_32'"),
        (["lstm_moe_demo", "--set", "mesh.ep=2"], "does not divide 1 ranks"),
        (["lstm_moe_demo", "--set", "model.moe.k=65"], "k=65"),
        (["lstm_moe_demo", "--set", "model.middle=mou"], "'moe'"),
        (["lstm_moe_demo", "--set", "model.lstm_units=8"], "at least the model's width, dim=128"),
        (["lstm_moe_demo", "--set", "wandb.mode=on"], "'online'"),
        (["lstm_moe_demo", "--set", "steps=0"], "steps=0: at least 1"),
        (["lstm_moe_demo", "--set", "model.dropout=1"], "model.dropout=1.0: from 0 to below 1"),
        (["lstm_moe_demo", "--set", "optim.lr=-1"], "optim.lr=-1.0: a positive number"),
        (["lstm_moe_demo", "--resume", "runs/x"], "give one of"),
        (["--resume", "runs/x"], "not a run folder"),
        (["lstm_moe_demo", "--set", "task=translate"], "task='translate'"),
        (["lstm_moe_demo", "--set", "batch.samples_per_balance_group=0"], "samples_per_balance_group=0"),
        (["lstm_moe_demo", "--set", "model.moe.w_load=nan"], "w_load=nan: 0 or more"),
        (["lstm_moe_demo", "--set", "save_every=25"], "not a multiple of log_every=10"),
        (["lstm_moe_demo", "--set", "model.moe.num_groups=5"], "num_groups=5"),
        ([], "give one of"),
    ],
)
def test_bad_input_is_one_line_and_status_2(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        plan(args, None)
    check_one_line(capsys.readouterr().err, says)
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("set_", "says"), [("optim.expert_form=died", "'diet'"), ("data.text=no/such/*.txt", "no/such/*.txt")]
)
def test_what_is_found_after_start_costs_nothing_either(set_: str, says: str, tmp_path: Path) -> None:
    done = train("lstm_moe_demo", "--folder", str(tmp_path / "run"), "--set", set_)
    assert done.returncode == 2
    check_one_line(done.stderr, says)
    assert not (tmp_path / "run").exists(), "nothing was written"


def check_one_line(stderr: str, says: str) -> None:
    lines = [line for line in stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], stderr


def test_list_and_dry_run() -> None:
    listed = train("--list")
    assert listed.returncode == 0 and all(name in listed.stdout for name in configs.CONFIGS)
    dry = train("moe_256_h", "--dry-run", "--json", "--set", "batch.samples=64")
    assert dry.returncode == 0
    said = json.loads(dry.stdout)
    assert (said["world"], said["samples"]) == (1, 64)
    # experts 256 x 2 x 512 x 1024, LSTMs 2 x (8 x 512 x 512 + 8 x 512), primary gate 2 x 512 x 16, others 16 times that
    parameters = 268_435_456 + 4_202_496 + 16_384 + 262_144
    assert said["parameters_without_embedding_and_softmax"] == parameters
    dry = train("moe_32", "--dry-run")
    assert dry.returncode == 0 and "32 in all, 32 per rank, 4 per word" in dry.stdout


@pytest.mark.timeout(200)
def test_a_run_leaves_what_it_promises_and_can_be_evaluated(small_text: Path, tmp_path: Path) -> None:
    more = [f"data.text={small_text}", "eval_every=10", "wandb.mode=offline"]
    sets = [part for s in [*TINY, *more] for part in ("--set", s)]
    run = tmp_path / "run"
    done = train("lstm_moe_demo", "--folder", str(run), *sets, timeout=100)
    assert done.returncode == 0, done.stderr
    assert f"run folder: {run}" in done.stdout and "unigram model" in done.stdout
    assert from_json((run / "config.json").read_text()) == tiny(*more)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # at most (w_importance + w_load) x CV² of one expert for all, which is num_experts - 1
    assert lines[0]["tflops_per_device"] > 0
    assert 0 < lines[0]["train/balance_loss"] < 0.2 * 7
    assert lines[0]["moe/middle/dead_experts"] == lines[0]["moe/middle/load"].count(0)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert (
        len(lines[0]["moe/middle/load"]) == 8 and sum(lines[0]["moe/middle/load"]) == 8 * 6 * 2
    )  # samples x words x k
    run_id, config, history = wandb_log(run)
    assert run_id == checkpoint.read_state(checkpoint.latest(run))["wandb_id"]
    assert {key: config[key] for key in ("model", "optim", "batch")} == {
        key: json.loads((run / "config.json").read_text())[key] for key in ("model", "optim", "batch")
    }
    assert [line["train/loss"] for line in history] == losses
    assert [line["valid/loss"] for line in history if "valid/loss" in line] == [
        line["valid/loss"] for line in lines if "valid/loss" in line
    ]
    assert [line["_step"] for line in history if "report/load_middle/path" in line] == [10, 20]
    pictures = {path.stem for path in (run / "report").glob("*.png")}
    assert pictures == {"loss", "perplexity", "load_middle", "balance_middle", "speed", "optimizer"}
    before = sorted(run.rglob("*"))
    again = train("--evaluate", str(run))
    assert again.returncode == 0, again.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("test perplexity")]
    assert said == [line for line in again.stdout.splitlines() if line.startswith("test perplexity")]
    assert sorted(run.rglob("*")) == before, "evaluation writes nothing"
    wrong = train("--resume", str(run), "--set", "steps=40", "--set", "model.dim=32")
    assert wrong.returncode == 2 and "--set model.dim" in wrong.stderr
    assert from_json((run / "config.json").read_text()) == tiny(*more), "a refused resume changes nothing"
    taken = train("lstm_moe_demo", "--folder", str(run))
    assert taken.returncode == 2 and "holds a run already" in taken.stderr
