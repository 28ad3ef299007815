"""A trained run in use: the loaded model equals the trained one, and the printed tables are
correct."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from runs import Run, tiny

from moe_dist.config.overrides import to_json
from moe_dist.config.schema import Config
from moe_dist.data.text.corpus import open_text
from moe_dist.data.text.lanes import EOS, EOS_ID, UNK_ID
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.spawn import run_distributed
from moe_dist.inference import generate
from moe_dist.inference.expert_usage import expert_shares, top_contexts
from moe_dist.inference.generate import as_text, written
from moe_dist.inference.load import TextModel
from moe_dist.moe import hierarchical
from moe_dist.moe.gating import noisy_topk
from moe_dist.nn.init import uniform_parameter

RUNS = {
    "flat": (),
    "hierarchical": ("model.moe.num_groups=4",),
    "dense": ("model.middle_layer=ffn", "model.ffn_hidden_dim=48", "model.ffn_layers=2"),
    "projected": ("model.middle_layer=none", "model.lstm_units=24"),
    "sampled": ("model.softmax_samples=60",),
    "capacity": ("model.moe.capacity_factor=1",),
    "bf16": ("ds_config=bf16", "zero_stage=2"),
}
EP2 = {
    "flat_ep2": ("mesh.ep=2", "zero_stage=3"),
    "hierarchical_ep2": ("mesh.ep=2", "model.moe.num_groups=4"),
}
MOE = ["flat", "hierarchical", "capacity", "flat_ep2", "hierarchical_ep2"]


def config_of(name: str, text: str) -> Config:
    return tiny("optim.lr=1e-2", f"data.text={text}", *(RUNS | EP2)[name])


def train(names: list[str], text: str, folder: Path) -> dict[str, Any]:
    """Trains each config for twelve steps. Returns the trained model's result on the first
    window of the test split: nll, words, weights."""
    meshes.init_process_group()
    for module in (
        noisy_topk,
        hierarchical,
    ):  # gates that start at zero send all words alike after so few steps
        module.uniform_parameter = lambda *shape, bound: uniform_parameter(
            *shape, bound=bound or 1.0
        )
    told = {}
    for name in names:
        run = Run(config_of(name, text)).steps(0, 12)
        run.save(folder / name, 12, {"wandb_id": None} | run.task.checkpoint_metadata())
        (folder / name / "config.json").write_text(to_json(run.config))
        run.task.reset_state(next(iter(run.task.state[0]))[0].dtype)
        with torch.no_grad():
            (batch,) = run.task.batches(0, "test")
            _, sums, _ = run.task.loss(run.engine, batch, torch.ones(()))
        told[name] = (sums["nll"].item(), int(batch.ctx.valid_T.sum()), run.weights())
    meshes.shutdown()
    return told


@pytest.fixture(scope="module")
def trained(
    small_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Returns the folder of all runs, and by name the nats and words of the first window and
    the weights."""
    folder = tmp_path_factory.mktemp("runs")
    (told,) = run_distributed(train, 1, list(RUNS), str(small_text), folder, timeout=110)
    first, second = run_distributed(train, 2, list(EP2), str(small_text), folder, timeout=110)
    for name, (nll, words, weights) in first.items():
        told[name] = (nll + second[name][0], words + second[name][1], weights)
    return folder, told


def prompt(reader: TextModel, lines: int = 3) -> torch.Tensor:
    return as_text(
        list(open_text(reader.config.data.text, streamed=False)["test"])[:lines], reader.vocabulary
    ).word_T


@pytest.mark.timeout(300)  # the first test trains the runs
@pytest.mark.parametrize("name", [*RUNS, *EP2])
def test_loaded_model_equals_the_trained_one(
    name: str, trained: tuple[Path, dict[str, Any]]
) -> None:
    folder, told = trained
    nll, num_words, weights = told[name]
    reader = TextModel(folder / name)
    for key, p in reader.model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[key], rtol=0, atol=0, msg=key)
    # the test split's first window, lane after lane, a word at a time
    text = reader.vocabulary.encode(open_text(reader.config.data.text, streamed=False)["test"])
    lanes, steps = reader.config.batch.global_batch_size, reader.config.batch.seq_len
    lane_len = -(-(len(text) - 1) // lanes)
    total, count = 0.0, 0
    for lane in range(lanes):
        state = reader.initial_state()
        for i in range(lane * lane_len, min(lane * lane_len + steps, len(text) - 1)):
            log_probability_V, state = reader.read(torch.tensor([text[i]]), state)
            assert log_probability_V.exp().sum().item() == pytest.approx(1, abs=1e-5)
            total -= log_probability_V[text[i + 1]].item()
            count += 1
    assert count == num_words
    if name != "capacity":  # training and evaluation drop what is over capacity, reading does not
        # the bf16 run evaluates rounded weights
        assert math.exp(total / count) == pytest.approx(
            math.exp(nll / num_words), rel=0.02 if name == "bf16" else 1e-5
        )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["flat", "hierarchical", "dense", "capacity"])
