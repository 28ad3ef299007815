"""Config fields that a run takes from its data if the user has not set them; they are saved with
the config."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import check_plan, set_

from moe_dist.checkpoint.saver import Saver
from moe_dist.config.overrides import from_json, override, to_json, value_of
from moe_dist.config.schema import Config
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.spawn import run_distributed
from moe_dist.planner.microbenchmark import adopt_data_sizes
from moe_dist.training import run_spec
from moe_dist.training import setup as training_module
from moe_dist.training.results import result_lines
from moe_dist.training.resume import find_checkpoint
from moe_dist.training.setup import set_up
from moe_dist.training.step import train_step

DATA = {  # config -> the field that names its data
    "lstm_moe_demo": "data.text",
    "widenet_pretraining_demo": "data.text",
    "widenet_text_demo": "data.sentences",
    "widenet_squad": "data.questions",
    "widenet_demo": "data.images",
}
SMALL = [
    "model.encoder.dim=16",
    "model.encoder.num_heads=2",
    "model.encoder.depth=1",
    "model.encoder.moe.expert_hidden_dim=8",
]
QUIET = ["steps=2", "write_report=false", "wandb.mode=off"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes data of each kind: 300 lines with 12 words, 40 sentences of 3 labels, 40
    questions, 3 classes of images."""
    folder = tmp_path_factory.mktemp("own")
    lines = [" ".join(f"w{chr(97 + (i * j) % 12)}" for j in range(1, 9)) for i in range(1, 301)]
    (folder / "text.txt").write_text("\n".join(lines))
    rows = [{"text": f"{line} {i}", "label": "abc"[i % 3]} for i, line in enumerate(lines[:40])]
    (folder / "sentences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paragraphs = []
    for i, line in enumerate(lines[:40]):
        answer = {"text": line.split()[1], "answer_start": 3}
        paragraphs.append(
            {
                "context": f"{line} {i}",
                "qas": [{"id": str(i), "question": "which?", "answers": [answer]}],
            }
        )
    (folder / "questions.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    for split, size in (("train", 12), ("test", 2)):
        for label in ("cat", "dog", "eel"):
            (folder / "images" / split / label).mkdir(parents=True)
            for i in range(size):
                Image.fromarray(np.full((9, 9), 20 * i, np.uint8)).save(
                    folder / "images" / split / label / f"{i}.png"
                )
    return folder


def own(name: str, folder: Path, *more: str) -> list[str]:
    """Returns a command line that changes only the data and makes the model small."""
    files = {
        "data.text": "text.txt",
        "data.sentences": "sentences.jsonl",
        "data.questions": "questions.json",
        "data.images": "images",
    }
    key = DATA[name]
    small = (
        SMALL if name.startswith("widenet") else ["model.dim=16", "model.moe.expert_hidden_dim=8"]
    )
    return [name, *set_(f"{key}={folder / files[key]}", *small, *QUIET, *more)]


def begin(argv: list[str]) -> Any:
    """Does the first part of train.py: returns the run and its training after one step."""
    run = run_spec.parse_run(argv, None)
    mesh = meshes.build_mesh(1)
    training = set_up(
        run.config,
        run.ds_config,
        mesh,
        None,
        explicit=run.explicit_keys,
        on_config=run.print_changes,
    )
    for _ in train_step(training, 1):
        pass
    return run.with_config(training.config), training


@pytest.mark.timeout(200)
def test_every_task_trains_on_own_data_at_first_start(folder: Path) -> None:
    """Two ranks take the same values from the data."""
    one, other = run_distributed(first_starts, 2, folder, timeout=150)
    assert one == other
    taken = {
        name: {key: value for key, value in each.items() if key != "parameters"}
        for name, each in one.items()
    }
    # 12 words, <unk> and <eos>; pieces: 5 special ones, 13 letters and 10 digits with those that go
    # on with a word, ...
    assert taken["lstm_moe_demo"] == {"data.vocabulary_size": 14}
    assert taken["widenet_demo"]["model.num_classes"] == 3
    assert taken["widenet_text_demo"]["model.num_classes"] == 3
    for name in ("widenet_text_demo", "widenet_pretraining_demo", "widenet_squad"):
        assert 20 < taken[name]["model.vocabulary_size"] < 120
    for name, each in one.items():  # the layout that is kept is that of the model
        assert each["parameters"][0] == each["parameters"][1], name


def first_starts(folder: Path) -> dict[str, dict[str, Any]]:
    meshes.init_process_group()
    taken: dict[str, dict[str, Any]] = {}
    for name in DATA:
        run, training = begin(own(name, folder, "batch.global_batch_size=32"))
        engine_parameters = sum(
            p.numel() for p in training.task.build_model(training.config).parameters()
        )
        named = {key: value_of(run.config, key) for key in training.task.fields_from_data}
        taken[name] = named | {"parameters": (run.layout_report["parameters"], engine_parameters)}
        assert training.config == run.config == from_json(to_json(run.config))
    meshes.shutdown()
    return taken


@pytest.mark.parametrize(
    ("name", "larger"),
    [
        ("lstm_moe_demo", "data.vocabulary_size=9000"),
        ("widenet_text_demo", "model.num_classes=50"),
        ("widenet_demo", "model.channels=3"),
    ],
)
def test_model_too_large_for_its_data_is_rejected(
    name: str, larger: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_spec.parse_run(own(name, folder, "batch.global_batch_size=16"), None)
    needed = sum(run.layout_report["per_rank"]["memory_bytes"].values())
    monkeypatch.setattr(run_spec, "memory_per_rank", lambda: needed)
    run.print_changes(run.config)
    with pytest.raises(ValueError, match=r"^a rank needs .* GB and has .* GB"):
        run.print_changes(override(run.config, [larger]))


@pytest.mark.timeout(200)
def test_config_is_complete_before_the_model_is_built(folder: Path) -> None:
    assert run_distributed(refuse_all, 1, folder, timeout=120) == [
        ["data.vocabulary_size=14", "model.num_classes=3"]
    ]


def refuse_all(folder: Path) -> list[str]:
    """Returns the fields that refused runs had already taken from the data."""
    meshes.init_process_group()
    settled = []

    def refuse(key: str, config: Config) -> None:
        settled.append(f"{key}={value_of(config, key)}")
        raise ValueError("too large")

    def build(*_: Any) -> None:
        raise AssertionError("the model was built")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_module, "parallelize", build)
        for name, key in (
            ("lstm_moe_demo", "data.vocabulary_size"),
            ("widenet_text_demo", "model.num_classes"),
        ):
            run = run_spec.parse_run(own(name, folder, "batch.global_batch_size=16"), None)
            with pytest.raises(ValueError, match=r"^too large$"):
                set_up(
                    run.config, run.ds_config, meshes.build_mesh(1), on_config=partial(refuse, key)
                )
    meshes.shutdown()
    return settled


@pytest.mark.timeout(200)
def test_fields_taken_from_data_are_saved(folder: Path, tmp_path: Path) -> None:
    assert run_distributed(go_on, 1, folder, tmp_path / "run", timeout=120) == [True]


def go_on(folder: Path, run_folder: Path) -> bool:
    """The same command, --resume and --evaluate use the config that the first start saved."""
    meshes.init_process_group()
    command = own("widenet_text_demo", folder, "batch.global_batch_size=16")
    run, training = begin(command)
    run_folder.mkdir()
    (run_folder / "config.json").write_text(to_json(run.config))
    Saver(run_folder, training.engine, training.task, training.mesh).save(
        1, training.task.checkpoint_metadata()
    )
    for argv in (
        [*command, "--folder", str(run_folder), "--resume", "auto"],
        ["--resume", str(run_folder)],
        ["--evaluate", str(run_folder)],
    ):
        again = run_spec.parse_run(argv, None)
        assert again.config == run.config
        resume = find_checkpoint(again, training.mesh)
        resumed = set_up(
            again.config, again.ds_config, training.mesh, resume.metadata, resumed=True
        )
        assert resumed.config == run.config
    # weights and tokens of another run: their number is taken as well
    begun, _ = begin(own("widenet_pretraining_demo", folder, f"init_from={run_folder}"))
    assert begun.config.model.vocabulary_size == run.config.model.vocabulary_size
    try:
        begin(
            own(
                "widenet_pretraining_demo",
                folder,
                f"init_from={run_folder}",
                "model.vocabulary_size=60",
            )
        )
    except ValueError as error:
        assert (
            "model.vocabulary_size=60, but the run to continue (--resume) or to start from "
            "(init_from) has" in str(error)
        )
    else:
        raise AssertionError("another number of tokens was not refused")
    meshes.shutdown()
    return True


@pytest.mark.timeout(100)
def test_explicitly_set_field_is_not_taken_from_data(folder: Path) -> None:
    refused = run_distributed(refusals, 1, folder, timeout=90)[0]
    assert refused["data.vocabulary_size=15"].startswith(
        "data.vocabulary_size=15 does not fit 12 different words"
    )
    assert (
        "model.vocabulary_size=500 is more than this text fills"
        in refused["model.vocabulary_size=500"]
    )
    assert "model.vocabulary_size=9 is too small for the" in refused["model.vocabulary_size=9"]
    assert refused["model.num_classes=2"].endswith(
        "has 3 classes (a, b, c): leave it out, or set it to 3"
    )
    assert (
        "similar.jsonl' has labels that differ by case alone: Pos, pos" in refused["labels alike"]
    )
    assert refused["model.num_classes=4"] == "['1 of model.num_classes=4 are not in the data']"


def refusals(folder: Path) -> dict[str, str]:
    meshes.init_process_group()
    told = {}
    for name, assignment in (
        ("lstm_moe_demo", "data.vocabulary_size=15"),
        ("widenet_pretraining_demo", "model.vocabulary_size=500"),
        ("widenet_pretraining_demo", "model.vocabulary_size=9"),
        ("widenet_text_demo", "model.num_classes=2"),
        ("widenet_demo", "model.num_classes=4"),
    ):
        try:
            told[assignment] = str(
                begin(own(name, folder, assignment, "batch.global_batch_size=32"))[1].task.notes
            )
        except ValueError as error:
            told[assignment] = str(error)
    rows = [{"text": f"words {i}", "label": ("Pos", "pos", "neg")[i % 3]} for i in range(60)]
    similar = folder / "similar.jsonl"
    similar.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["widenet_text_demo", *set_(f"data.sentences={similar}", *SMALL, *QUIET)]
    told["labels alike"] = str(begin(argv)[1].task.notes)
    meshes.shutdown()
    return told


def test_too_few_classes_are_found_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_plan(own("widenet_demo", folder, "model.num_classes=2"), "has 3 classes", capsys)


@pytest.mark.timeout(100)
def test_measured_plan_takes_fields_from_data(folder: Path) -> None:
    config, _ = run_spec.named_config(
        "lstm_moe_demo", [f"data.text={folder / 'text.txt'}", "mesh.ep=4"]
    )
    taken = adopt_data_sizes(config, frozenset())
    assert taken.data.vocabulary_size == 14 and taken.mesh.ep == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "sets", "groups", "changed"),
    [
        ("lstm_moe_demo", ["batch.global_batch_size=16"], (16, 1), ["balance_loss"]),
        ("lstm_moe_demo", ["batch.global_batch_size=48"], (24, 1), ["balance_loss"]),
        ("lstm_moe_demo", ["batch.global_batch_size=128"], (32, 1), []),
        (
            "widenet_text_demo",
            ["batch.global_batch_size=12"],
            (12, 12),
            ["balance_loss", "capacity"],
        ),
        ("widenet_demo", ["batch.global_batch_size=7"], (7, 7), ["balance_loss", "capacity"]),
        (
            "widenet_demo",
            ["batch.global_batch_size=10", "batch.balance_loss_group_size=5"],
            (5, 10),
            ["capacity"],
        ),
        # what the user has set stays, and is refused where the layout is checked
        (
            "widenet_demo",
            ["batch.global_batch_size=10", "batch.capacity_group_size=4"],
            (10, 4),
            ["balance_loss"],
        ),
        # the whole batch is one, and the layout is no part of the result
        ("moe_32", ["batch.global_batch_size=24", "batch.grad_accum_steps=2"], (None, 1), []),
    ],
)
def test_group_sizes_follow_from_the_batch_size(
    name: str, sets: list[str], groups: tuple[int | None, int], changed: list[str]
) -> None:
    config, notes = run_spec.named_config(name, sets)
    assert (config.batch.balance_loss_group_size, config.batch.capacity_group_size) == groups
    assert [note.split("=")[0] for note in notes] == [
        f"batch.{group}_group_size" for group in changed
    ]


