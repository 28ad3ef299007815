"""Reads the config of a run: each checkpoint keeps a copy under its checksums, and RUN/config.json must agree with it.

RUN/config.json                                for people, and for a run without a checkpoint
RUN/checkpoints/step_00000425/config.json      as the run was when the checkpoint was saved
"""

from collections.abc import Container
from pathlib import Path
from typing import Any

from moe_dist.checkpoint import manifest
from moe_dist.config.overrides import dotted_keys, from_json, value_of
from moe_dist.config.run_folder import read
from moe_dist.config.schema import Config
from moe_dist.config.validate import check_config


def read_config(run: Path, given: Container[str] = ()) -> tuple[Config, str]:
    """Returns the config of a run, that of its newest checkpoint with an intact copy, and a note for the user.

    Without such a copy, as older versions saved checkpoints, the config is that of RUN/config.json.

    Args:
        run: The run folder.
        given: Dotted keys of fields that are overridden anyway, in which the two may differ.

    Returns:
        The config, and why it was not read from RUN/config.json or not compared, empty where it was both.

    Raises:
        ValueError: The two differ, or there is no config that can be read.
    """
    file, found = run / "config.json", manifest.list_checkpoints(run)
    checkpoint = next(
        (each for each in reversed(found) if manifest.is_intact(each, manifest.CONFIG)), None
    )
    try:
        shown = _parse(file)
    except ValueError as error:
        if checkpoint:
            return _parse(
                checkpoint / manifest.CONFIG
            ), f"{error}; using the copy in {checkpoint.name}"
        if not file.exists():
            raise ValueError(f"{run}: not a run folder (no config.json)") from None
        raise
    if not checkpoint:
        return (
            shown,
            f"{run}: no checkpoint has a copy of config.json to compare it with" if found else "",
        )
    sealed = _parse(checkpoint / manifest.CONFIG)
    if differ := [text for key, text in differences(shown, sealed).items() if key not in given]:
        raise ValueError(
            f"{file} is not as {checkpoint.name} was saved: {'; '.join(differ[:5])}{'; ...' if differ[5:] else ''}. "
            f"Remove the file to go on as it was saved; --set changes what may change"
        )
    return sealed, ""


def _parse(path: Path) -> Config:
    """Raises ValueError, naming the file, where it cannot be read."""
    try:
        config = from_json(read(path).decode())
        check_config(config)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return config


def differences(config: Config, other: Config) -> dict[str, str]:
    """Returns, by dotted key, the values of all fields in which two configs differ, as text."""
    values, others = _values(config), _values(other)
    nothing = object()
    return {
        key: f"{key}={values.get(key, 'none')!r:.80}, not {others.get(key, 'none')!r:.80}"
        for key in {**values, **others}
        if values.get(key, nothing) != others.get(key, nothing)
    }


def _values(config: Config) -> dict[str, Any]:
    return {key: value_of(config, key) for key in dotted_keys(config)}
