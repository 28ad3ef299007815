"""Checkpoints that are damaged, hostile or cannot be written; `inspect` and `export` of intact
ones."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from paths import ROOT
from processes import check_one_line, end, set_, start, train_forked
from runs import TINY, Run, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_dist.checkpoint import __main__ as command
from moe_dist.checkpoint import manifest
from moe_dist.checkpoint.format import read_state
from moe_dist.checkpoint.saver import Saver
from moe_dist.checkpoint.single_process import export, inspect
from moe_dist.config.overrides import from_json
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed import rendezvous_port
from moe_dist.distributed.spawn import run_distributed
from moe_dist.inference import generate
from moe_dist.inference.load import TextModel


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def remove(path: Path, chance: random.Random) -> None:
    path.unlink()


def test_damaged_checkpoint_is_never_loaded(run: Path) -> None:
    """194 damages; test_kill_during_save_leaves_a_complete_checkpoint has six more."""
    chance = random.Random(0)
    older, newest = manifest.require_checkpoints(run)
    whole = {path: path.read_bytes() for path in newest.iterdir()}
    assert manifest.newest_complete(run) == (newest, {})
    hit = set()
    for i in range(194):
        path, spoil = sorted(whole)[i % len(whole)], [flip, cut, remove][i // len(whole) % 3]
        spoil(path, chance)
        hit.add((path.name, spoil))
        got, refused = manifest.newest_complete(run)
        assert got == older and len(refused) == 1, (spoil, path)
        assert str(newest) in refused[newest] and path.name in refused[newest]
        with pytest.raises(
            ValueError, match=f"{path.name}.*; the newest complete checkpoint is .*{older.name}"
        ):
            export(newest, run / "model.safetensors")
        path.write_bytes(whole[path])
    assert len(hit) == 12
    assert manifest.newest_complete(run) == (newest, {})


def save_for_ever(text: str, folder: Path) -> None:
    meshes.init_process_group()
    run = Run(tiny(f"data.text={text}"))
    saver = Saver(folder, run.engine, run.task, run.mesh, keep=2)
    for step in range(1, 10**8):
        run.steps(step - 1, step)
        saver.save(step, {})


@pytest.mark.timeout(120)
def test_kill_during_save_leaves_a_complete_checkpoint(small_text: Path, tmp_path: Path) -> None:
    chance, torn = random.Random(0), 0
    for first in (0, 2, 4, 6):
        if (
            first >= 4 and torn
        ):  # a save takes milliseconds: on a busy machine kills may come too late for it
            break
        runs = [tmp_path / str(i) for i in (first, first + 1)]
        code = f"import sys; sys.path[:0] = {sys.path!r}; from tests.system import test_checkpoint; import pathlib; "
        code += "test_checkpoint.save_for_ever(sys.argv[1], pathlib.Path(sys.argv[2]))"
        started = [
            subprocess.Popen([sys.executable, "-c", code, str(small_text), str(run)])
            for run in runs
        ]
        try:
            for process, run in zip(started, runs, strict=True):
                while not any(
                    path.name >= "step_00000005" for path in (run / "checkpoints").glob("step_*")
                ):
                    assert process.poll() is None
                    time.sleep(0.001)
                while not any((run / "checkpoints").glob("partial_*")):
                    assert process.poll() is None
                time.sleep(chance.random() / 200)
                process.kill()
                process.wait()
                newest, refused = manifest.newest_complete(run)
                assert not refused and inspect(newest)["step"] >= 4
                torn += len(list((run / "checkpoints").glob("partial_*")))
        finally:
            for process in started:
                process.kill()
    assert torn, "no kill fell into a save"


@pytest.mark.timeout(100)
def test_resume_uses_the_newest_complete_checkpoint_and_names_damaged_ones(run: Path) -> None:
    newest = manifest.require_checkpoints(run)[-1]
    flip(newest / "state.json", random.Random(0))
    status, _, stderr = train_forked(
        "--resume", str(run), "--set", "steps=3", "--set", "keep_last_n=1"
    )
    assert status == 0
    assert f"warning: {newest} is damaged: state.json does not match its checksum" in stderr
    assert "Refused; using step_00000001" in stderr
    assert [path.name for path in manifest.require_checkpoints(run)] == ["step_00000003"]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3]


@pytest.mark.parametrize(
    (
        "step",
        "left",
    ),  # of steps 1 and 2 the second is damaged, and the run goes on from 1 with keep = 1
    [
        (1, ["step_00000001", "step_00000002"]),  # saved again, before the run comes by
        (2, ["step_00000002"]),  # in its place
        (3, ["step_00000002", "step_00000003"]),  # the damaged one does not count
    ],
)
def test_refused_checkpoint_does_not_count_for_keep_last_n(
    step: int, left: list[str], run: Path
) -> None:
    newest = manifest.require_checkpoints(run)[-1]
    cut(newest / "state.json", random.Random(0))
    (run / "checkpoints" / "partial_step_00000007").mkdir()  # of a killed run
    assert run_distributed(resave, 1, run, step, timeout=60) == [f"step_{step:08d}"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == left


def resave(folder: Path, step: int) -> str:
    meshes.init_process_group()
    run = Run(from_json((folder / "config.json").read_text()))
    _, refused = manifest.newest_complete(folder, run.mesh.checkpoint_group)
    Saver(folder, run.engine, run.task, run.mesh, keep=1, refused=refused).save(step, {})
    return manifest.newest_complete(folder)[0].name


def test_hidden_shard_is_detected(run: Path) -> None:
    """torch's reader accepts every file with the ending of a shard."""
    older, newest = manifest.require_checkpoints(run)
    shutil.copy(shard(newest), newest / ".x.safetensors")
    (newest / ".nfs0001").write_text("a file system's own")
    got, refused = manifest.newest_complete(run)
    assert got == older and ".x.safetensors is not in manifest.sha256" in refused[newest]
    (newest / ".x.safetensors").unlink()
    assert manifest.newest_complete(run) == (newest, {})


