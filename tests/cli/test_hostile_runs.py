"""Damaged or hostile run folders: one line, no change outside the folder, no hang."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from processes import check_one_line, check_plan, set_, train_forked
from runs import TINY, Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from experiments.hostile import (
    SPOILS,
    build_task,
    contents,
    kept,
    seal,
    try_all,
    use,
    whole_run_of_classes,
)
from moe_dist.checkpoint import __main__ as command
from moe_dist.checkpoint import manifest
from moe_dist.checkpoint.format import read_state, tensor_index
from moe_dist.checkpoint.loader import load, load_matching_weights
from moe_dist.checkpoint.saver import Saver
from moe_dist.checkpoint.sealed_config import read_config
from moe_dist.checkpoint.single_process import load_weights
from moe_dist.config import run_folder
from moe_dist.config.overrides import from_json, override, to_json
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.spawn import run_distributed
from moe_dist.inference import classify, generate
from moe_dist.monitoring.metrics_logger import MetricsLogger
from moe_dist.report import files as report_files
from moe_dist.report import plots
from moe_dist.tasks.registry import task_of
from moe_dist.training.run_directory import RunDirectory, acquire, open_lock


@pytest.mark.timeout(200)
@pytest.mark.parametrize("seed", range(40))
def test_hostile_run_folder_prints_one_line_and_touches_nothing_outside(
    seed: int, run: Path
) -> None:
    try_all(seed, run)


@pytest.fixture(scope="session")
def good_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run_of_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture
def of_classes(good_classes: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good_classes, tmp_path / "of_classes")


@pytest.mark.timeout(200)
@pytest.mark.parametrize("seed", [SPOILS.index(kept) + len(SPOILS) * i for i in range(20)])
def test_hostile_state_of_a_classifier_prints_one_line(seed: int, of_classes: Path) -> None:
    try_all(seed, of_classes)


def test_intact_run_is_loaded_and_used(run: Path, of_classes: Path) -> None:
    """Without this the seeds of hostile runs prove nothing."""
    for each in (run, of_classes):
        build_task(each)
        use(each)


WORDS = {"words": ["<unk>", "<eos>", "a"], "counts": [0, 2, 7]}
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
GOOD: list[dict[str, Any]] = [
    {"previous_norm": 1.2e16},
    {"previous_norm": 1.7e308},
    {"previous_norm": 5e-324},
    {"step": 2**40},
    {"vocabulary": WORDS},
    {"vocabulary": WORDS | {"counts": [2**52, 1, 2]}},
    {"tokens": json.dumps(TOKENS)},
    {"classes": []},
    {"classes": ["\u0928\u092e", "b"], "pairs": True},
    {"wandb_id": None},
    {"wandb_id": "a\nb"},
]
BROKEN: list[dict[str, Any]] = [
    {"previous_norm": float("inf")},
    {"previous_norm": -1.0},
    {"previous_norm": 3},
    {"step": True},
    {"step": 2**54},
    {"updates": 2.0},
    {"updates": 10**9},
    *(
        {"vocabulary": value}
        for value in (5, None, ["a"], {}, {"words": 5, "counts": 6}, WORDS | {"more": []})
    ),
    *(
        {"vocabulary": WORDS | {"counts": counts}}
        for counts in (
            ["a", 1, 2],
            [10**400, 1, 2],
            [-1, 1, 2],
            [1.5, 1, 2],
            [True, 1, 2],
            [1, 2],
            "abc",
            [2**53, 2**53, 0],
        )
    ),
    *(
        {"vocabulary": WORDS | {"words": words}}
        for words in (
            [1, 2, 3],
            ["a", "b", "c"],
            ["<unk>", "<eos>"],
            ["<unk>", "<eos>", "<eos>"],
            ["<unk>", "<eos>", "\ud800"],
        )
    ),
    *(
        {"tokens": value}
        for value in (5, None, TOKENS, "5", "[1]", "[", json.dumps([*TOKENS, "\ud800"]))
    ),
    *({"classes": value} for value in (5, None, "ab", [1, 2], ["a", None], {"a": 1}, ["\ud800"])),
    *({"pairs": value} for value in (0, "true", None)),
    {"wandb_id": 5},
    {"wandb_id": ["a"]},
]


@pytest.mark.parametrize("change", GOOD, ids=str)
def test_valid_saved_state_is_read(change: dict[str, Any], tmp_path: Path) -> None:
    state = {"step": 2, "updates": 2, "previous_norm": 1.0} | change
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert read_state(tmp_path) == state


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: repr(change)[:60])
def test_invalid_saved_state_is_rejected_by_key(change: dict[str, Any], tmp_path: Path) -> None:
    state = {"step": 2, "updates": 2, "previous_norm": 1.0} | change
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(
        ValueError, match=rf"state\.json: damaged \(.*{next(iter(change))}.*use another"
    ):
        read_state(tmp_path)


def keep(run: Path, **changes: Any) -> None:
    """Changes the state of the newest checkpoint and seals it again. None removes a value."""
    checkpoint = manifest.require_checkpoints(run)[-1]
    state = json.loads((checkpoint / "state.json").read_text()) | changes
    (checkpoint / "state.json").write_text(
        json.dumps({key: v for key, v in state.items() if v is not None})
    )
    seal(checkpoint)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("command_", ["resume", "evaluate", "init"])
def test_invalid_saved_state_prints_one_line_before_any_work(
    command_: str, run: Path, small_text: Path, tmp_path: Path
) -> None:
    keep(run, classes=[1, 2])
    sets = set_("steps=3", f"data.text={small_text}")
    of = [
        "lstm_moe_demo",
        *set_(*TINY),
        *sets,
        *set_(f"init_from={run}"),
        "--folder",
        str(tmp_path / "new"),
    ]
    args = {
        "resume": ["--resume", str(run), *set_("steps=3")],
        "evaluate": ["--evaluate", str(run)],
        "init": of,
    }
    before = contents(run)
    status, _, stderr = train_forked(*args[command_])
    assert status == 2
    (line,) = [line for line in stderr.splitlines() if not line.startswith("note")]
    assert "state.json: damaged (classes=[1, 2] is not a value" in line
    assert contents(run) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": 5}, "damaged (tokens=5 is not a value"),
        ({"classes": 5}, "damaged (classes=5 is not a value"),
        ({"classes": None}, "has no classes, which a run of task=text_classification needs"),
        ({"tokens": None, "classes": None}, "has no tokens, classes, which"),
        ({"classes": list("abcdefgh")}, "has 8 classes, and model.num_classes of config.json is 3"),
        (
            {"tokens": json.dumps(TOKENS)},
            "has 6 tokens, and model.vocabulary_size of config.json is ",
        ),
    ],
)
def test_classifier_without_saved_tokens_or_classes_prints_one_line(
    changes: dict[str, Any], says: str, of_classes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(of_classes, **changes)
    with pytest.raises(SystemExit) as exit_:
        classify.main([str(of_classes), "--text", "the end"])
    assert exit_.value.code == 2
    check_one_line(capsys.readouterr().err, says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocabulary": WORDS | {"counts": ["a", 1, 2]}}, "damaged (vocabulary={"),
        ({"vocabulary": None}, "has no vocabulary, which a run of task=language_model needs"),
        ({"vocabulary": WORDS}, "has 3 words, and data.vocabulary_size of config.json is 300"),
    ],
)
def test_generate_without_saved_vocabulary_is_rejected(
    changes: dict[str, Any], says: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(run, **changes)
    with pytest.raises(SystemExit) as exit_:
        generate.main([str(run), "--prompt", "the"])
    assert exit_.value.code == 2
    check_one_line(capsys.readouterr().err, says)


def test_flipped_config_bit_is_detected_or_harmless(run: Path) -> None:
    chance, file = random.Random(0), run / "config.json"
    whole = file.read_bytes()
    told = {"refused": 0, "noted": 0, "same": 0}
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        file.write_bytes(flipped)
        try:
            config, note = read_config(run)
        except ValueError as error:
            assert str(error).startswith(f"{file} differs from the copy in step_00000002: ")
            told["refused"] += 1
        else:
            assert to_json(config).encode() == whole
            assert not note or note.startswith(f"{file}: ")
            told["noted" if note else "same"] += 1
    assert told["refused"] > 0 and told["noted"] > 0, told


def test_edited_config_is_rejected_by_field(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = from_json((run / "config.json").read_text())
    changed = override(config, ["optim.lr=0.5", "model.dim=32", "steps=7"])
    (run / "config.json").write_text(to_json(changed))
    for option in ("--resume", "--evaluate"):
        check_plan(
            [option, str(run)],
            "steps=7, not 2; model.dim=32, not 16; optim.lr=0.5, not 0.0001",
            capsys,
        )
    assert command.main(["export", str(run), str(run / "x")]) == 2
    check_one_line(capsys.readouterr().err, "model.dim=32, not 16")
    (run / "config.json").write_text(to_json(override(config, ["optim.lr=0.5"])))
    assert read_config(run, {"optim.lr"}) == (config, "")


@pytest.mark.parametrize("spoilt", [None, "{broken", "[]", "[" * 100_000])
def test_missing_or_broken_config_is_restored_from_the_checkpoint(
    spoilt: str | None, run: Path
) -> None:
    config, _ = read_config(run)
    (run / "config.json").unlink()
    if spoilt:
        (run / "config.json").write_text(spoilt)
    got, note = read_config(run)
    assert got == config and note.endswith("; using the copy in step_00000002")
    for checkpoint in manifest.require_checkpoints(run):  # as older versions saved them
        (checkpoint / "config.json").unlink()
        seal(checkpoint)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config(run)
    (run / "config.json").write_text(to_json(config))
    assert read_config(run) == (
        config,
        f"{run}: no checkpoint has a copy of config.json to compare it with",
    )


@pytest.mark.parametrize("step", [1, 20])
def test_step_different_from_the_folder_name_is_rejected(step: int, run: Path) -> None:
    checkpoint = manifest.require_checkpoints(run)[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"step": step, "updates": 1}))
    with pytest.raises(ValueError, match=f"has step {step}, but its folder is named step_00000002"):
        read_state(checkpoint)


def not_a_number(t: torch.Tensor) -> torch.Tensor:
    t.view(-1)[-1] = torch.nan
    return t


def infinite(t: torch.Tensor) -> torch.Tensor:
    t.view(-1)[0] = -torch.inf
    return t


UNFIT: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "nan": (not_a_number, "contains NaN or infinity"),
    "infinity": (infinite, "contains NaN or infinity"),
    "float64": (torch.Tensor.double, "is torch.float64 and must be torch.float32"),
    "negative": (lambda t: t - 1, "contains negative numbers"),
    "shape": (lambda t: t[:-1], "has shape ("),
    "bfloat16": (torch.Tensor.bfloat16, "is torch.bfloat16 and must be torch.float32"),
}


@pytest.mark.timeout(300)
def test_unfit_values_are_neither_loaded_nor_saved(run: Path) -> None:
    """Every rank refuses them by name before the engine changes."""
    assert run_distributed(refuse_unfit, 2, run, timeout=280) == [[]] * 2


def refuse_unfit(folder: Path) -> list[str]:
    """Returns the cases that this rank did not refuse correctly."""
    meshes.init_process_group()
    config = from_json((folder / "config.json").read_text())
    fresh = Run(override(config, ["mesh.ep=2", "zero_stage=1"]))
    before, updates = fresh.weights(), fresh.optimizer.updates
    wrong = []
    good = manifest.require_checkpoints(folder)[-1]
    names = sorted(tensor_index(good))
    expert = next(name for name in names if name.endswith("w1_eDF"))
    dense = next(name for name in names if name.startswith("dense/") and "exp_avg" not in name)
    states = [
        next(name for name in names if name.endswith(ending))
        for ending in (".row", ".exp_avg", ".exp_avg_sq")
    ]
    pairs = [(name, "nan") for name in (expert, dense, *states)]
    pairs += [
        (states[0], "negative"),
        (states[1], "shape"),
        (expert, "bfloat16"),
        (dense, "float64"),
        (dense, "infinity"),
    ]
    for name, kind in pairs:
        change, says = UNFIT[kind]
        path = folder / "unfit" / name.replace("/", "_") / kind / good.name
        if fresh.mesh.is_main:
            shutil.copytree(good, path)
            change_tensor(path, name, change)
        fresh.mesh.checkpoint_group.barrier().wait()
        attempts: list[Callable[..., Any]] = [
            partial(load, path, fresh.engine, fresh.task, fresh.mesh)
        ]
        if name in (expert, dense):
            model = task_of(config).build_model(config).to_empty(device="cpu")
            attempts += [
                partial(load_matching_weights, path, fresh.engine, fresh.mesh),
                partial(load_weights, path, model),
            ]
        for attempt in attempts:
            try:
                attempt()
            except ValueError as error:
                wrong += (
                    []
                    if f"{name!r} {says}" in str(error)
                    else [f"{attempt.func} {name} {kind}: {error}"]
                )
            else:
                wrong.append(f"{attempt.func} {name} {kind} was taken")
    after = fresh.weights()
    wrong += [name for name in before if not torch.equal(before[name], after[name])]
    wrong += [] if fresh.optimizer.updates == updates else ["updates"]
    if not fresh.mesh.is_main:  # on one rank alone
        next(iter(fresh.optimizer.experts.values())).master.view(-1)[0] = torch.nan
    saver = Saver(folder, fresh.engine, fresh.task, fresh.mesh, keep=1)
    saver.save(3, {})
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    wrong += (
        [] if saver.failed and left == ["step_00000001", "step_00000002"] else [f"saved: {left}"]
    )
    meshes.shutdown()
    return wrong


def change_tensor(
    checkpoint: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    for shard in checkpoint.glob("*.safetensors"):
        with safe_open(shard, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(shard)
        if name in tensors:
            tensors[name] = change(tensors[name]).contiguous()
            save_file(tensors, shard, metadata)


@pytest.mark.parametrize(
    "moved", [(0, 2), (2, 4), (0, 0)]
)  # starts of two parts of four rows each, of eight in all
def test_overlapping_tensor_parts_are_rejected_by_name(
    moved: tuple[int, int], tmp_path: Path
) -> None:
    """(0, 4) is correct. The total number of rows is right in every case."""
    for starts in ((0, 4), moved):
        for i, first in enumerate(starts):
            places = {
                "dense/w": {"saved_offsets": [first, 0]},
                "dense/b": {"saved_offsets": [4 * i]},
            }
            tensors = {"dense/w": torch.zeros(4, 3), "dense/b": torch.zeros(4)}
            save_file(
                tensors, tmp_path / f"{i}.safetensors", {"DCP_SHARDING_INFO": json.dumps(places)}
            )
        if starts == (0, 4):
            assert set(tensor_index(tmp_path)) == {"dense/w", "dense/b"}
    with pytest.raises(ValueError, match="the parts of 'dense/w' overlap or leave a gap"):
        tensor_index(tmp_path)


def directory_of(run: Path, config: str) -> RunDirectory:
    return RunDirectory(run, {"config.json": config, "layout.json": "{}"})


@pytest.fixture
def opened(run: Path) -> Iterator[RunDirectory]:
    (run / "metrics.jsonl").unlink()
    whole = directory_of(run, (run / "config.json").read_text())
    whole.claim()
    yield whole
    assert whole.lock
    whole.lock.close()


GONE: dict[str, Callable[[Path], Any]] = {
    "removed": shutil.rmtree,
    "renamed": lambda run: run.rename(run.parent / "elsewhere"),
    "config.json": lambda run: (run / "config.json").unlink(),
    "lock": lambda run: (run / "lock").unlink(),
    "metrics.jsonl": lambda run: (run / "metrics.jsonl").unlink(),
}


@pytest.mark.parametrize("gone", GONE)
def test_removed_run_folder_is_written_again_during_training(
    gone: str, opened: RunDirectory, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (run / "config.json").read_text()
    with MetricsLogger(
        run, {}, enabled=True, wandb_mode="off", total_steps=9, restore=opened.restore
    ) as metrics:
        metrics.log(1, {"train/loss": 1.0})
        GONE[gone](run)
        metrics.log(2, {"train/loss": 2.0})
        metrics.log(3, {"train/loss": 3.0})
    assert (run / "config.json").read_text() == text and (run / "layout.json").exists()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    with open_lock(run) as lock, pytest.raises(ValueError, match="in use by a run"):
        acquire(lock, run, 0)
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warned) == (gone != "metrics.jsonl")
    assert all(
        f"{run}: " in line and " removed or renamed while it trains" in line for line in warned
    )


def test_folder_taken_by_another_run_is_left_alone(
    opened: RunDirectory, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MetricsLogger(
        run, {}, enabled=True, wandb_mode="off", total_steps=9, restore=opened.restore
    ) as metrics:
        shutil.rmtree(run)
        other = directory_of(run, "{}")
        other.claim()
        before = contents(run)
        metrics.log(1, {"train/loss": 1.0})
        metrics.log(2, {"train/loss": 2.0})
        assert contents(run) == before
    assert capsys.readouterr().err.count("in use by a run that has not ended") == 1
    assert other.lock
    other.lock.close()


@pytest.mark.parametrize("name", [*run_folder.SUBFOLDERS, "lock"])
def test_link_in_a_run_folder_is_rejected_before_any_work(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if (run / name).exists():
        shutil.move(run / name, tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    if name == "checkpoints":
        assert manifest.newest_complete(run)[0].name == "step_00000002", "it can be read"
    check_plan(["--resume", str(run), *set_("steps=3")], f"{run / name} is a link", capsys)
    assert (run / name).is_symlink()
    assert name in ("checkpoints", "lock", "calls") or not os.path.lexists(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "name", ["report", "report/loss.png", "report/partial_loss.png", "report.html"]
)
def test_report_is_not_written_through_a_link(
    name: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plots, "all_plots", lambda *_: {"loss": Figure()})
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("precious")
    run_folder.remove(run, name)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(outside / "victim" if "." in name else outside)
    if name == "report.html":
        run_folder.write(run, name, "a page")
    elif name == "report":
        with pytest.raises(OSError, match="report is a link"):
            report_files.write_report(run)
    else:
        (picture,) = report_files.write_report(run)
        assert picture.read_bytes().startswith(b"\x89PNG") and not picture.is_symlink()
    assert contents(outside) == {"victim": b"precious"}
