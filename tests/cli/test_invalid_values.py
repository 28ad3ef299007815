"""Hostile values in every field, argument and variable: one line with the name and exit status 2,
or a valid run."""

import dataclasses
import functools
import json
import typing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from processes import check_one_line, check_plan

from moe_dist.checkpoint import __main__ as checkpoint
from moe_dist.config import papers
from moe_dist.config.overrides import dotted_keys, from_json, override, to_json
from moe_dist.config.schema import Config
from moe_dist.config.validate import RANGES, check_config
from moe_dist.distributed.batch_layout import make_batch_layout
from moe_dist.inference import classify, generate
from moe_dist.optim.lr_schedule import learning_rate
from moe_dist.planner import __main__ as planner
from moe_dist.report import __main__ as report_command
from moe_dist.tasks.registry import task_of
from moe_dist.verify import __main__ as verify_command

# of each kind of data and of model one config
NAMES = (
    "lstm_moe_demo",
    "widenet_demo",
    "widenet_pretraining_demo",
    "widenet_text_demo",
    "widenet_squad",
)
WORDS = (
    "",
    " ",
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e308",
    "-1e308",
    "1e-320",
    "1e400",
    "9" * 400,
    "9" * 5000,
    "0x10",
    "true",
    "none",
    "x" * 5000,
    "a\nb",
    "a\0b",
    "\ud800",
    "\x1b[2J",
    "٣",
    "../x",
    "[]",
)
VALUES: tuple[Any, ...] = (
    *WORDS,
    float("nan"),
    float("inf"),
    -float("inf"),
    -1,
    0,
    1,
    -0.5,
    1e308,
    10**400,
    -(10**400),
    True,
    False,
    None,
    [],
    {},
    [1],
    {"x": 1},
)


def try_it(config: Config) -> None:
    """Does everything that a start does with a config before any work, as far as one process
    can."""
    check_config(config)
    make_batch_layout(config, 1)
    task_of(config).build_model(config)
    for step in (1, config.steps):
        assert 0 <= learning_rate(config.optim, step, config.steps) <= RANGES["lr"][1]
    assert from_json(to_json(config)) == config


@pytest.mark.timeout(200)
def test_hostile_field_value_is_a_value_error_or_a_config() -> None:
    """Values come from a config.json and from --set. No other error occurs, and both outcomes
    do."""
    refused, accepted, done = 0, 0, set()
    for name in NAMES:
        config = papers.get(name)
        plain = json.loads(to_json(config))
        for key in dotted_keys(config):
            *sections, field = key.split(".")
            section = functools.reduce(dict.__getitem__, sections, plain)
            if (kind := (field, *section)) in done:  # the same section of a config before
                continue
            done.add(kind)
            right = section[field]
            texts = []
            for value in VALUES:
                section[field] = value
                texts.append(json.dumps(plain))
            section[field] = right
            makes = [partial(from_json, text) for text in texts]
            makes += [partial(override, config, [f"{key}={word}"]) for word in WORDS]
            for make in makes:
                try:
                    try_it(make())
                    accepted += 1
                except ValueError:
                    refused += 1
    assert refused > 5 * accepted > 1000


