"""Reads and changes configs by dotted key: `--set a.b=c`, JSON, and the groups that follow from a batch size."""

import dataclasses
import difflib
import functools
import json
import types
import typing
from typing import Any

from moe_dist.config.messages import nearest, shorten
from moe_dist.config.redact import redact
from moe_dist.config.schema import Config

# how a value of each type is written, for messages
EXAMPLES = {
    int: "a whole number such as 100",
    float: "a number such as 0.5",
    bool: "true or false",
    str: "text",
    types.NoneType: "none",
}


def value_of(config: Config, key: str) -> Any:
    """Of the field with this dotted key."""
    return functools.reduce(getattr, key.split("."), config)


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    """Returns the type of each field of a section. Python parses the annotations anew at each call."""
    return typing.get_type_hints(section)


SYNONYMS = {  # names that other programs have for a field -> the last part of its key here
    "learning_rate": "lr",
    "rate": "lr",
    "max_lr": "lr",
    "batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "epochs": "steps",
    "num_epochs": "steps",
    "max_steps": "steps",
    "num_steps": "steps",
    "iterations": "steps",
    "max_iters": "steps",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "scheduler": "schedule",
    "lr_schedule": "schedule",
    "lr_scheduler": "schedule",
    "momentum": "beta1",
    "grad_clip": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "wd": "weight_decay",
    "gradient_accumulation_steps": "grad_accum_steps",
    "grad_accum": "grad_accum_steps",
    "experts": "num_experts",
    "n_experts": "num_experts",
    "top_k": "k",
    "topk": "k",
    "num_experts_per_tok": "k",
    "expert_parallel": "ep",
    "expert_parallel_size": "ep",
    "ep_size": "ep",
    "hidden_size": "dim",
    "d_model": "dim",
    "width": "dim",
    "d_ff": "expert_hidden_dim",
    "ffn_dim": "expert_hidden_dim",
    "num_layers": "depth",
    "layers": "depth",
    "n_layers": "depth",
    "heads": "num_heads",
    "n_heads": "num_heads",
    "sequence_length": "seq_len",
    "bptt": "seq_len",
    "max_length": "max_tokens",
    "max_seq_length": "max_tokens",
    "vocab_size": "vocabulary_size",
    "vocab": "vocabulary_size",
    "classes": "num_classes",
    "num_labels": "num_classes",
    "resolution": "image_size",
    "in_channels": "channels",
    "num_workers": "workers",
    "precision": "ds_config",
    "dtype": "ds_config",
    "bf16": "ds_config",
    "eval_steps": "eval_every",
    "eval_interval": "eval_every",
    "save_steps": "save_every",
    "save_interval": "save_every",
    "logging_steps": "log_every",
    "log_interval": "log_every",
    "random_seed": "seed",
    "pretrained": "init_from",
    "samples": "global_batch_size",
    "micro_batch_size": "global_batch_size",
    "clip_norm": "max_grad_norm",
    "zero": "zero_stage",
    "hidden": "expert_hidden_dim",
    "timesteps": "seq_len",
    "accumulation": "grad_accum_steps",
    "gradient_accumulation": "grad_accum_steps",
    "load_from": "init_from",
    "checkpoint": "init_from",
}


def nearest_key(key: str, known: typing.Iterable[str]) -> str:
    """Returns how an error about an unknown dotted key goes on: with the nearest known key, or all of its section.

    The last part of the key, or the field that it is a synonym of (`SYNONYMS`), counts as much as the whole key.
    """
    known = sorted(known)
    section, _, last = key.rpartition(".")
    last = SYNONYMS.get(last.lower().replace("-", "_"), last)
    wanted = f"{section}.{last}".lstrip(".")

    def likeness(candidate: str) -> float:
        name = candidate.rpartition(".")[2]
        part = difflib.SequenceMatcher(None, last, name).ratio() + (name == last)
        return (part + difflib.SequenceMatcher(None, wanted, candidate).ratio()) / 2

    best = max(known, key=likeness)
    if likeness(best) >= 0.6:
        return f"did you mean {best!r}?"
    siblings = [
        each
        for each in known
        if each.startswith((f"{key}.", f"{section}." if section else f"{key}."))
    ]
    return f"known: {', '.join(siblings or known)}"


