"""Run folders that are damaged or come from someone else: each is read, or refused with one line.

    .venv/bin/python experiments/hostile.py                  seeds 0 to 1000, some minutes; status 1 where one is off
    .venv/bin/python experiments/hostile.py --first 17 --last 18

A seed makes one folder: a whole one, of a language model or of classes of sentences, with a link, a
pipe, a folder for a file or the reverse, or with damage to its texts, or to a checkpoint that is
sealed again: to its state, to what its task keeps there (vocabulary, tokens, classes, pairs), or to
its tensors. It is planned to go on and to be evaluated, its task is built from what it kept, and it
is claimed, written to, used, exported and drawn. It is off where an exception is raised that is not
a user's mistake, where something outside the folder changes, or where it takes 60 seconds.
`tests/cli/test_hostile_runs.py` runs some seeds, `damaged_files.py` is for data.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from moe_dist.checkpoint import __main__ as command
from moe_dist.checkpoint import manifest
from moe_dist.checkpoint.format import TASK_METADATA_CHECKS, read_state
from moe_dist.checkpoint.sealed_config import read_config
from moe_dist.config.overrides import dotted_keys, from_json, to_json
from moe_dist.config.schema import LSTMConfig
from moe_dist.distributed.batch_layout import make_batch_layout
from moe_dist.distributed.flight_recorder import FlightRecorder
from moe_dist.inference import generate
from moe_dist.inference.classify import Classifier, classify
from moe_dist.inference.load import TextModel
from moe_dist.monitoring.metrics_logger import MetricsLogger
from moe_dist.report import files as report_files
from moe_dist.tasks import language_model, text_base
from moe_dist.tasks.registry import task_of
from moe_dist.training.run_directory import RunDirectory
from moe_dist.training.run_spec import parse_run
from moe_dist.training.setup import check_classes

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60
NAMES = (
    "config.json",
    "layout.json",
    "metrics.jsonl",
    "lock",
    "report",
    "report.html",
    "checkpoints",
    "wandb",
    "calls",
    "profile",
    "partial_config.json",
    "report/loss.png",
    "checkpoints/partial_step_00000003",
)
INNER = ("state.json", "config.json", "manifest.sha256", "shard")
# in place of what a task keeps, or of a part of it
VALUES: tuple[Any, ...] = (
    5,
    -1,
    0.5,
    True,
    None,
    "",
    "x",
    "\ud800",
    [],
    {},
    [1, 2],
    ["a"],
    ["a", "a"],
    ["\ud800"],
    [["a"]],
    ["a"] * 2000,
    {"a": 1},
    {"words": [1], "counts": ["a"]},
    {"words": "ab", "counts": "cd"},
    10**400,
    2**63,
    "[1]",
    "{}",
    "[" * 9999,
)
JSON = (
    "[" * 100_000,
    '{"a":' * 5_000,
    "9" * 400,
    '{"step": 1e999, "name": "\\ud800"}',
    '"\\ud800"',
    "\x00\xff",
    "[]",
)


def contents(folder: Path) -> dict[str, Any]:
    """Returns what is in a folder, links not followed."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def seal(checkpoint: Path) -> None:
    """Writes a manifest of the files that are there now, as a stranger would."""
    names = sorted(
        path.name for path in checkpoint.iterdir() if path.is_file() and path.name != manifest.NAME
    )
    lines = [f"{manifest.checksum(checkpoint / name)}  {name}\n" for name in names]
    (checkpoint / manifest.NAME).write_text("".join(lines))


def _clear(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)


def _any_file(run: Path, chance: random.Random) -> Path:
    """Of the run folder or its newest checkpoint."""
    newest = manifest.list_checkpoints(run)[-1]
    name = chance.choice([*NAMES, *INNER])
    if name == "shard":
        return next(newest.glob("*.safetensors"))
    return newest / name if name in INNER and chance.random() < 0.7 else run / name