@pytest.mark.timeout(90)
def test_async_save_completes_after_an_exception(small_text: Path, tmp_path: Path) -> None:
    assert run_distributed(save_and_raise, 1, str(small_text), tmp_path, timeout=60) == [
        "step_00000001"
    ]


def save_and_raise(text: str, folder: Path) -> str:
    meshes.init_process_group()
    run = Run(tiny(f"data.text={text}")).steps(0, 1)
    honest: Callable[..., Any] = dcp.save

    def late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(1)
        return honest(*args, **kwargs)

    dcp.save = late
    with (
        pytest.raises(FloatingPointError),
        Saver(folder, run.engine, run.task, run.mesh, in_background=True) as saver,
    ):
        saver.save(1, {})
        raise FloatingPointError
    return manifest.newest_complete(folder)[0].name


@pytest.mark.timeout(150)
def test_without_a_complete_checkpoint_one_line_and_no_writes(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in manifest.require_checkpoints(run):
        cut(next(path.glob("*.safetensors")), random.Random(0))
    before = contents(run)
    for option in ("--resume", "--evaluate"):
        status, _, stderr = train_forked(option, str(run), "--set", "steps=3")
        assert status == 2
        check_one_line(stderr, "no complete checkpoint to continue from")
    assert contents(run) == before
    with pytest.raises(SystemExit) as exit_:
        generate.main([str(run)])
    check_one_line(capsys.readouterr().err, "no complete checkpoint to continue from")
    assert exit_.value.code == 2


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def seal(path: Path) -> None:
    """Writes a manifest that makes the checkpoint look complete, as an attacker can."""
    names = sorted(
        each.name for each in path.iterdir() if each.name not in (manifest.NAME, ".metadata")
    )
    (path / manifest.NAME).write_text(
        "".join(f"{manifest.checksum(path / name)}  {name}\n" for name in names)
    )


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    "names", [["shard"], ["state.json"], [".metadata", "__0_0.distcp", "x.pt", "x.pkl"]]
)
def test_hostile_checkpoint_executes_nothing(
    names: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "mark"
    payload = pickle.dumps(Payload(mark))
    shutil.rmtree(manifest.require_checkpoints(run)[0])
    (path,) = manifest.require_checkpoints(run)
    for name in names:
        (next(path.glob("*.safetensors")) if name == "shard" else path / name).write_bytes(payload)
    seal(path)
    harmless = "x.pt" in names  # files that nobody reads
    status, _, stderr = train_forked("--resume", str(run), "--set", "steps=3")
    assert status == (0 if harmless else 2), stderr
    assert harmless or stderr.count("\n") == 1, stderr
    assert command.main(["inspect", str(path)]) == (0 if harmless else 2)
    assert "error: " in capsys.readouterr().err or harmless
    assert not mark.exists()
    pickle.loads(payload)
    assert mark.exists(), "the payload was no payload"


def rewrite(shard: Path, change: Callable[[dict[str, torch.Tensor], Any], None]) -> None:
    """Gives a shard other tensors, or other offsets in the whole ones."""
    with safe_open(shard, "pt") as opened:
        metadata = opened.metadata()
    tensors, places = load_file(shard), json.loads(metadata["DCP_SHARDING_INFO"])
    change(tensors, places)
    save_file(tensors, shard, metadata | {"DCP_SHARDING_INFO": json.dumps(places)})


W1 = "experts/middle.experts.w1_eDF"
FOREIGN: dict[str, Callable[[Path], object]] = {
    "deep": lambda path: (path / "state.json").write_text("[" * 200_000),
    "before the first step": lambda path: (path / "state.json").write_text(
        '{"step": -5, "updates": 0, "previous_norm": 1.0}'
    ),
    "no norm": lambda path: (path / "state.json").write_text(
        '{"step": 2, "updates": 2, "previous_norm": NaN}'
    ),
    "far away": lambda path: rewrite(
        shard(path), lambda t, at: at[W1]["saved_offsets"].__setitem__(0, 10**13)
    ),
    "negative": lambda path: rewrite(
        shard(path), lambda t, at: at[W1]["saved_offsets"].__setitem__(0, -3)
    ),
    "hole": lambda path: rewrite(
        shard(path),
        lambda t, at: (
            t.update({W1: t[W1][4:].contiguous()}) or at[W1]["saved_offsets"].__setitem__(0, 4)
        ),
    ),
    "list": lambda path: rewrite(shard(path), lambda t, at: at.clear()),
}


def shard(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


@pytest.mark.parametrize("spoil", FOREIGN.values(), ids=FOREIGN)
def test_impossible_sealed_checkpoint_prints_one_line(
    spoil: Callable[[Path], object], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = manifest.require_checkpoints(run)[-1]
    spoil(path)
    seal(path)
    for args in (["inspect", str(path)], ["export", str(path), str(tmp_path / "x")]):
        assert command.main(args) == 2
        check_one_line(capsys.readouterr().err, str(path))
    assert not (tmp_path / "x").exists()


@pytest.mark.timeout(100)
@pytest.mark.parametrize("background", ["false", "true"])
def test_full_disk_is_reported_and_training_continues(background: str, run: Path) -> None:
    # no file above 190 kB, as if the disk were full: pictures fit, checkpoints do not
    limit = "ulimit -f 190; exec "
    sets = set_("steps=5", "write_report=true", f"async_save={background}")
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--resume",
        str(run),
        *sets,
    ]
    before = contents(run / "checkpoints")
    done = subprocess.run(
        ["bash", "-c", limit + '"$@"', "-", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, "the last checkpoint is missing"
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    assert all("cannot be written (" in line for line in warnings), done.stderr
    assert len(warnings) == 4 and "report.html" in warnings[-1], "three checkpoints and the page"
    assert not list(run.glob("partial_*"))
    assert "test perplexity" in done.stdout and "step 5/5" in done.stderr
    assert contents(run / "checkpoints") == before


@pytest.mark.timeout(150)
def test_sigterm_to_one_rank_saves_and_ends_all_ranks(small_text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sets = set_(
        *TINY,
        "steps=100000",
        "eval_every=100000",
        "save_every=100000",
        f"data.text={small_text}",
        "mesh.ep=2",
    )
    world = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(rendezvous_port.find_free_port()),
    }
    both = [
        start(
            "lstm_moe_demo",
            "--folder",
            str(run),
            *sets,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **world,
        )
        for rank in range(2)
    ]
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_text():
        assert both[0].poll() is None
        time.sleep(0.01)
    both[1].send_signal(signal.SIGTERM)
    told, stderr = both[0].communicate(timeout=60)
    assert both[0].returncode == 143 and "Traceback" not in stderr, stderr
    assert end(both[1])[0] == 143
    newest, refused = manifest.newest_complete(run)
    step = read_state(newest)["step"]
    assert (
        not refused
        and f"stopped after step {step} of 100000: train.py --resume {run} goes on" in told
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, step + 1))
    status, _, stderr = train_forked("--resume", str(run), "--set", f"steps={step + 1}")
    assert status == 0, stderr


@pytest.mark.timeout(120)
def test_async_checkpoint_has_the_state_of_its_step(small_text: Path, tmp_path: Path) -> None:
    for expert_form in ("factored_adam", "adam"):
        same = run_distributed(
            save_beside, 2, str(small_text), tmp_path / expert_form, expert_form, timeout=100
        )
        assert same == [True, True]


def save_beside(text: str, folder: Path, expert_form: str) -> bool:
    """Saves slowly while three more steps change everything; returns whether the same three
    steps follow from the checkpoint."""
    meshes.init_process_group()
    config = tiny(
        "mesh.ep=2", "zero_stage=1", f"data.text={text}", f"optim.expert_optimizer={expert_form}"
    )
    whole = Run(config).steps(0, 3)
    saver = Saver(folder, whole.engine, whole.task, whole.mesh, in_background=True)
    honest: Callable[..., Any] = dcp.save
    released: list[bool] = []

    def late(*args: Any, **kwargs: Any) -> Any:
        while not released:
            time.sleep(0.01)
        return honest(*args, **kwargs)

    dcp.save = late
    saver.save(3, {})
    whole.steps(3, 6)
    released.append(True)
    saver.finish()
    again = Run(config)
    again.load(folder)
    again.steps(3, 6)
    expected, got = whole.weights(), again.weights()
    meshes.shutdown()
    return again.losses == whole.losses[3:] and all(
        torch.equal(expected[k], got[k]) for k in expected
    )


def test_inspect_and_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.safetensors"
    assert command.main(["inspect", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["updates"]) == (2, 2)
    w1 = told["weights"]["middle.experts.w1_eDF"]
    # 8 experts of 16 x 24: a row mean for each of 16, a column mean for each of 24
    assert w1 == {
        "kind": "experts",
        "shape": [8, 16, 24],
        "optimizer": {".row": [8, 16], ".column": [8, 24]},
    }
    assert told["task"]["lstm0.h"] == {"shape": [8, 16]}
    assert command.main(["inspect", str(run)]) == 0
    assert "middle.experts.w1_eDF" in capsys.readouterr().out

    assert command.main(["export", str(run), str(file)]) == 0
    assert (
        f"{sum(t.numel() for t in load_file(file).values()):,} parameters"
        in capsys.readouterr().out
    )
    model = TextModel(run).model
    read = {name: t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(load_file(file), strict=True)
    assert all(torch.equal(read[name], t) for name, t in model.state_dict().items())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["step"] == "2" and from_json(metadata["config"]).model.dim == 16
    assert len(json.loads(metadata["vocabulary"])["words"]) == 300

    before = contents(tmp_path)
    for args, says in (
        (["export", str(run), str(file)], f"{file} exists"),
        (["export", str(run), str(tmp_path / "no" / "x")], "cannot be written"),
        (["inspect", str(run.parent / "none")], "neither a run folder nor a checkpoint"),
        (["inspect", str(tmp_path / "no")], "neither a run folder nor a checkpoint"),
    ):
        assert command.main(args) == 2
        check_one_line(capsys.readouterr().err, says)
    assert contents(tmp_path) == before
