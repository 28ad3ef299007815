"""Writes docs/reference/command_line.md and docs/reference/config.md from the code.

    .venv/bin/python docs/make_reference.py

The command lines come from the argparse parsers, the config fields from the dataclasses of
moe_dist/config/schema.py (types, defaults, Attributes sections) and the ranges and modes of
moe_dist/config/validate.py. tests/unit/test_docs.py compares the committed pages with the output.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from moe_dist.config import schema, validate  # noqa: E402

REFERENCE = ROOT / "docs" / "reference"
DO_NOT_EDIT = "<!-- Written by docs/make_reference.py. Change the code, then run that script. -->"

# section of a config -> its classes; the first one has the defaults of `Config`
SECTIONS: dict[str, tuple[tuple[str, type], ...]] = {
    "The run": (("", schema.Config),),
    "mesh": (("mesh", schema.MeshConfig),),
    "batch": (("batch", schema.BatchConfig),),
    "optim": (("optim", schema.OptimConfig),),
    "data": (
        ("data", schema.TextDataConfig),
        ("data", schema.ImageDataConfig),
        ("data", schema.PretrainingDataConfig),
        ("data", schema.SentenceDataConfig),
        ("data", schema.QuestionDataConfig),
    ),
    "model": (
        ("model", schema.LSTMConfig),
        ("model.moe", schema.MoEConfig),
        ("model", schema.VisionConfig),
        ("model", schema.TextConfig),
        ("model.encoder", schema.EncoderConfig),
        ("model.encoder.moe", schema.SoftmaxMoEConfig),
    ),
    "wandb": (("wandb", schema.WandbConfig),),
    "fault_injection": (("fault_injection", schema.FaultInjectionConfig),),
}
# class -> the tasks that use it
TASKS = {
    schema.TextDataConfig: "`language_model`",
    schema.LSTMConfig: "`language_model`",
    schema.MoEConfig: "`language_model`",
    schema.ImageDataConfig: "`image_classification`",
    schema.VisionConfig: "`image_classification`",
    schema.PretrainingDataConfig: "`pretraining`",
    schema.SentenceDataConfig: "`text_classification`",
    schema.QuestionDataConfig: "`question_answering`",
    schema.TextConfig: "`pretraining`, `text_classification`, `question_answering`",
    schema.EncoderConfig: "all but `language_model`",
    schema.SoftmaxMoEConfig: "all but `language_model`",
}
# unit of a number, by the last part of its key; a number that is not listed has no unit
UNITS = {
    "steps": "steps",
    "log_every": "steps",
    "eval_every": "steps",
    "save_every": "steps",
    "step": "step",
    "warmup_steps": "steps",
    "max_consecutive_skipped_steps": "steps",
    "keep_last_n": "checkpoints",
    "ep": "ranks",
    "rank": "rank",
    "overlap_chunks": "chunks",
    "workers": "processes",
    "timeout_s": "seconds",
    "seconds": "seconds",
    "ffn_hidden_dim": "units",
    "lstm_units": "units",
    "expert_hidden_dim": "units",
    "ffn_layers": "layers",
    "vocabulary_size": "words or tokens",
    "softmax_samples": "words",
    "num_experts": "experts",
    "num_groups": "groups",
    "k": "experts",
    "depth": "blocks",
    "blocks_per_attention": "blocks",
    "blocks_per_ffn": "blocks",
    "blocks_per_norm": "blocks",
    "blocks_per_routing": "blocks",
    "image_size": "pixels",
    "patch_size": "pixels",
    "num_classes": "classes",
    "global_batch_size": "samples",
    "seq_len": "words",
    "grad_accum_steps": "micro-batches",
    "balance_loss_group_size": "samples",
    "capacity_group_size": "samples",
    "max_tokens": "tokens",
    "doc_stride": "tokens",
    "max_answer_tokens": "tokens",
    "dropout": "probability",
    "label_smoothing": "probability",
    "no_answer_threshold": "difference of logits",
}
# a paper that a field's description names: "Shazeer et al. 2017, Appendix D", "Eq. 5"
PAPER = re.compile(
    r"[A-Z]\w+(?:(?:,? and [A-Z]\w+)| et al\.) (?:19|20)\d\d(?:, (?:Section|Appendix|Algorithm) [\w.]*\w)?"
    r"|Appendix [A-Z](?:\.\d)?|Eqs?\. \d+"
)
# class whose "Eq." and "Appendix" are those of one paper
PAPER_OF = {
    schema.MoEConfig: "Shazeer et al. 2017",
    schema.LSTMConfig: "Shazeer et al. 2017",
    schema.OptimConfig: "Shazeer et al. 2017",
}


class _ParserFoundError(Exception):
    """Carries a parser out of a command's entry point, before the command does any work."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