def link(run: Path, outside: Path, chance: random.Random) -> str:
    path = _any_file(run, chance)
    _clear(path)
    path.symlink_to(outside / chance.choice(["victim", "missing", "."]))
    return f"link {path}"


def pipe(run: Path, outside: Path, chance: random.Random) -> str:
    path = _any_file(run, chance)
    _clear(path)
    os.mkfifo(path)
    return f"pipe {path}"


def swap(run: Path, outside: Path, chance: random.Random) -> str:
    """A folder in place of a file, or the reverse."""
    path = _any_file(run, chance)
    folder = path.is_dir()
    _clear(path)
    if folder:
        path.write_text("no folder")
    else:
        path.mkdir()
    return f"swap {path}"


def text(run: Path, outside: Path, chance: random.Random) -> str:
    path = run / chance.choice(["config.json", "layout.json", "metrics.jsonl"])
    written = chance.choice(JSON)
    path.write_bytes(written.encode(errors="surrogatepass") + b"\n")
    return f"{path}: {written[:30]!r}"


def state(run: Path, outside: Path, chance: random.Random) -> str:
    """Of a sealed checkpoint."""
    checkpoint = manifest.list_checkpoints(run)[-1]
    path = checkpoint / chance.choice(["state.json", "config.json"])
    value: Any = chance.choice([*JSON, "step", "vocabulary"])
    if value in ("step", "vocabulary"):
        value = json.dumps(
            json.loads(path.read_text())
            | {value: chance.choice([-1, 7, "\ud800", None, [1], 10**400])}
        )
    path.write_bytes(value.encode(errors="surrogatepass"))
    seal(checkpoint)
    return f"{path}: {value[:30]!r}"


def kept(run: Path, outside: Path, chance: random.Random) -> str:
    """What a task keeps, in a sealed checkpoint: all of it, or one of its parts."""
    checkpoint = manifest.list_checkpoints(run)[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    key = chance.choice(
        [*TASK_METADATA_CHECKS, *(key for key in TASK_METADATA_CHECKS if key in state)]
    )
    if key in state and chance.random() < 0.1:
        state.pop(key)
    else:
        state[key] = _changed(state.get(key), chance)
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint)
    return f"{key}={state.get(key, 'none')!r:.80}"


