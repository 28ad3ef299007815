"""Reads a run's config and compares it with the copies in its checkpoints.

Each checkpoint has a copy of the config with a checksum, and RUN/config.json must agree with it:

    RUN/config.json                              for users, and for a run without a checkpoint
    RUN/checkpoints/step_00000425/config.json    the config when this checkpoint was saved
"""

from collections.abc import Container
from pathlib import Path
from typing import Any

from moe_dist.checkpoint import manifest
from moe_dist.config.overrides import dotted_keys, from_json, value_of
from moe_dist.config.run_folder import read
from moe_dist.config.schema import Config
from moe_dist.config.validate import check_config

MAX_DIFFERENCES = 5  # listed in one error


def read_config(run: Path, given: Container[str] = ()) -> tuple[Config, str]:
    """Reads a run's config from its newest checkpoint with an intact copy.

    Without such a copy (earlier versions saved none) it reads RUN/config.json.

    Args:
        run: The run folder.
        given: Dotted keys of fields overridden by the caller; the two files may differ there.

    Returns:
        The config, and a note for the user. The note is empty if the two files were compared;
        otherwise it gives the reason.

    Raises:
        ValueError: The two files differ, or neither can be read.
    """
    file = run / manifest.CONFIG
    checkpoints = manifest.list_checkpoints(run)
    sealed = _newest_with_config(checkpoints)
    try:
        shown_config = _parse(file)
    except ValueError as error:
        if sealed:
            return _parse(sealed / manifest.CONFIG), f"{error}; using the copy in {sealed.name}"
        if not file.exists():
            raise ValueError(f"{run}: not a run folder (no config.json)") from None
        raise
    if not sealed:
        note = f"{run}: no checkpoint has a copy of config.json to compare it with"
        return shown_config, note if checkpoints else ""
    sealed_config = _parse(sealed / manifest.CONFIG)
    changes = differences(shown_config, sealed_config)
    unexpected = [change for key, change in changes.items() if key not in given]
    if unexpected:
        more = "; ..." if len(unexpected) > MAX_DIFFERENCES else ""
        raise ValueError(
            f"{file} differs from the copy in {sealed.name}: "
            f"{'; '.join(unexpected[:MAX_DIFFERENCES])}{more}. "
            "Remove the file to use the copy; change fields with --set"
        )
    return sealed_config, ""


def _newest_with_config(checkpoints: list[Path]) -> Path | None:
    """Returns the newest checkpoint with an intact copy of the config, or None."""
    for checkpoint in reversed(checkpoints):
        if manifest.is_intact(checkpoint, manifest.CONFIG):
            return checkpoint
    return None


def _parse(path: Path) -> Config:
    """Reads and checks a config file; a ValueError's message begins with the path."""
    try:
        config = from_json(read(path).decode())
        check_config(config)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return config


def differences(config: Config, other: Config) -> dict[str, str]:
    """Compares two configs field by field.

    Args:
        config: A config.
        other: Another config, perhaps with other sections.

    Returns:
        For each differing field, by dotted key, a text such as "optim.lr=0.1, not 0.2". A field
        missing in one config is "none" there.
    """
    values = _values(config)
    other_values = _values(other)
    missing = object()
    texts: dict[str, str] = {}
    for key in {**values, **other_values}:
        if values.get(key, missing) != other_values.get(key, missing):
            value = values.get(key, "none")
            other_value = other_values.get(key, "none")
            texts[key] = f"{key}={value!r:.80}, not {other_value!r:.80}"
    return texts


def _values(config: Config) -> dict[str, Any]:
    """Returns each field's value, by dotted key."""
    return {key: value_of(config, key) for key in dotted_keys(config)}