def dotted_keys(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field of a config that `--set` may name, as {dotted key: type}."""
    section: Any = type(config)
    keys: dict[str, Any] = {}
    for name, kind in _hints(section).items():
        value = getattr(config, name)
        inner = dataclasses.is_dataclass(value)
        keys |= dotted_keys(value, f"{prefix}{name}.") if inner else {prefix + name: kind}
    return keys


def override(config: Config, assignments: typing.Iterable[str]) -> Config:
    """Applies `a.b=value` strings in order. Raises ValueError for a bad value or an unknown key, naming the nearest."""
    known = dotted_keys(config)
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(
                f"--set {shorten(redact(text))!r}: expected KEY=VALUE, for example --set mesh.ep=2"
            )
        if key not in known:  # whose value is not repeated, for it may be a password
            raise ValueError(f"--set: no field {shorten(redact(key))!r}; {nearest_key(key, known)}")
        config = _replace(config, key.split("."), _parse(key, value, known[key]))
    return config


def keys_of(assignments: typing.Iterable[str]) -> frozenset[str]:
    """Returns the dotted keys of `a.b=value` strings."""
    return frozenset(text.partition("=")[0] for text in assignments)


def fit_groups(config: Config, explicit: typing.Collection[str]) -> tuple[Config, list[str]]:
    """Makes groups of samples that do not divide the batch smaller, except for those that the user has set.

    The layout has no part in it: the groups follow from `batch.global_batch_size` alone.

    Args:
        config: A config.
        explicit: Dotted keys that the user has set.

    Returns:
        The config, and a note about each field that was changed.
    """
    samples, notes = config.batch.global_batch_size, []
    for key in ("batch.balance_loss_group_size", "batch.capacity_group_size"):
        group = value_of(config, key)
        if key not in explicit and group and samples > 0 and samples % group:
            fits = max(size for size in range(1, group) if samples % size == 0)
            config = override(config, [f"{key}={fits}"])
            notes.append(
                f"{key}={fits}, for it divides batch.global_batch_size={samples} (the config has {group})"
            )
    return config, notes


def _replace(node: Any, path: list[str], value: Any) -> Any:
    child = value if len(path) == 1 else _replace(getattr(node, path[0]), path[1:], value)
    return dataclasses.replace(node, **{path[0]: child})


def _parse(key: str, text: str, kind: Any) -> Any:
    """`text` from a command line as a value of type `kind`."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if types.NoneType in options and text.lower() in ("none", "null"):
        return None
    (plain,) = [k for k in options if k is not types.NoneType]
    try:
        return {"true": True, "false": False}[text.lower()] if plain is bool else plain(text)
    except (KeyError, ValueError):
        raise ValueError(
            f"--set {key}={shorten(redact(text))}: expected {_expected(kind)}"
        ) from None


def _expected(kind: Any) -> str:
    """Returns what a value of type `kind` looks like, for use in a message."""
    return " or ".join(
        EXAMPLES.get(option, str(option)) for option in typing.get_args(kind) or (kind,)
    )


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
    """Returns the config of a text that `to_json` made.

    Raises:
        ValueError: The text is no config, or a value is not of its field's type; the error names the field.
    """
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("config: JSON that is nested too deep") from None
    return _build(Config, values, "")


def _build(cls: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(
            f"config: {prefix.rstrip('.') or 'the whole'} is {shorten(repr(values))}, expected an object"
        )
    hints, fields = _hints(cls), {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"config: no field {prefix + name!r}; {nearest(name, hints)}")
        kind = hints[name]
        sections = [k for k in typing.get_args(kind) or (kind,) if dataclasses.is_dataclass(k)]
        if sections:
            value = _build(_section(sections, value), value, f"{prefix}{name}.")
        elif not _is_of(value, kind):
            raise ValueError(
                f"config: {prefix}{name}={shorten(repr(value))}, expected {_expected(kind)}"
            )
        fields[name] = value
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"config: {error}") from None


def _is_of(value: Any, kind: Any) -> bool:
    """Returns whether a value of JSON is of a field's type: a whole number is a float as well, and
    true and false are no numbers."""
    options = typing.get_args(kind) or (kind,)
    return type(value) in options or (type(value) is int and float in options)


def _section(sections: list[Any], values: Any) -> Any:
    """Of the kinds that a section may be, the one that has the fields of `values`, or else most of them."""
    names = set(values) if isinstance(values, dict) else set()

    def fit(section: Any) -> tuple[int, int]:
        fields = _hints(section).keys()
        return len(names & fields), -len(fields)

    return max(sections, key=fit)
