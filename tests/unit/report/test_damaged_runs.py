"""Reports of damaged run folders: a report, or one line that names the file and exit status 2."""

import copy
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import LAYOUT, a_run, line

from moe_dist.report import __main__ as report_command
from moe_dist.report import files as report_files
from moe_dist.report import plots

STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    10**400,
    -(10**400),
    2**63,
    "x",
    "\ud800",
    "a\nb",
    [],
    [1],
    [[1]],
    [None],
    {},
    {"a": 1},
    float("nan"),
    float("inf"),
    1e308,
    "x" * 5000,
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes a run that has no plots yet; most tests here draw nothing, because a page takes
    two seconds."""
    monkeypatch.setattr(plots, "all_plots", lambda lines, name: {})
    return a_run(tmp_path / "run")


def told(run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """Returns the error line of `python -m moe_dist.report`, empty if it draws."""
    monkeypatch.setattr(report_files.sys, "argv", ["report", str(run)])
    status = 0
    try:
        report_command.main()
    except SystemExit as end:
        status = end.code
    err = capfd.readouterr().err
    assert (status, err.count("\n")) in ((0, 0), (2, 1)), err
    return err


def replaced(value: Any, path: tuple, by: Any) -> Any:
    """Returns a copy of `value` with one part replaced."""
    whole = copy.deepcopy(value)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = by
    return whole


LAYOUT_PATHS = [(key,) for key in LAYOUT] + [
    ("per_rank", "parameters"),
    ("per_rank", "memory_bytes"),
    ("per_rank", "memory_bytes", "activations"),
]


def test_layout_fields_may_have_any_value(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report_files, "write_report", lambda run: [])
    refused = 0
    for path in LAYOUT_PATHS:
        for strange in STRANGE:
            (run / "layout.json").write_text(json.dumps(replaced(LAYOUT, path, strange)))
            error = told(run, monkeypatch, capfd)
            assert not error or f"{run}/layout.json" in error
            refused += bool(error)
        missing = copy.deepcopy(LAYOUT)
        if len(path) == 1:
            del missing[path[0]]
            (run / "layout.json").write_text(json.dumps(missing))
            told(run, monkeypatch, capfd)
    assert refused > 200


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("layout.json", "[" * 100_000),
        ("layout.json", "{" * 50),
        ("layout.json", '{"world": 2}'),
        ("layout.json", "[1, 2]"),
        ("layout.json", "9" * 5000),
        ("layout.json", "\x00\x01"),
        ("layout.json", None),
        ("layout.json", ""),
        ("metrics.jsonl", "[" * 100_000 + "\n"),
        ("metrics.jsonl", '{"a":' * 99_999 + "\n"),
        ("metrics.jsonl", '{"step": 1, "train/loss": ' + "9" * 400 + "}\n"),
        ("metrics.jsonl", "\n"),
        ("metrics.jsonl", '{"step": ' + "9" * 5000 + "}\n"),
        ("metrics.jsonl", '{"step": 1, "moe/\\ud800/tokens_per_expert": [1]}\n'),
        (
            "metrics.jsonl",
            '{"step": 1, "moe/a/tokens_per_expert": [1, 2]}\n{"step": 2, "moe/a/tokens_per_expert": [1, 2, 3]}\n',
        ),
        (
            "metrics.jsonl",
            '{"step": 1, "moe/a/importance_per_expert": [1]}\n{"step": 2, "moe/a/importance_per_expert": [1, 2]}\n',
        ),
        ("metrics.jsonl", '{"step": 1, "moe/a\\u0000/tokens_per_expert": [1]}\n'),
        ("metrics.jsonl", "\ufeff{}\n"),
        ("metrics.jsonl", '{"step": 1, "moe/' + "a" * 3000 + '/tokens_per_expert": [1]}\n'),
        ("metrics.jsonl", '{"step": 1, "train/nonfinite_source": "a\\nb"}\n'),
        ("metrics.jsonl", None),
        ("metrics.jsonl", '{"step": 1, "memory/peak_bytes_by_rank": [' + "9" * 400 + "]}\n"),
        ("metrics.jsonl", ""),
    ],
)
def test_invalid_run_file_is_named(
    run: Path,
    file: str,
    content: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A case without content is a pipe without a writer."""
    (run / file).unlink()
    if content is None:
        os.mkfifo(run / file)
    else:
        (run / file).write_text(content)
    error = told(run, monkeypatch, capfd)
    assert error.startswith("error: ") and f"{run}/{file}" in error and len(error) < 500


