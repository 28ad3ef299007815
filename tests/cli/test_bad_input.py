"""Mistakes on the command line, in the environment and in run folders: one line that names the
value, and no file written."""

import errno
import json
import shutil
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from processes import check_one_line, check_plan, end, ranks, set_, start
from runs import TINY, tiny

from experiments.hostile import seal
from moe_dist.checkpoint import manifest
from moe_dist.config import papers
from moe_dist.config.overrides import override
from moe_dist.distributed import rendezvous_port
from moe_dist.distributed.batch_layout import make_batch_layout
from moe_dist.engine import ds_config
from moe_dist.tasks.language_model import saved_vocabulary
from moe_dist.training import run_directory, run_spec
from moe_dist.training.results import result_lines


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        # what no field takes
        ("mesh.eq=2", "'mesh.ep'"),
        ("optim.learning_rate=1", "no field 'optim.learning_rate'; did you mean 'optim.lr'?"),
        ("mesh=2", "no field 'mesh'; known: mesh.comm_dtype, mesh.dispatcher, mesh.ep"),
        ("mesh.ep", "KEY=VALUE"),
        ("mesh.ep=two", "expected a whole number such as 100"),
        ("model.moe.noise=maybe", "expected true or false"),
        ("zero_stage=first", "expected a whole number such as 100 or none"),
        # out of range
        ("steps=0", "steps=0 is out of range; use a value from 1 to 99999999"),
        ("steps=99999999999", "steps=99999999999 is out of range; use a value from 1 to 99999999"),
        ("steps=100000000", "steps=100000000 is out of range; use a value from 1 to 99999999"),
        (
            "model.lstm_units=0",
            "model.lstm_units=0 is out of range; use a value from 1 to 2147483647",
        ),
        ("model.dropout=1", "model.dropout=1.0 is out of range; use a value from 0 to 0.99"),
        (
            "model.softmax_samples=0",
            "model.softmax_samples=0 is out of range; use a value from 1 to 2147483647",
        ),
        ("optim.lr=-1", "optim.lr=-1.0 is out of range; use a value from 1e-12 to 1e+06"),
        ("optim.lr=1e400", "optim.lr=inf is out of range; use a value from 1e-12 to 1e+06"),
        (
            "optim.warmup_steps=-1",
            "optim.warmup_steps=-1 is out of range; use a value from 0 to 99999999",
        ),
        (
            "mesh.overlap_chunks=-1",
            "mesh.overlap_chunks=-1 is out of range; use a value from 0 to 1024",
        ),
        (
            "model.moe.load_loss_weight=nan",
            "load_loss_weight=nan is out of range; use a value from 0 to 1e+06",
        ),
        (
            "model.moe.capacity_factor=1e30",
            "capacity_factor=1e+30 is out of range; use a value from 0.001 to 1000",
        ),
        ("name=../x", "name='../x'"),
        ("wandb.mode=on", "'online'"),
        ("task=translate", "task='translate'"),
        ("data.text=no/such/*.txt", "no/such/*.txt"),
        (f"baseline={ROOT}/ds_configs/fp32.json", "ds_configs/fp32.json: no kept metrics"),
        ("ds_config=bf61", "did you mean 'bf16'"),
        ("zero_stage=4", "zero_stage=4 is out of range; use a value from 0 to 3"),
        # what does not fit together
        ("mesh.ep=2", "does not divide 1 ranks"),
        ("model.middle_layer=mou", "'moe'"),
        ("model.moe.k=65", "k=65"),
        ("model.moe.num_groups=5", "num_groups=5"),
        ("model.moe.num_groups=32", "k=4 experts per group: must be 1 to 2"),
        (
            "model.moe.num_groups=8 model.moe.capacity_factor=1",
            "with num_groups nothing is dropped",
        ),
        ("model.lstm_units=8", "less than model.dim=128"),
        ("model.dim=2000000000", "the model is too large for a tensor"),
        ("batch.balance_loss_group_size=0", "balance_loss_group_size=0"),
        ("batch.global_batch_size=2000000011 batch.balance_loss_group_size=4", "nearest: 1"),
        ("save_every=25", "not a multiple of log_every=10"),
        # more than any machine has
        ("batch.seq_len=999999999", "GB (breakdown in the table above)"),
        ("model.moe.num_experts=999999999", "GB (breakdown in the table above)"),
    ],
)
def test_invalid_setting_prints_one_line_and_exits_with_2(
    assignments: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_plan(["lstm_moe_demo", *set_(*assignments.split())], says, capsys)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "give one of"),
        (["moe_33"], "no config 'moe_33'; did you mean 'moe_32'"),
        (["lstm_moe_demo", "--json"], "--json and --ranks: only with --dry-run"),
        (
            ["lstm_moe_demo", "--dry-run", "--nodes", "2"],
            "--nodes 2: with --ranks, a multiple of it",
        ),
        (
            ["lstm_moe_demo", "--dry-run", "--ranks", "4", "--nodes", "3"],
            "--nodes 3: with --ranks, a multiple of it",
        ),
        (["lstm_moe_demo", "--resume", "runs/x"], "give one of"),
        (["--resume", "runs/x"], "not a run folder"),
    ],
)
def test_invalid_command_prints_one_line_and_exits_with_2(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_plan(args, says, capsys)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "2"}, "no MASTER_ADDR, MASTER_PORT, RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "no MASTER_ADDR, MASTER_PORT"),
        (
            {"RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "WORLD_SIZE=two",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "99999"},
            "MASTER_PORT=99999",
        ),
    ],
)
def test_incomplete_rank_environment_prints_one_line(
    environment: dict[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    check_plan(["lstm_moe_demo"], says, capsys)


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["steps=20"], "; did you mean --set steps=20?"),
        (["--optim.lr", "1e-3"], "; did you mean --set optim.lr=1e-3?"),
        (["--steps"], "; did you mean --set steps=...?"),
        (["--speed"], ""),
    ],
)
def test_field_without_set_gets_a_hint(
    args: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_spec.parse_run(["lstm_moe_demo", *args], None)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.endswith(
        f"error: unrecognized arguments: {' '.join(args)}{hint}\n"
    )


def test_unknown_field_is_named_without_its_value() -> None:
    with pytest.raises(
        ValueError, match=r"^--set: no field 'mesh\.eq'; did you mean 'mesh\.ep'\?$"
    ):
        override(papers.get("lstm_moe_demo"), ["mesh.eq=2"])


@pytest.mark.parametrize(
    ("world", "sets", "says"),
    [
        (2, ["mesh.ep=3"], "mesh.ep=3 does not divide 2 ranks; possible: 1, 2"),
        (4, ["mesh.ep=4", "model.moe.num_experts=6"], "nearest: 8"),  # round(6 / 4) = 2 -> 8
        (
            3,
            [],
            "batch.global_batch_size=8 is not a multiple of accumulation x ranks = 1 x 3; nearest: "
            "9",
        ),
        (1, ["batch.grad_accum_steps=0"], "at least 1"),
        # half of 8 samples is a micro-batch; a balance group of the whole batch does not fit into
        # it
        (
            1,
            ["batch.grad_accum_steps=2", "batch.balance_loss_group_size=none"],
            "micro-batch of 4 samples",
        ),
        (1, ["batch.balance_loss_group_size=3"], "nearest: 2"),
        # 8 samples over 4 ranks: 2 a rank
        (
            4,
            ["model.moe.capacity_factor=1.0", "batch.capacity_group_size=4"],
            "micro-batch of 2 samples; nearest: 2",
        ),
    ],
)
def test_illegal_layout_names_the_nearest_legal_one(world: int, sets: list[str], says: str) -> None:
    with pytest.raises(ValueError) as error:
        make_batch_layout(tiny(*sets), world)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("ds", "says"),
    [
        ('{"train_batch_size": 8}', "'train_batch_size' is set by batch.global_batch_size"),
        ('{"gradient_clipping": 1.0}', "optim.max_grad_norm"),
        ('{"optimizer": {"type": "Adam"}}', "'optimizer' is set by optim"),
        ('{"fp16": {"enabled": true}}', "use bf16 or fp32"),
        ('{"zero_optimization": {"stage": 4}}', "zero_stage=4"),
        (
            '{"zero_optimisation": {"stage": 1}}',
            "unknown key 'zero_optimisation'; did you mean 'zero_optimization'",
        ),
        ('{"bf16": true}', "'bf16' is True, expected an object"),
        ('{"bf16": {"enable": true}}', "unknown key 'bf16.enable'; did you mean 'enabled'"),
        ('{"bf16": {"enabled": "auto"}}', "'bf16.enabled' is 'auto', expected bool"),
        (
            '{"zero_optimization": {"stage": true}}',
            "'zero_optimization.stage' is True, expected int",
        ),
        ('{"zero_optimization": {"stage": 2, "stage": 1}}', "'stage' is given 2 times"),
        (
            '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}',
            "read at ZeRO 1, 2, 3, not at zero_stage=0",
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}',
            "'nvme'; use 'cpu', or leave it out",
        ),
        (
            '{"zero_optimization": {"stage": 2, "stage3_max_reuse_distance": 1e9}}',
            "read at ZeRO 3, not at zero_stage=2",
        ),
        (
            '{"zero_optimization": {"stage": 3, "sub_group_size": 1000}}',
            "unknown key 'zero_optimization.sub_group_size'",
        ),
        ("[]", "[], expected an object"),
        ('{"bf16"', "ds_configs/mine.json: "),
    ],
)
def test_contradicting_or_broken_ds_config_is_rejected(
    ds: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine.json").write_text(ds)
    monkeypatch.setattr(ds_config, "DS_CONFIGS", tmp_path)
    check_plan(["lstm_moe_demo", "--set", "ds_config=mine"], says, capsys)


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("data.vocabulary_size=100000", "at most"),  # found by the main rank alone
        ("mesh.ep=3", "mesh.ep=3 does not divide 2 ranks"),
    ],
)
def test_every_rank_exits_with_one_line(
    assignment: str, says: str, small_text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sets = set_(*TINY, f"data.text={small_text}", assignment)
    for status, stderr in ranks(
        rendezvous_port.find_free_port(), "lstm_moe_demo", "--folder", str(run), *sets
    ):
        assert status == 2
        check_one_line(stderr, says)
    assert not run.exists(), "nothing was written"


@pytest.mark.timeout(100)
def test_port_in_use_ends_every_rank() -> None:
    with socket.socket() as stranger:  # that takes calls and never answers
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        for status, stderr in ranks(port, "lstm_moe_demo", MOE_DIST_JOIN_SECONDS="3"):
            assert status == 2
            check_one_line(stderr, f"MASTER_PORT={port}: 2 ranks cannot meet there")


@pytest.mark.timeout(100)
@pytest.mark.parametrize("rank", [0, 1])
def test_missing_rank_ends_the_others_after_a_timeout(rank: int) -> None:
    """Rank 1 is blocked in a wait of torch, which could abort an orderly exit."""
    world = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(rendezvous_port.find_free_port()),
    }
    status, stderr = end(start("lstm_moe_demo", **world | {"MOE_DIST_JOIN_SECONDS": "4"}))
    assert status == 2, stderr
    says = ["1/2 clients joined", "2 ranks cannot meet there"][rank]
    check_one_line(
        stderr if rank == 0 else stderr.splitlines()[-1], says
    )  # torch adds a stack of its own


