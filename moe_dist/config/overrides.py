"""Configs by dotted key: `--set a.b=c`, JSON, and group sizes that follow from the batch size."""

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Collection, Iterable
from typing import Any

from moe_dist.config.messages import nearest, shorten
from moe_dist.config.redact import redact
from moe_dist.config.schema import Config

# type -> example values, for error messages.
EXAMPLES = {
    int: "a whole number such as 100",
    float: "a number such as 0.5",
    bool: "true or false",
    str: "text",
    types.NoneType: "none",
}

# A field's name in other programs -> the last part of its key here. Synonyms only improve the hint
# in the error about an unknown key; `--set` does not accept them.
SYNONYMS = {
    # the run
    "epochs": "steps",
    "iterations": "steps",
    "max_iters": "steps",
    "max_steps": "steps",
    "num_epochs": "steps",
    "num_steps": "steps",
    "random_seed": "seed",
    # logging, evaluation and checkpoints
    "log_interval": "log_every",
    "logging_steps": "log_every",
    "eval_interval": "eval_every",
    "eval_steps": "eval_every",
    "save_interval": "save_every",
    "save_steps": "save_every",
    "checkpoint": "init_from",
    "load_from": "init_from",
    "pretrained": "init_from",
    # precision and ranks
    "bf16": "ds_config",
    "dtype": "ds_config",
    "precision": "ds_config",
    "zero": "zero_stage",
    "ep_size": "ep",
    "expert_parallel": "ep",
    "expert_parallel_size": "ep",
    "num_workers": "workers",
    # the batch
    "batch_size": "global_batch_size",
    "micro_batch_size": "global_batch_size",
    "samples": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "bptt": "seq_len",
    "sequence_length": "seq_len",
    "timesteps": "seq_len",
    "accumulation": "grad_accum_steps",
    "grad_accum": "grad_accum_steps",
    "gradient_accumulation": "grad_accum_steps",
    "gradient_accumulation_steps": "grad_accum_steps",
    # the optimizer
    "learning_rate": "lr",
    "max_lr": "lr",
    "rate": "lr",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "lr_schedule": "schedule",
    "lr_scheduler": "schedule",
    "scheduler": "schedule",
    "momentum": "beta1",
    "wd": "weight_decay",
    "clip_norm": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    # experts
    "experts": "num_experts",
    "n_experts": "num_experts",
    "num_experts_per_tok": "k",
    "top_k": "k",
    "topk": "k",
    "d_ff": "expert_hidden_dim",
    "ffn_dim": "expert_hidden_dim",
    "hidden": "expert_hidden_dim",
    # the model
    "d_model": "dim",
    "hidden_size": "dim",
    "width": "dim",
    "layers": "depth",
    "n_layers": "depth",
    "num_layers": "depth",
    "heads": "num_heads",
    "n_heads": "num_heads",
    "max_length": "max_tokens",
    "max_seq_length": "max_tokens",
    "vocab": "vocabulary_size",
    "vocab_size": "vocabulary_size",
    "classes": "num_classes",
    "num_labels": "num_classes",
    "in_channels": "channels",
    "resolution": "image_size",
}


def value_of(config: Config, key: str) -> Any:
    """Returns the value of a field given by its dotted key."""
    return functools.reduce(getattr, key.split("."), config)


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    """Returns each field's type in a section; cached, because parsing annotations is slow."""
    return typing.get_type_hints(section)


def nearest_key(key: str, known: Iterable[str]) -> str:
    """Returns the end of an error about an unknown dotted key.

    Candidates are compared with the whole key and, with the same weight, with its last part. If the
    last part is a synonym (`SYNONYMS`), they are compared with the field it stands for.

    Args:
        key: The unknown key.
        known: All dotted keys.

    Returns:
        A question with the nearest known key. If none is near: a list of the keys in `key`'s
        section, or of all keys if there is no such section.
    """
    candidates = sorted(known)
    section, _, last = key.rpartition(".")
    last = SYNONYMS.get(last.lower().replace("-", "_"), last)
    translated = f"{section}.{last}".lstrip(".")

    def similarity(candidate: str) -> float:
        name = candidate.rpartition(".")[2]
        of_last = difflib.SequenceMatcher(None, last, name).ratio() + (name == last)
        return (of_last + difflib.SequenceMatcher(None, translated, candidate).ratio()) / 2

    best = max(candidates, key=similarity)
    if similarity(best) >= 0.6:
        return f"did you mean {best!r}?"
    prefixes = (f"{key}.", f"{section}." if section else f"{key}.")
    siblings = [candidate for candidate in candidates if candidate.startswith(prefixes)]
    return f"known: {', '.join(siblings or candidates)}"