def test_text_read_in_parts_gives_the_same_state(
    name: str, trained: tuple[Path, dict[str, Any]]
) -> None:
    reader = TextModel(trained[0] / name)
    word_T = prompt(reader)
    whole_V, after = reader.read(word_T, reader.initial_state())
    state = reader.initial_state()
    for part_T in (word_T[:1], word_T[1:20], word_T[20:21], word_T[21:]):
        log_probability_V, state = reader.read(part_T, state)
    torch.testing.assert_close(log_probability_V, whole_V)
    torch.testing.assert_close(state, after)
    alone_V, _ = reader.read(word_T[-1:], reader.initial_state())
    assert (alone_V - whole_V).abs().max() > 1e-2, "the words before make a difference"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MOE)
def test_recorded_assignments_reproduce_the_layer(
    name: str, trained: tuple[Path, dict[str, Any]]
) -> None:
    """A loop over the recorded experts and weights gives each word's output; the weights equal
    those of the gates."""
    reader = TextModel(trained[0] / name)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    layer = reader.model.middle
    layer.register_forward_hook(
        lambda module, args, result: seen.append((args[0].clone(), result[0].clone()))
    )
    word_T = prompt(reader, 40)
    visits = reader.expert_assignments(word_T)["middle"]
    x_TD, y_TD = (torch.cat(parts) for parts in zip(*seen, strict=True))
    moe = reader.config.model.moe
    assert visits.num_experts == moe.num_experts == 8 and len(word_T) > 512, "more than one window"
    assert visits.expert_TK.shape == (len(word_T), moe.k if moe.num_groups is None else moe.k**2)
    torch.testing.assert_close(visits.weight_TK.sum(1), torch.ones(len(word_T)))
    assert (visits.weight_TK.diff(dim=1) <= 0).all()
    assert (expert_shares(visits) > 0.02).sum() >= 4, "words go different ways"
    reader.read(word_T, reader.initial_state())  # all at once
    assert torch.equal(reader.recorders["middle"].assignments.expert_TK, visits.expert_TK)
    weights = {key: p.detach() for key, p in layer.named_parameters()}
    w1, w2 = (
        next(w for key, w in weights.items() if key.endswith(end)) for end in ("w1_eDF", "w2_eFD")
    )
    for t, x_D in enumerate(x_TD):
        expected = gate_weights(x_D, weights, moe.k)
        got = dict(zip(visits.expert_TK[t].tolist(), visits.weight_TK[t].tolist(), strict=True))
        assert got == pytest.approx({e: w for e, w in expected.items() if w > 0}, abs=1e-5)
        y_D = sum(weight * ((x_D @ w1[e]).relu() @ w2[e]) for e, weight in got.items())
        torch.testing.assert_close(y_D, y_TD[t], rtol=1e-4, atol=1e-5)


def gate_weights(x_D: torch.Tensor, weights: dict[str, torch.Tensor], k: int) -> dict[int, float]:
    """Returns Eqs. 3, 5 and 12 for one word: expert -> weight."""

    def top(logits: list[float]) -> dict[int, float]:
        chosen = sorted(range(len(logits)), key=lambda i: -logits[i])[:k]
        total = sum(math.exp(logits[i]) for i in chosen)
        return {i: math.exp(logits[i]) / total for i in chosen}

    first = top((x_D @ weights["gate.w_gate.w_DE"]).tolist())
    if "experts.w_gate.w_gDb" not in weights:
        return first
    w_gDb = weights["experts.w_gate.w_gDb"]
    inner = {group: top((x_D @ w_gDb[group]).tolist()) for group in first}
    return {g * w_gDb.shape[2] + i: first[g] * w for g, of in inner.items() for i, w in of.items()}