def without_copies(run: Path) -> Path:
    """Removes the copies of the config that checkpoints keep, and returns the config's own path."""
    for checkpoint in manifest.require_checkpoints(run):
        (checkpoint / "config.json").unlink()
        seal(checkpoint)
    return run / "config.json"


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: without_copies(run).write_text("{broken"), "config.json: "),
        (lambda run: without_copies(run).write_text("[]"), "expected an object"),
        (
            lambda run: (run / "metrics.jsonl").write_text("[1]\n"),
            "metrics.jsonl line 1 has no step",
        ),
        (lambda run: shutil.rmtree(run / "checkpoints"), "no checkpoint to continue from"),
    ],
)
def test_damaged_run_prints_one_line(
    spoil: Callable[[Path], object], says: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(run)
    check_plan(["--resume", str(run), "--set", "steps=3"], says, capsys)


def test_run_without_vocabulary_counts_cannot_resume() -> None:
    with pytest.raises(ValueError, match="no vocabulary with counts"):
        saved_vocabulary({"step": 2, "updates": 2, "vocabulary": ["a"]})


def test_disk_without_locks_prints_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_directory.fcntl, "flock", no_locks)
    with (tmp_path / "lock").open("a") as lock:
        run_directory.acquire(lock, tmp_path, 0)
    said = f"warning: {tmp_path}: its file system has no locks (Function not implemented); do not start two runs in it\n"
    assert capsys.readouterr().err == said