def test_unreadable_config_is_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = json.loads((run / "config.json").read_text())
    for content in ("[" * 100_000, "{", '"x"', json.dumps(whole | {"steps": 10**400}), None):
        (run / "config.json").unlink()
        os.mkfifo(run / "config.json") if content is None else (run / "config.json").write_text(
            content
        )
        assert told(run, monkeypatch, capfd) == ""
        assert (
            "no config.json of this version" in (run / "report.html").read_text()
            or "steps" in content
        )
    (run / "config.json").unlink()
    (run / "config.json").write_text(json.dumps(whole | {"name": "half a \ud800 character"}))
    assert (
        told(run, monkeypatch, capfd) == ""
        and "half a ? character" in (run / "report.html").read_text()
    )


def test_non_text_names_are_shown_escaped(run: Path) -> None:
    odd = run.rename(Path(os.fsdecode(os.fsencode(run.parent) + b"/odd\xff")))
    assert (
        report_files.write_all(odd) == [odd / "report.html"]
        and "<h1>odd?</h1>" in (odd / "report.html").read_text()
    )


def test_missing_run_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "no metrics file" in told(tmp_path / "nowhere", monkeypatch, capfd)


def test_random_damage_gives_one_line_or_a_report(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Changes values and bits, cuts and repeats parts of both files, 300 times (seeded)."""
    monkeypatch.setattr(report_files, "write_report", lambda run: [])
    rng = random.Random(18)
    whole = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "layout.json")}
    drawn = 0
    for _ in range(300):
        for name, content in whole.items():
            (run / name).write_bytes(content)
        name = rng.choice(list(whole))
        damage = rng.choice(DAMAGES)
        (run / name).write_bytes(damage(whole[name], rng))
        error = told(run, monkeypatch, capfd)
        assert not error or f"{run}/{name}" in error, error
        drawn += not error
    assert 30 < drawn < 270


def another_value(content: bytes, rng: random.Random) -> bytes:
    strange = json.dumps(rng.choice(STRANGE)).encode()
    numbers = list(re.finditer(rb"(?<=: )[-\d.e]+", content))
    place = rng.choice(numbers)
    return content[: place.start()] + strange + content[place.end() :]


def another_bit(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def a_cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def a_repetition(content: bytes, rng: random.Random) -> bytes:
    first, second = sorted(rng.sample(range(len(content)), 2))
    return content[:second] + content[first:]


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    another_value,
    another_bit,
    a_cut,
    a_repetition,
)


@pytest.mark.timeout(120)
def test_numbers_of_any_magnitude_are_drawn(tmp_path: Path) -> None:
    """Plots and page of numbers as large, small or unusual as JSON allows."""
    run = a_run(tmp_path / "run")
    rng = random.Random(5)
    lines = []
    for step in (7, 3, 3, 10**9):  # steps need not rise
        values = line(1) | {"step": step}
        for key, value in values.items():
            if key != "step":
                numbers = [
                    rng.choice((0, -1, 1e300, -1e300, 1e-300, None, 2**63 - 1)) for _ in range(8)
                ]
                values[key] = numbers if isinstance(value, list) else numbers[0]
        lines.append(json.dumps(values) + "\n")
    (run / "metrics.jsonl").write_text("".join(lines))
    assert report_files.write_all(run)