def dotted_keys(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns all fields `--set` can change.

    Args:
        config: A config, or one of its sections.
        prefix: Key prefix, ending with a dot.

    Returns:
        Each field's type by dotted key, in field order.
    """
    keys: dict[str, Any] = {}
    section: Any = type(config)
    for name, kind in _hints(section).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            keys |= dotted_keys(value, f"{prefix}{name}.")
        else:
            keys[prefix + name] = kind
    return keys


def override(config: Config, assignments: Iterable[str]) -> Config:
    """Applies `a.b=value` assignments in order.

    Args:
        config: The config; it is not changed.
        assignments: `--set` values.

    Returns:
        A new config.

    Raises:
        ValueError: An assignment has no "=", its key is unknown (the message has the nearest key),
            or its value does not have the field's type.
    """
    known = dotted_keys(config)
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(
                f"--set {shorten(redact(text))!r}: expected KEY=VALUE, for example --set mesh.ep=2"
            )
        if key not in known:  # the message omits the value, which may be a password
            raise ValueError(f"--set: no field {shorten(redact(key))!r}; {nearest_key(key, known)}")
        config = _replace(config, key.split("."), _parse(key, value, known[key]))
    return config


def keys_of(assignments: Iterable[str]) -> frozenset[str]:
    """Returns the dotted keys of `a.b=value` assignments."""
    return frozenset(text.partition("=")[0] for text in assignments)


def fit_groups(config: Config, explicit: Collection[str]) -> tuple[Config, list[str]]:
    """Reduces group sizes that do not divide the batch, except those set by the user.

    The result depends on `batch.global_batch_size` alone, not on the layout.

    Args:
        config: The config.
        explicit: Dotted keys set by the user.

    Returns:
        The config, with each such group size reduced to the batch size's largest divisor below it,
        and a note about each changed field.
    """
    batch_size = config.batch.global_batch_size
    notes: list[str] = []
    for key in ("batch.balance_loss_group_size", "batch.capacity_group_size"):
        size = value_of(config, key)
        if key not in explicit and size and batch_size > 0 and batch_size % size:
            divisor = max(d for d in range(1, size) if batch_size % d == 0)
            config = override(config, [f"{key}={divisor}"])
            notes.append(
                f"{key}={divisor}, a divisor of batch.global_batch_size={batch_size} "
                f"(the config has {size})"
            )
    return config, notes


def _replace(section: Any, path: list[str], value: Any) -> Any:
    """Returns a copy of a section with one field, at `path`, replaced."""
    name, *rest = path
    if rest:
        value = _replace(getattr(section, name), rest, value)
    return dataclasses.replace(section, **{name: value})


def _parse(key: str, text: str, kind: Any) -> Any:
    """Converts an assignment's text to a field's type."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if types.NoneType in options and text.lower() in ("none", "null"):
        return None
    (plain,) = [option for option in options if option is not types.NoneType]
    try:
        return {"true": True, "false": False}[text.lower()] if plain is bool else plain(text)
    except (KeyError, ValueError):
        raise ValueError(
            f"--set {key}={shorten(redact(text))}: expected {_expected(kind)}"
        ) from None


def _expected(kind: Any) -> str:
    """Returns example values for a type, for an error message."""
    options = typing.get_args(kind) or (kind,)
    return " or ".join(EXAMPLES.get(option, str(option)) for option in options)


def to_json(config: Config) -> str:
    """Returns a config as JSON text, one object per section."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
    """Reads a config from `to_json`'s text.

    Args:
        text: A JSON object. Missing fields take their defaults.

    Returns:
        The config, not yet checked by `check_config`.

    Raises:
        ValueError: The text is no JSON object, a key is unknown, or a value does not have its
            field's type; the message has the dotted key.
    """
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("config: the JSON is nested too deep") from None
    return _build(Config, values, "")


def _build(cls: Any, values: Any, prefix: str) -> Any:
    """Creates a section from a JSON object; `prefix` is the section's key with a dot."""
    if not isinstance(values, dict):
        raise ValueError(
            f"config: {prefix.rstrip('.') or 'the file'} is {shorten(repr(values))}, "
            "expected an object"
        )
    hints = _hints(cls)
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"config: no field {prefix + name!r}; {nearest(name, hints)}")
        kind = hints[name]
        options = typing.get_args(kind) or (kind,)
        sections = [option for option in options if dataclasses.is_dataclass(option)]
        if sections:
            value = _build(_matching_section(sections, value), value, f"{prefix}{name}.")
        elif not _has_type(value, kind):
            raise ValueError(
                f"config: {prefix}{name}={shorten(repr(value))}, expected {_expected(kind)}"
            )
        fields[name] = value
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"config: {error}") from None


def _has_type(value: Any, kind: Any) -> bool:
    """Returns True if a JSON value has a field's type.

    A whole number is also a float. Unlike in Python, true and false are not numbers.
    """
    options = typing.get_args(kind) or (kind,)
    return type(value) in options or (type(value) is int and float in options)


def _matching_section(sections: list[Any], values: Any) -> Any:
    """Returns the class with most of a JSON object's keys; for equals, the smallest one."""
    names = set(values) if isinstance(values, dict) else set()

    def score(section: Any) -> tuple[int, int]:
        fields = _hints(section).keys()
        return len(names & fields), -len(fields)

    return max(sections, key=score)