@pytest.mark.timeout(300)
def test_expert_shares_and_heaviest_words(trained: tuple[Path, dict[str, Any]]) -> None:
    reader = TextModel(trained[0] / "hierarchical")
    visits = reader.expert_assignments(prompt(reader, 20))["middle"]
    share_E = expert_shares(visits)
    assert share_E.shape == (8,) and share_E.sum().item() == pytest.approx(1, abs=1e-12)
    rows = list(zip(visits.expert_TK.tolist(), visits.weight_TK.tolist(), strict=True))
    for expert in range(8):
        of = [(w_K[e_K.index(expert)], t) for t, (e_K, w_K) in enumerate(rows) if expert in e_K]
        assert share_E[expert].item() == pytest.approx(len(of) / (4 * len(rows)), abs=1e-12)
        assert (
            top_contexts(visits, expert, 5) == sorted(of, key=lambda pair: (-pair[0], pair[1]))[:5]
        )


def text_of(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    generate.main([str(a) for a in args])
    return capsys.readouterr().out


@pytest.mark.timeout(300)
def test_low_temperature_is_greedy_and_a_seed_repeats(
    trained: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained[0] / "flat"
    reader = TextModel(run)
    cold = text_of(capsys, run, "--prompt", "And God", "--words", "12", "--temperature", "1e-6")
    assert cold == text_of(
        capsys, run, "--prompt", "And God", "--words", "12", "--top", "1", "--seed", "5"
    )
    words = ["And", "God"]
    log_probability_V, state = reader.read(
        as_text(["And God"], reader.vocabulary).word_T, reader.initial_state()
    )
    expected = "And God"
    for _ in range(12):
        log_probability_V[UNK_ID] = -math.inf
        index = int(log_probability_V.argmax())
        expected += written(words[-1], reader.vocabulary.words[index])
        words.append(reader.vocabulary.words[index])
        log_probability_V, state = reader.read(torch.tensor([index]), state)
    assert cold == expected + "\n"
    one, other = (text_of(capsys, run, "--words", "30", "--seed", seed) for seed in ("1", "2"))
    assert one == text_of(capsys, run, "--words", "30", "--seed", "1") != other
    both = text_of(capsys, run, "--words", "30", "--seed", "1", "--samples", "2")
    assert both.startswith(one + "\n") and both[len(one) + 1 :] != one


@pytest.mark.timeout(300)
def test_next_prints_the_most_probable_words(
    trained: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained[0] / "hierarchical"
    reader = TextModel(run)
    word_T = as_text(["And God said"], reader.vocabulary).word_T
    assert word_T[0] == EOS_ID
    log_probability_V, _ = reader.read(word_T, reader.initial_state())
    order = log_probability_V.argsort(descending=True).tolist()
    rows = [
        line.split()
        for line in text_of(capsys, run, "--prompt", "And God said", "--next", 7).splitlines()[1:]
    ]
    assert [word for _, word in rows] == [reader.vocabulary.words[i] for i in order[:7]]
    assert [float(p) for p, _ in rows] == pytest.approx(
        [math.exp(log_probability_V[i]) for i in order[:7]], abs=6e-5
    )
    rows = [
        line.split()
        for line in text_of(capsys, run, "--next", len(reader.vocabulary)).splitlines()[1:]
    ]
    assert sum(float(p) for p, _ in rows) == pytest.approx(1, abs=5e-5 * len(rows))


@pytest.mark.timeout(300)
def test_expert_tables_are_printed(
    trained: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, visited in (("flat", 2), ("hierarchical", 4)):
        lines = text_of(
            capsys, trained[0] / name, "--prompt", "And God\nsaid", "--experts"
        ).splitlines()
        assert [line.split()[0] for line in lines[1:]] == ["And", "God", EOS, "said"]
        for line in lines[1:]:
            weights = [float(w) for w in line.split()[2::2]]
            assert len(weights) == visited and sum(weights) == pytest.approx(1, abs=3e-3)
        table = text_of(capsys, trained[0] / name, "--specialisation", "--read", "300").splitlines()
        assert max(map(len, table)) <= 110
        heads = [line.split()[:2] for line in table[2:] if line[:14].strip()]
        assert sorted(int(expert) for expert, _ in heads) == list(range(8))
        assert sum(float(share.rstrip("%")) for _, share in heads) == pytest.approx(100, abs=0.05)
        assert heads == sorted(heads, key=lambda head: -float(head[1].rstrip("%")))
    lines = text_of(
        capsys, trained[0] / "flat", "--specialisation", "--only", "6", "1"
    ).splitlines()
    assert [int(line.split()[0]) for line in lines[2:-1] if line[:14].strip()] == [6, 1]
    assert lines[-1].startswith("6 more experts")


@pytest.mark.timeout(300)
def test_specialization_on_a_user_text(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.txt").write_text("In the Zeppelin, God.\n\nAnd so\n" + "more words\n" * 9)
    generate.main(
        [
            str(trained[0] / "flat"),
            "--specialisation",
            "--of",
            str(tmp_path / "own.txt"),
            "--read",
            "8",
        ]
    )
    told = capsys.readouterr()
    # <eos> In the Zeppelin , God . <eos> And so
    assert told.out.startswith("layer middle: 10 words, ")
    assert told.err.count("\n") == 1 and "<unk>: " in told.err and "Zeppelin" in told.err
    assert "the Zeppelin, God. / And" in told.out.replace("[", "").replace("]", "")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("missing", [], "not a run folder"),
        ("empty", [], "no checkpoint"),
        ("flat", ["--temperature", "0"], "--temperature 0 is out of range; use a positive number"),
        (
            "flat",
            ["--temperature", "-0.5"],
            "--temperature -0.5 is out of range; use a positive number",
        ),
        ("flat", ["--temperature", "nan"], "--temperature nan"),
        ("flat", ["--words", "0"], "--words 0 is out of range; use at least 1"),
        ("flat", ["--samples", "0"], "--samples 0"),
        ("flat", ["--next", "0"], "--next 0"),
        ("flat", ["--next", "301"], "the vocabulary has 300 words"),
        ("flat", ["--top", "300"], "--top 300 is out of range; use at most 299"),
        ("flat", ["--next", "3", "--experts"], "give one of them"),
        (
            "flat",
            ["--next", "3", "--words", "9"],
            "--words: an option of continuation, not of next",
        ),
        ("flat", ["--read", "9"], "--read: an option of specialisation"),
        ("flat", ["--experts"], "give a --prompt"),
        ("flat", ["--specialisation", "--only", "3", "8"], "--only 3 8: experts are 0 to 7"),
        ("flat", ["--specialisation", "--of", "missing.txt"], "missing.txt"),
        ("dense", ["--prompt", "And", "--experts"], "no experts (model.middle_layer='ffn')"),
        ("dense", ["--specialisation"], "no experts"),
        ("other", [], "model.dim=24, not 16"),
        ("deeper", [], "model.ffn_layers=3, not 2"),
    ],
)
def test_generate_mistake_prints_one_line(
    name: str,
    args: list[str],
    says: str,
    trained: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = trained[0] / name
    if not run.exists() and name != "missing":
        kept = trained[0] / ("dense" if name == "deeper" else "flat")
        config = json.loads((kept / "config.json").read_text())
        config["model"] |= {"dim": 24} if name == "other" else {"ffn_layers": 3}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if name != "empty":
            (tmp_path / "checkpoints").symlink_to(kept / "checkpoints")
        run = tmp_path
    with pytest.raises(SystemExit) as stopped:
        generate.main([str(run), *args])
    told = capsys.readouterr()
    assert stopped.value.code == 2 and told.out == ""
    assert told.err.startswith("error: ") and says in told.err and told.err.count("\n") == 1


@pytest.mark.timeout(300)
def test_generate_is_quiet_and_imports_no_deepspeed(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    run = str(trained[0] / "hierarchical_ep2")
    code = "import sys; from moe_dist.inference.generate import main; "
    code += f"main([{run!r}, '--words', '5', '--prompt', 'And Qwertz']);"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code + "assert not {'deepspeed', 'wandb', 'matplotlib'} & sys.modules.keys()",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "note: not in the vocabulary, read as <unk>: Qwertz\n"
    assert done.stdout.startswith("And Qwertz")