def test_every_number_has_a_range() -> None:
    sections = [
        Config,
        *(type(getattr(papers.get(name), part)) for name in NAMES for part in ("data", "model")),
    ]
    numbers: set[str] = set()
    while sections:
        for field, hint in typing.get_type_hints(sections.pop()).items():
            kinds = typing.get_args(hint) or (hint,)
            sections += [kind for kind in kinds if dataclasses.is_dataclass(kind)]
            numbers |= {field} & {field for kind in kinds if kind in (int, float)}
    assert numbers == RANGES.keys()


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        (
            "mesh.timeout_s=1e300",
            "mesh.timeout_s=1e+300 is out of range; use a value from 0.001 to 604800",
        ),
        (
            "mesh.timeout_s=604801",
            "mesh.timeout_s=604801.0 is out of range; use a value from 0.001 to 604800",
        ),
        ("optim.lr=1e308", "optim.lr=1e+308 is out of range; use a value from 1e-12 to 1e+06"),
        (
            "optim.weight_decay=1e200",
            "optim.weight_decay=1e+200 is out of range; use a value from 0 to 1e+06",
        ),
        ("mesh.ep=0", "mesh.ep=0 is out of range; use a value from 1 to 2147483647"),
        (
            "steps=" + "9" * 5000,
            "--set steps="
            + "9" * 40
            + "[...]"
            + "9" * 20
            + ": expected a whole number such as 100",
        ),
        (
            "steps=" + "9" * 400,
            "steps="
            + "9" * 40
            + "[...]"
            + "9" * 20
            + " is out of range; use a value from 1 to 99999999",
        ),
        ("name=a\nb", r"name='a\nb' has a character that no name can have, '\n'"),
        ("name=" + "n" * 101, "use at most 100 characters"),
        ("init_from=", "init_from='' is empty"),
        ("baseline=", "baseline='' is empty"),
        ("data.text=", "data.text='' is empty"),
        ("data.text=" + "t/" * 501, "has 1002 characters; at most 1000"),
    ],
)
def test_value_out_of_range_is_named(
    assignment: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_plan(["lstm_moe_demo", "--set", assignment], says, capsys)


@pytest.mark.parametrize("path", ["", "  ", "y" * 5000, "a/" * 2000, "run\0", "run\n2", "\udcff"])
@pytest.mark.parametrize("argument", ["--folder", "--resume", "--evaluate"])
def test_invalid_path_is_rejected(
    argument: str,
    path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # which must not be read
    check_plan(
        [*(["lstm_moe_demo"] if argument == "--folder" else []), argument, path],
        f"argument {argument}: ",
        capsys,
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"], (
        "nothing is written to the current folder"
    )


@pytest.mark.parametrize("path", ["", "y" * 300])
@pytest.mark.parametrize(
    ("main", "args"),
    [
        (generate.main, ["PATH"]),
        (generate.main, ["run", "--specialisation", "--of", "PATH"]),
        (classify.main, ["PATH", "x.png"]),
        (classify.main, ["run", "PATH"]),
        (checkpoint.main, ["inspect", "PATH"]),
        (checkpoint.main, ["export", "run", "PATH"]),
        (planner.main, ["lstm_moe_demo", "--gpu", "h100", "--json", "PATH"]),
        (verify_command.main, ["lstm_moe_demo", "--json", "PATH"]),
        (report_command.main, ["PATH"]),
    ],
)
def test_other_commands_reject_invalid_paths(
    main: Any,
    args: list[str],
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [path if arg == "PATH" else arg for arg in args]
    monkeypatch.setattr("sys.argv", ["report", *given])  # report.main reads it
    with pytest.raises(SystemExit) as exit_:
        main() if main is report_command.main else main(given)
    assert exit_.value.code == 2
    check_one_line(
        capsys.readouterr().err, "is empty" if not path else "has a name of 300 bytes; at most 255"
    )


@pytest.mark.parametrize(
    ("main", "args", "says"),
    [
        (planner.main, ["--nodes", "9" * 400, "--gpu", "h100"], "from 1 to 1048576"),
        (planner.main, ["--nodes", "9" * 5000, "--gpu", "h100"], "invalid int value"),
        (
            planner.main,
            ["--gpu", "h100", "--memory", "nan"],
            "--memory nan is out of range; use a positive number of GB",
        ),
        (planner.main, ["--gpu", "h100", "--set", "optim.lr=1e308"], "optim.lr=1e+308"),
        (
            verify_command.main,
            ["--worlds", "1000000007"],
            "--worlds 1000000007 is out of range; use a number from 1 to 1024",
        ),
        (verify_command.main, ["--steps", "9" * 400], "from 1 to 99999999"),
        (verify_command.main, ["--tolerance", "nan"], "--tolerance nan"),
        (verify_command.main, ["--set", "data.text="], "data.text='' is empty"),
    ],
)
def test_other_commands_reject_invalid_numbers(
    main: Any, args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["lstm_moe_demo", *args])
    assert exit_.value.code == 2
    check_one_line(capsys.readouterr().err, says)


LAUNCHED = {
    "RANK": "0",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "2",
}


@pytest.mark.parametrize(
    "text", ["abc", "-1", "1.5", "1e3", "9" * 30, "²", "٣", " 1", "1\n", "0x1", "007"]
)
@pytest.mark.parametrize("key", sorted(LAUNCHED.keys() - {"MASTER_ADDR"}))
def test_invalid_number_in_the_environment_is_named(
    key: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With and without the other variables of a launcher."""
    monkeypatch.setattr(
        "time.sleep", lambda seconds: None
    )  # of ranks that let the main one speak first
    for others in (LAUNCHED, dict.fromkeys(LAUNCHED, "")):
        for name, value in (others | {key: text}).items():
            monkeypatch.setenv(name, value)
        check_plan(
            ["lstm_moe_demo"],
            f"{key}={ascii(text)[1:-1]} in the environment: a whole number from ",
            capsys,
        )


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "4"}, "RANK=4 in the environment: a whole number from 0 to 3"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 in the environment: a whole number from 0 to 1"),
        ({"GROUP_RANK": "7"}, "GROUP_RANK=7 in the environment: a whole number from 0 to 1"),
        ({"LOCAL_WORLD_SIZE": "3"}, "4 ranks on 2 nodes, 3 of them here"),
        ({"GROUP_WORLD_SIZE": "3"}, "4 ranks on 3 nodes, 2 of them here"),
        (
            dict.fromkeys(LAUNCHED, "") | {"LOCAL_WORLD_SIZE": "2"},
            "1 ranks on 1 nodes, 2 of them here",
        ),
    ],
)
def test_contradicting_environment_numbers_are_rejected(
    environment: dict[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for key, value in (LAUNCHED | environment).items():
        monkeypatch.setenv(key, value)
    check_plan(["lstm_moe_demo"], says, capsys)