@pytest.mark.timeout(200)
def test_unwritable_or_busy_run_folder_is_rejected(small_text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sets = set_(*TINY, "steps=100000", "save_every=5", f"data.text={small_text}")
    run = tmp_path / "run"
    first = start("lstm_moe_demo", "--folder", str(run), *sets)
    try:
        below = start("lstm_moe_demo", "--folder", str(tmp_path / "file" / "run"), *sets)
        while not (run / "checkpoints").is_dir():
            assert first.poll() is None
            time.sleep(0.05)
        status, stderr = end(below)
        assert status == 2
        check_one_line(stderr, "is no folder to write to")
        status, stderr = end(start("--resume", str(run)))
        assert status == 2
        check_one_line(stderr, "in use by a run that has not ended")
        first.send_signal(signal.SIGINT)
        status, stderr = end(first)
        assert status == 130
        newest = sorted(run.glob("checkpoints/step_*"))[-1].name
        assert stderr.endswith(f"interrupted; train.py --resume {run} goes on from {newest}\n")
        assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    finally:
        first.kill()


def test_result_reports_skipped_steps() -> None:
    config = tiny("steps=3", "baseline=none")
    result = partial(result_lines, config, Path("x"), "test perplexity 9.00", 3)
    assert "2 of 3 steps were skipped" in result(num_updates=1, baseline_is_explicit=False)
    assert "skipped" not in result(num_updates=3, baseline_is_explicit=False)