def _changed(value: Any, chance: random.Random) -> Any:
    """Returns a JSON value with another one in place of it, or of one of its parts; or with one
    part less, or more.
    """
    if (
        isinstance(value, str) and value[:2] == '["' and chance.random() < 0.7
    ):  # tokens: JSON in JSON
        return json.dumps(_changed(json.loads(value), chance))
    if not isinstance(value, dict | list) or not value or chance.random() < 0.2:
        return chance.choice(VALUES)
    places = (
        list(value)
        if isinstance(value, dict)
        else [0, 1, len(value) // 2, len(value) - 1][: len(value)]
    )
    place, changed = chance.choice(places), value.copy()
    how = chance.random()
    if how < 0.15:
        del changed[place]
    elif how < 0.3 and isinstance(changed, list):
        changed.append(changed[place])
    else:
        changed[place] = _changed(value[place], chance)
    return changed


def tensor(run: Path, outside: Path, chance: random.Random) -> str:
    """Of a sealed checkpoint: a value, a dtype, a shape, a place, or bytes of the file."""
    checkpoint = manifest.list_checkpoints(run)[-1]
    shard = next(checkpoint.glob("*.safetensors"))
    with safe_open(shard, "pt") as opened:
        metadata = opened.metadata()
    tensors, places = load_file(shard), json.loads(metadata["DCP_SHARDING_INFO"])
    name = chance.choice(
        sorted(key for key in tensors if tensors[key].dim() and tensors[key].is_floating_point())
    )
    how = chance.choice(["nan", "dtype", "shape", "place", "bytes", "twice"])
    if how == "nan":
        tensors[name].view(-1)[0] = torch.nan
    elif how == "dtype":
        tensors[name] = tensors[name].to(chance.choice([torch.float64, torch.int8, torch.bfloat16]))
    elif how == "shape":
        tensors[name] = tensors[name][..., :1].contiguous()
    elif how == "place":
        places[name]["saved_offsets"] = chance.choice([[10**15], "x", [-1, 0], [None], {}, [1] * 9])
    elif how == "twice":
        shutil.copy(shard, checkpoint / "shard-2.safetensors")
    save_file(tensors, shard, metadata | {"DCP_SHARDING_INFO": json.dumps(places)})
    if how == "bytes":
        data = bytearray(shard.read_bytes())
        for _ in range(20):
            data[chance.randrange(len(data) // 8)] = chance.randrange(256)
        shard.write_bytes(data)
    seal(checkpoint)
    return f"{how} of {name}"


SPOILS: list[Callable[[Path, Path, random.Random], str]] = [
    link,
    pipe,
    swap,
    text,
    state,
    tensor,
    kept,
]


def try_all(seed: int, run: Path, draws: bool = False) -> str:
    """Damages a run folder as the seed has it, and uses it in every way.

    Args:
        seed: The seed.
        run: A whole run folder, beside which a folder `outside` is made.
        draws: The report is drawn, too, which takes a second.

    Returns:
        The damage, and everything that was printed.

    Raises:
        AssertionError: Something outside the run folder changed, or an error is more than one line.
        Exception: Any that is not a user's mistake.
    """
    outside = run.parent / "outside"
    outside.mkdir()
    (outside / "victim").write_text("precious")
    config = from_json((run / "config.json").read_text())
    told = SPOILS[seed % len(SPOILS)](run, outside, random.Random(seed))
    before = contents(outside)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        for args in (["--resume", str(run), "--set", "steps=9"], ["--evaluate", str(run)]):
            errors = io.StringIO()
            try:
                with contextlib.redirect_stderr(errors):
                    parse_run(args, None)
            except SystemExit as exit_:
                lines = [
                    line for line in errors.getvalue().splitlines() if not line.startswith("note: ")
                ]
                assert exit_.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (
                    told,
                    lines,
                )
        with contextlib.suppress(ValueError, OSError):
            _write(RunDirectory(run, {"config.json": to_json(config), "layout.json": "{}"}))
        with contextlib.suppress(ValueError):
            build_task(run)
        with contextlib.suppress(ValueError):
            use(run)
        for args in (
            ["inspect", str(run)],
            ["export", str(run), str(run / "exported.safetensors")],
        ):
            assert command.main(args) in (0, 2), told
        if draws:
            report_files.try_to_write_all(run)
    assert contents(outside) == before, told
    assert "Traceback" not in printed.getvalue(), told
    return f"{told}\n{printed.getvalue()}"


def build_task(run: Path) -> None:
    """Builds the task of a run that goes on from its data and what its checkpoint kept, as
    `training.set_up` does, and tells a result, as the run's end does. There is one rank and no
    process group.

    Raises:
        ValueError: As a user sees it.
    """
    config, _ = read_config(run)
    saved = read_state(manifest.newest_complete(run)[0])
    mesh: Any = SimpleNamespace(
        dp=SimpleNamespace(index=0, size=1), device=torch.device("cpu"), is_main=True
    )
    alone = {"run_on_main": lambda make: make()}
    with mock.patch.multiple(language_model, **alone), mock.patch.multiple(text_base, **alone):
        task = task_of(config)(
            config, make_batch_layout(config, 1), mesh, saved, dotted_keys(config)
        )
    check_classes(saved.get("classes"), task.checkpoint_metadata().get("classes"))
    task.format_result({"test/loss": 1.0, "test/perplexity": 3.0, "test/accuracy": 0.5})


def use(run: Path) -> None:
    """Continues a text by the run, or tells its classes. Raises ValueError as a user sees it."""
    if isinstance(read_config(run)[0].model, LSTMConfig):
        args = generate.command_line([str(run), "--prompt", "the end", "--words", "2"])
        reader = TextModel(run)
        generate.show_continuation(reader, generate.open_text(reader, args), args)
    else:
        classifier = Classifier(run)
        print(*classify(classifier, ["the end\tof it" if classifier.pairs else "the end"], 3))


def _write(run: RunDirectory) -> None:
    """Writes what a run writes that goes on, but for a checkpoint."""
    run.claim()
    folder = run.path
    try:
        manifest.remove_partial(folder)
        with (
            FlightRecorder().recording(folder, 60.0),
            MetricsLogger(
                folder,
                {},
                enabled=True,
                wandb_mode="off",
                total_steps=9,
                start_step=2,
                restore=run.restore,
            ) as metrics,
        ):
            metrics.log(3, {"train/loss": 1.0})
        for checkpoint in manifest.list_checkpoints(folder):
            manifest.remove(checkpoint)
            break
    finally:
        assert run.lock
        run.lock.close()


def whole_run(folder: Path) -> Path:
    """Trains a small language model for two steps, and returns its run folder."""
    lines = [f"{i} and so on, and on to {i * i}, then {i % 7} is the end of it" for i in range(600)]
    (folder / "text.txt").write_text("\n".join(lines))
    return _trained(
        folder / "whole",
        "lstm_moe_demo",
        "model.dim=16",
        "data.vocabulary_size=50",
        "model.moe.num_experts=8",
        "model.moe.k=2",
        "model.moe.expert_hidden_dim=24",
        "batch.global_batch_size=8",
        "batch.seq_len=6",
        "batch.balance_loss_group_size=4",
        f"data.text={folder / 'text.txt'}",
    )


def whole_run_of_classes(folder: Path) -> Path:
    """Trains a small classifier of sentences for two steps, and returns its run folder."""
    rows = [
        f"{i} and so on to the end of {i * i},{('bad', 'fair', 'good')[i % 3]}" for i in range(120)
    ]
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows]))
    return _trained(
        folder / "classes",
        "widenet_text_demo",
        "model.encoder.dim=16",
        "model.encoder.num_heads=2",
        "model.encoder.depth=2",
        "model.encoder.moe.expert_hidden_dim=24",
        "model.embedding_dim=16",
        "model.max_tokens=24",
        "batch.global_batch_size=8",
        f"data.sentences={folder / 'rows.csv'}",
    )