@contextlib.contextmanager
def _parsing_stopped() -> Iterator[None]:
    """Lets every parser raise `_ParserFoundError` instead of parsing."""

    def stop(parser: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
        raise _ParserFoundError(parser)

    original = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = stop  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_known_args = original  # type: ignore[method-assign]


def find_parser(entry: Callable[[], Any]) -> argparse.ArgumentParser:
    """Returns the parser that an entry point creates.

    Args:
        entry: A function that parses a command line.

    Raises:
        ValueError: The function parses nothing.
    """
    with _parsing_stopped():
        try:
            entry()
        except _ParserFoundError as found:
            return found.parser
    raise ValueError(f"{entry} creates no parser")


def commands() -> dict[str, argparse.ArgumentParser]:
    """Returns the parser of each command, by the words that start the command."""
    from moe_dist.inference import classify, generate
    from moe_dist.training.args import parse_args

    train_doc = ast.get_docstring(ast.parse((ROOT / "train.py").read_text()))
    parsers = {"python train.py": find_parser(lambda: parse_args([], train_doc))}
    for name in ("verify", "planner", "report", "checkpoint"):
        module = importlib.import_module(f"moe_dist.{name}.__main__")
        takes_argv = bool(inspect.signature(module.main).parameters)
        entry = (lambda m=module: m.main([])) if takes_argv else module.main
        parsers[f"python -m moe_dist.{name}"] = find_parser(entry)
    subcommands = _subcommands(parsers["python -m moe_dist.checkpoint"])
    for name, parser in subcommands.items():
        parsers[f"python -m moe_dist.checkpoint {name}"] = parser
    parsers["python -m moe_dist.inference generate"] = find_parser(lambda: generate.main([]))
    parsers["python -m moe_dist.inference classify"] = find_parser(lambda: classify.main([]))
    return parsers


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Returns the parsers of a parser's subcommands by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}


def _cell(text: str) -> str:
    """Returns a text for a cell of a Markdown table."""
    plain = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return re.sub(r"(?<![`\w])\*(?!\*)", "\\*", plain)


def _values(action: argparse.Action) -> str:
    """Returns how the value of an option is written on the command line; "" for a flag."""
    if action.nargs == 0:
        return ""
    name = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if action.choices:
        name = "|".join(map(str, action.choices))
    name = str(name)
    return {"+": f"{name} ...", "*": f"[{name} ...]", "?": f"[{name}]"}.get(str(action.nargs), name)


def command_page() -> str:
    """Returns docs/reference/command_line.md."""
    lines = [
        "# Command line",
        "",
        DO_NOT_EDIT,
        "",
        "All commands run from the root of the repository, with the environment of `make setup` "
        "(`source .venv/bin/activate`).",
        "A wrong argument is one line on stderr and exit status 2. `train.py` under `torchrun` takes the "
        "same arguments.",
        "For the exit statuses see [environment.md](environment.md#exit-statuses).",
        "",
    ]
    parsers = commands()
    lines += [f"- [`{name}`](#{_anchor(name)})" for name in parsers]
    for name, parser in parsers.items():
        lines += ["", f"## {name}", ""]
        if parser.description:
            lines += ["```text", textwrap.dedent(parser.description).strip(), "```", ""]
        rows = []
        for action in parser._actions:
            if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
                continue
            spelling = " ".join([*action.option_strings[:1], _values(action)]).strip()
            rows.append(f"| `{_cell(spelling)}` | {_cell(action.help or '')} |")
        if rows:
            lines += ["| argument | meaning |", "|---|---|", *rows]
    return "\n".join(lines).rstrip() + "\n"


def _anchor(heading: str) -> str:
    """Returns the anchor of a Markdown heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def attributes_of(section: type) -> dict[str, str]:
    """Returns the description of each field in a class's Attributes section."""
    text = inspect.getdoc(section) or ""
    body = text.partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    name = ""
    for line in body.splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start[1]
            found[name] = start[2]
        elif name and line.startswith("        "):
            found[name] += " " + line.strip()
    return found


def _type_name(kind: Any) -> str:
    """Returns the name of a field's type."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    names = [
        "none"
        if option is types.NoneType
        else {int: "int", float: "float"}.get(option, option.__name__)
        for option in options
    ]
    return " or ".join(names)


def _default(field: dataclasses.Field[Any]) -> str:
    """Returns a field's default as `--set` takes it."""
    if field.default is dataclasses.MISSING:
        return "required"
    value = field.default
    if value is None:
        return "`none`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _range(key: str, text: str) -> str:
    """Returns the range of a field, or its values: those of `MODES`, or those that its text lists."""
    if key in validate.MODES:
        return ", ".join(f"`{value}`" for value in validate.MODES[key])
    bounds = validate.RANGES.get(key.rpartition(".")[2])
    if bounds is None:
        return ", ".join(f"`{value}`" for value in re.findall(r'"([a-z_0-9]+)":', text))
    return " to ".join(str(b) if isinstance(b, int) else f"{b:g}" for b in bounds)


def _paper(section: type, text: str) -> str:
    """Returns the papers that a description names."""
    names = []
    for match in PAPER.finditer(text):
        name = match[0]
        if name.startswith(("Eq", "Appendix")):
            name = f"{PAPER_OF.get(section, '')} {name}".strip()
        names.append(name)
    return "; ".join(dict.fromkeys(names))


def config_page() -> str:
    """Returns docs/reference/config.md."""
    lines = [
        "# Config fields",
        "",
        DO_NOT_EDIT,
        "",
        "`--set KEY=VALUE` overrides a field of a named config: `--set optim.lr=1e-3`, `--set mesh.ep=2`, "
        "`--set model.moe.capacity_factor=none`.",
        "The defaults below are those of the dataclasses in [schema.py](../../moe_dist/config/schema.py); "
        "a named config (`python train.py --list`) sets its own.",
        "Every count is global: the share of one rank follows from the count and the mesh. An unknown key is "
        "an error that names the nearest one.",
        "",
    ]
    for title, classes in SECTIONS.items():
        lines += [f"## {title}", ""]
        for prefix, section in classes:
            lines += _section_lines(prefix, section)
    return "\n".join(lines).rstrip() + "\n"


def _section_lines(prefix: str, section: type) -> list[str]:
    """Returns the table of a config class."""
    texts = attributes_of(section)
    hints = typing.get_type_hints(section)
    doc = (inspect.getdoc(section) or "").partition("Attributes:")[0].strip()
    lines = [f"### {section.__name__}", ""]
    if section in TASKS:
        lines += [f"Tasks: {TASKS[section]}.", ""]
    lines += [" ".join(paragraph.split()) + "\n" for paragraph in doc.split("\n\n")]
    lines += [
        "| key | type | default | unit | range or values | meaning | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        options = typing.get_args(hints[field.name]) or (hints[field.name],)
        if any(dataclasses.is_dataclass(option) for option in options):
            continue  # a section of its own
        key = f"{prefix}.{field.name}".lstrip(".")
        text = texts[field.name]
        lines.append(
            f"| `{key}` | {_type_name(hints[field.name])} | {_default(field)} "
            f"| {UNITS.get(field.name, '')} | {_range(key, text)} "
            f"| {_cell(text)} | {_paper(section, text)} |"
        )
    return [*lines, ""]


def pages() -> dict[Path, str]:
    """Returns the text of each generated page by its path."""
    return {
        REFERENCE / "command_line.md": command_page(),
        REFERENCE / "config.md": config_page(),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
        print(path.relative_to(ROOT))