def test_dry_run_reads_no_data_and_reports_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for argv in (
        ["widenet_text_demo", *set_("data.sentences=no/such.csv")],
        ["widenet_text_demo", *set_("model.num_classes=2")],
        ["widenet_text_demo", *set_("model.num_classes=2", "model.vocabulary_size=90"), "--json"],
    ):
        with pytest.raises(SystemExit) as exit_:
            run_spec.parse_run([*argv, "--dry-run"], None)
        assert exit_.value.code == 0
        told.append(capsys.readouterr().out.splitlines()[-1])
    note = "note: --dry-run reads no data, from which a run takes"
    assert told[:2] == [
        f"{note} model.num_classes and model.vocabulary_size",
        f"{note} model.vocabulary_size",
    ]
    assert json.loads(told[2])["config"] == "widenet_text_demo"


@pytest.mark.parametrize(
    ("sets", "lines"),
    [
        (["data.text=mine.txt"], 0),
        (["steps=7"], 0),
        (["data.text=mine.txt", "baseline=lstm_moe_demo"], 1),
        ([], 4),  # a head, two arms, a command
    ],
)
def test_baseline_of_other_data_is_shown_only_if_named(sets: list[str], lines: int) -> None:
    config, _ = run_spec.named_config("lstm_moe_demo", sets)
    steps = config.steps
    named = any(text.startswith("baseline=") for text in sets)
    text = result_lines(config, Path("x"), "test perplexity 9.00", steps, steps, named)
    told = text.splitlines()
    assert len(told) == 2 + lines
    assert any("not comparable" in line for line in told) == (lines == 1)