def _trained(run: Path, name: str, *sets: str) -> Path:
    always = (
        "steps=2",
        "save_every=1",
        "log_every=1",
        "write_report=false",
        "wandb.mode=off",
        "baseline=none",
    )
    options = [part for each in (*always, *sets) for part in ("--set", each)]
    program = [sys.executable, str(ROOT / "train.py"), name, "--folder", str(run), *options]
    subprocess.run(program, check=True, capture_output=True)
    return run


class TooLongError(BaseException):
    """No handler of the program's takes it for an error of its own."""


def _too_long(*_: Any) -> None:
    raise TooLongError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=1000)
    parser.add_argument(
        "--draw", type=int, default=10, help="draws the report of every so many folders"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, _too_long)
    off = 0
    with tempfile.TemporaryDirectory() as folder:
        wholes = whole_run(Path(folder)), whole_run_of_classes(Path(folder))
        for seed in range(args.first, args.last):
            place = Path(folder) / str(seed)
            run = Path(shutil.copytree(wholes[seed // len(SPOILS) % len(wholes)], place / "run"))
            signal.alarm(SECONDS)
            try:
                try_all(seed, run, seed % args.draw == 0)
            except (Exception, TooLongError) as error:
                off += 1
                print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            finally:
                signal.alarm(0)
            shutil.rmtree(place)
    print(f"{args.last - args.first} folders, {off} off")
    sys.exit(off > 0)


if __name__ == "__main__":
    main()
