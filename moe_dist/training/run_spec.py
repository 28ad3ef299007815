"""Turns train.py's command line into a `RunSpec`, checked before a process group starts."""

import argparse
import dataclasses
import glob
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_dist.checkpoint import manifest
from moe_dist.checkpoint.sealed_config import read_config
from moe_dist.checkpoint.upcycle import Upcycling
from moe_dist.config import papers
from moe_dist.config.messages import shorten
from moe_dist.config.overrides import dotted_keys, fit_groups, keys_of, override, value_of
from moe_dist.config.schema import Config, moe_section
from moe_dist.config.validate import check_config
from moe_dist.distributed.batch_layout import make_batch_layout
from moe_dist.distributed.launch_env import (
    check_launch_environment,
    memory_per_rank,
    num_nodes,
    ranks_per_node,
    world_size,
)
from moe_dist.engine.ds_config import read_ds_config
from moe_dist.monitoring.console import is_main_rank, print_on_main
from moe_dist.monitoring.metrics_file import FILE_NAME as METRICS_FILE
from moe_dist.monitoring.metrics_file import read_metrics
from moe_dist.monitoring.wandb_logger import wandb_mode_of
from moe_dist.tasks.registry import task_of
from moe_dist.training.args import parse_args
from moe_dist.training.errors import plain_errors
from moe_dist.training.model_stats import describe_layout, format_layout
from moe_dist.training.results import read_kept_metrics
from moe_dist.training.run_directory import check_writable

MAX_RANKS = 2**20
AUTO = Path("auto")  # --resume's argument for launchers that repeat the same command
# fields with a path to the data; a resumed run may find its data elsewhere, because fingerprints
# are compared
DATA_PATHS = ("data.text", "data.images", "data.image_root", "data.sentences", "data.questions")
# fields, and prefixes of fields, a resumed or evaluated run may change: neither its checkpoint nor
# its position in the data depends on them
MAY_CHANGE: tuple[str, ...] = (
    *DATA_PATHS,
    "steps",
    "log_every",
    "eval_every",
    "save_every",
    "keep_last_n",
    "async_save",
    "ds_config",
    "zero_stage",
    "baseline",
    "write_report",
    "mesh.ep",
    "mesh.dispatcher",
    "mesh.overlap_chunks",
    "mesh.comm_dtype",
    "mesh.timeout_s",
    "batch.grad_accum_steps",
    "data.workers",
    "data.no_answer_threshold",
    "model.moe.recompute",
    "model.encoder.recompute",
    "optim.lr",
    "optim.warmup_steps",
    "optim.schedule",
    "optim.weight_decay",
    "optim.beta1",
    "optim.beta2",
    "optim.eps",
    "optim.max_grad_norm",
    "optim.clip_norm_source",
    "optim.fuse_expert_update_in_backward",
    "optim.expert_beta2",
    "optim.max_consecutive_skipped_steps",
    "fault_injection.",
    "wandb.",
)


@dataclass(frozen=True)
class RunSpec:
    """A run as described by the command line.

    Attributes:
        config: The run's config.
        ds_config: The DeepSpeed config (`engine.ds_config`).
        folder: The run folder. None: a new one in runs/.
        source_run: The run folder with the checkpoint to resume or evaluate. None: a new run.
        upcycling: How `source_run`'s experts are copied (--grow). None: no growth.
        evaluate: If True, evaluates only the test splits.
        auto_resume: If True (--resume auto), a missing checkpoint or a finished run is no error.
        profile: If True, traces a few steps.
        allow_changed_data: If True, the data may differ from `source_run`'s data.
        explicit_keys: Dotted keys in --set; the data does not change these fields.
        notes: Notes about the config for the user, one line each.
        layout_report: The layout (`model_stats.describe_layout`).
    """

    config: Config
    ds_config: dict[str, Any]
    folder: Path | None
    source_run: Path | None = None
    upcycling: Upcycling | None = None
    evaluate: bool = False
    auto_resume: bool = False
    profile: bool = False
    allow_changed_data: bool = False
    explicit_keys: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    layout_report: dict[str, Any] = field(default_factory=dict)

    def with_config(self, config: Config) -> "RunSpec":
        """Returns the spec with the data-determined config and its layout."""
        if config == self.config:
            return self
        layout = make_batch_layout(config, world_size())
        model = task_of(config).build_model(config)
        report = describe_layout(config, layout, self.ds_config, model, num_nodes())
        return dataclasses.replace(self, config=config, layout_report=report)

    def print_changes(self, config: Config) -> None:
        """Prints the layout table's lines that differ after the data's sizes are known.

        Args:
            config: The data-determined config.

        Raises:
            ValueError: The model no longer fits into a rank's memory.
        """
        if config == self.config:
            return
        lines_before = format_layout(self.layout_report).splitlines()
        changed = self.with_config(config)
        lines_now = format_layout(changed.layout_report).splitlines()
        lines = [line for line in lines_now if line not in lines_before]
        print_on_main("\n".join(["with the sizes of the data:", *lines]))
        check_memory(changed.layout_report)


def parse_run(argv: list[str], doc: str | None) -> RunSpec:
    """Reads the command line, prints the layout, and checks what needs no process group.

    It exits after --list and --dry-run; a user mistake exits with one line and status 2.

    Args:
        argv: The arguments.
        doc: The --help description.

    Returns:
        The spec with its layout. The data may still change its config (`RunSpec.with_config`).
    """
    args = parse_args(argv, doc)
    with plain_errors():
        _check_combinations(args)
        check_launch_environment()
        spec = _resolve(args)
        wandb_mode_of(spec.config.wandb.mode)
        if not args.dry_run:  # which describes a model without its data
            _check_data(spec)
        if spec.config.baseline:
            read_kept_metrics(spec.config.baseline)
        layout = make_batch_layout(spec.config, args.ranks or world_size())
        model = task_of(spec.config).build_model(spec.config)
        nodes = args.nodes or num_nodes()
        report = describe_layout(spec.config, layout, spec.ds_config, model, nodes)
    if args.json:
        print_on_main(json.dumps(report))
    else:
        notes = [*spec.notes, *(_unread_notes(spec) if args.dry_run else ())]
        print_on_main("\n".join([format_layout(report), *(f"note: {note}" for note in notes)]))
    if args.dry_run:
        sys.exit(0)
    with plain_errors():
        _check_initial_weights(spec)
        check_memory(report)
        if is_main_rank() and not spec.evaluate:
            check_writable(spec.folder or Path("runs"), wait_for_lock=spec.auto_resume)
    return dataclasses.replace(
        spec,
        layout_report=report,
        profile=args.profile,
        allow_changed_data=args.allow_changed_data,
    )


def _check_combinations(args: argparse.Namespace) -> None:
    """Raises ValueError for incompatible options."""
    if (args.json or args.ranks is not None) and not args.dry_run:
        raise ValueError("--json and --ranks: only with --dry-run")
    if args.ranks is not None and not 1 <= args.ranks <= MAX_RANKS:
        raise ValueError(f"--ranks {shorten(args.ranks)}: from 1 to {MAX_RANKS}")
    if args.nodes is not None and (args.nodes < 1 or not args.ranks or args.ranks % args.nodes):
        raise ValueError(f"--nodes {shorten(args.nodes)}: with --ranks, a multiple of it")
    if args.profile and args.evaluate:
        raise ValueError("--profile: only of training, not with --evaluate")
    if args.allow_changed_data and not (args.resume or args.evaluate):
        raise ValueError("--allow-changed-data: only with --resume or --evaluate")


def _check_data(spec: RunSpec) -> None:
    """Raises ValueError for unusable data, with advice if it may have been moved."""
    try:
        task_of(spec.config).check_data(spec.config, is_main_rank(), spec.explicit_keys)
    except ValueError as error:
        raise ValueError(f"{error}{_moved_data_advice(spec)}") from None


def _moved_data_advice(spec: RunSpec) -> str:
    """Returns advice if a resumed run's data is no longer at its path, else an empty text."""
    if spec.source_run is None:
        return ""
    for key in DATA_PATHS:
        if key in dotted_keys(spec.config) and key not in spec.explicit_keys:
            path = value_of(spec.config, key)
            if path and os.sep in path and not glob.glob(path):
                return f"; the run was trained on it: if it is elsewhere now, give --set {key}=PATH"
    return ""


def _unread_notes(spec: RunSpec) -> list[str]:
    """Returns a note about the fields set by the data; --dry-run does not read it."""
    fields = task_of(spec.config).fields_from_data
    unread = [key for key in fields if key not in spec.explicit_keys]
    if spec.source_run or not unread:
        return []
    return [f"--dry-run reads no data, from which a run takes {' and '.join(unread)}"]


def _check_initial_weights(spec: RunSpec) -> None:
    """Raises ValueError if a new run's initial weights do not exist."""
    initial = spec.config.init_from
    if initial and not spec.source_run and not manifest.list_checkpoints(Path(initial)):
        raise ValueError(
            f"init_from={initial}: no checkpoint to begin with; give a run folder that has one"
        )


def check_memory(layout_report: dict[str, Any]) -> None:
    """Checks if a layout fits into memory; else the system would kill a rank without a message.

    Args:
        layout_report: The layout (`model_stats.describe_layout`).

    Raises:
        ValueError: A rank has less memory.
    """
    needed = sum(layout_report["per_rank"]["memory_bytes"].values())
    available = memory_per_rank()
    if needed > available:
        raise ValueError(
            f"a rank needs {needed / 1e9:.1f} GB and has {available / 1e9:.1f} GB (breakdown in "
            "the table above); use more ranks with a larger mesh.ep or zero_stage, or a smaller "
            "model or batch"
        )


def _resolve(args: argparse.Namespace) -> RunSpec:
    """Builds the spec for a new, a resumed, an evaluated or a grown run.

    Args:
        args: The parsed command line.

    Returns:
        The spec, still without its layout, `profile` and `allow_changed_data`.

    Raises:
        ValueError: The arguments do not fit together, or the run to resume cannot be used.
    """
    if args.resume == AUTO:
        return _new_or_resumed(args)
    source_run = args.resume or args.evaluate
    creates_folder = args.name is not None or args.grow is not None
    if (
        (args.name is None) == (source_run is None)
        or (args.resume and args.evaluate)
        or (args.folder and not creates_folder)
    ):
        raise ValueError(
            "give one of: NAME, --resume RUN, --evaluate RUN (and --folder PATH with NAME or "
            "--grow alone)"
        )
    if args.grow is not None and not args.resume:
        raise ValueError(f"--grow {args.grow}: only with --resume RUN")
    if args.grow_noise is not None and args.grow is None:
        raise ValueError(f"--grow-noise {args.grow_noise}: only with --grow N")
    if args.folder and manifest.list_checkpoints(args.folder):
        raise ValueError(
            f"--folder {args.folder}: holds a run already; use --resume {args.folder} to continue "
            "it"
        )
    if source_run is not None:
        return _resumed(args, source_run)
    config, notes = _new_config(args)
    return RunSpec(
        config,
        read_ds_config(config),
        args.folder,
        explicit_keys=keys_of(args.set),
        notes=tuple(notes),
    )


def _resumed(args: argparse.Namespace, source_run: Path) -> RunSpec:
    """Builds the spec for a resumed, an evaluated or a grown run.

    Args:
        args: The parsed command line.
        source_run: The run folder given by --resume or --evaluate.

    Returns:
        The spec with `source_run`'s config and the --set values. Its folder is `source_run`, or
        with --grow the --folder argument (None: a new one).

    Raises:
        ValueError: A field may not change, or the run to resume cannot be read.
    """
    explicit_keys = keys_of(args.set)
    kept_config, note = read_config(source_run, explicit_keys)
    if note:
        print_on_main(f"note: {note}", sys.stderr)
    may_change = MAY_CHANGE
    if args.grow:
        section, _ = moe_section(kept_config) or ("", None)
        may_change = (*MAY_CHANGE, f"{section}.k", "name")
    for key in sorted(explicit_keys):
        if key in dotted_keys(kept_config) and not key.startswith(may_change):
            raise ValueError(
                f"--set {key}: {source_run} cannot go on with another value; fields that may "
                f"change: {', '.join(may_change)}"
            )
    if "mesh.ep" not in explicit_keys:
        kept_config = _fit_ep(kept_config)
    config = override(kept_config, args.set)
    check_config(config)
    _print_moved_data(kept_config, config)
    if args.resume and config.optim.schedule == "cosine" and config.steps != kept_config.steps:
        print_on_main(
            f"note: the learning rate continues as if the run had always had {config.steps} steps, "
            f"not {kept_config.steps}"
        )
    if args.resume and (source_run / METRICS_FILE).exists():
        read_metrics(source_run)  # raises for a damaged file, before any work
    manifest.require_checkpoints(source_run)
    folder = source_run
    upcycling = None
    if args.grow is not None:
        make_batch_layout(config, world_size())  # the same ranks read the saved experts
        folder = args.folder
        upcycling = _upcycling(args, config)
        config = upcycling.grow_config(config)
        check_config(config)
    return RunSpec(
        config,
        read_ds_config(config),
        folder,
        source_run,
        upcycling=upcycling,
        evaluate=bool(args.evaluate),
        explicit_keys=explicit_keys,
    )


def _new_or_resumed(args: argparse.Namespace) -> RunSpec:
    """Builds the spec for `--resume auto`: the run in --folder continues, or begins.

    Args:
        args: The parsed command line.

    Returns:
        The spec with the named config. If --folder has checkpoints, the kept run's data-determined
        sizes replace the named config's.

    Raises:
        ValueError: Arguments are missing or too many, or the folder has a run with another config.
    """
    if args.name is None or args.folder is None or args.evaluate or args.grow is not None:
        raise ValueError(
            "--resume auto: give NAME and --folder PATH with it, and neither --evaluate nor --grow"
        )
    config, notes = _new_config(args)
    config = _fit_ep(config)
    explicit_keys = keys_of(args.set)
    if manifest.list_checkpoints(args.folder):
        # whatever config.json contains, it is written again
        kept_config, note = read_config(args.folder, dotted_keys(config))
        if note:
            print_on_main(f"note: {note}", sys.stderr)
        config = _merge(config, kept_config, explicit_keys, args.folder)
        _print_moved_data(kept_config, config)
    return RunSpec(
        config,
        read_ds_config(config),
        args.folder,
        args.folder,
        auto_resume=True,
        explicit_keys=explicit_keys,
        notes=tuple(notes),
    )


def _merge(
    config: Config, kept_config: Config, explicit_keys: frozenset[str], folder: Path
) -> Config:
    """Merges the command line's config with the kept run's.

    Args:
        config: The named config with the --set values.
        kept_config: The config of the run in `folder`.
        explicit_keys: Dotted keys in --set; they keep `config`'s values.
        folder: The run folder, for the error.

    Returns:
        `config` with the kept run's data-determined sizes.

    Raises:
        ValueError: Another field differs, and a resumed run may not change it.
    """
    from_data = task_of(config).fields_from_data
    # name and task come first: configs with equal names and tasks have the same fields
    for key in dotted_keys(config):
        kept = value_of(kept_config, key)
        given = value_of(config, key)
        if kept == given:
            continue
        if key in from_data and key not in explicit_keys:
            config = override(config, [f"{key}={kept}"])
        elif not key.startswith(MAY_CHANGE):
            raise ValueError(
                f"--folder {folder}: trained with {key}={kept}, not {given}; give another folder"
            )
    return config


def named_config(name: str, assignments: list[str]) -> tuple[Config, list[str]]:
    """Builds a named config with the --set values, and checks it.

    Args:
        name: The config's name.
        assignments: Texts KEY=VALUE.

    Returns:
        The config, with group sizes reduced by `fit_groups`, and a note about each reduced size.

    Raises:
        ValueError: The name or a key is unknown, or a value is invalid.
    """
    config = override(papers.get(name), assignments)
    check_config(config)
    return fit_groups(config, keys_of(assignments))


def _new_config(args: argparse.Namespace) -> tuple[Config, list[str]]:
    """Returns a new run's config, and notes.

    Without --set mesh.ep, experts are spread over a node's ranks: ep is the greatest common divisor
    of the two numbers.
    """
    config, notes = named_config(args.name, args.set)
    section = moe_section(config)
    if section and "mesh.ep" not in keys_of(args.set):
        moe = section[1]
        num_spread = getattr(moe, "num_groups", None) or moe.num_experts
        ranks_here = args.ranks // (args.nodes or 1) if args.ranks else ranks_per_node()
        config = override(config, [f"mesh.ep={math.gcd(num_spread, ranks_here)}"])
    return config, notes


def _fit_ep(config: Config) -> Config:
    """Returns the config with an expert-parallel degree reduced to divide the rank count."""
    if world_size() % config.mesh.ep:
        ep = math.gcd(config.mesh.ep, world_size())
        print_on_main(
            f"note: mesh.ep={ep}, because {config.mesh.ep} does not divide the number of ranks, "
            f"{world_size()}; the result is the same"
        )
        config = override(config, [f"mesh.ep={ep}"])
    return config


def _print_moved_data(kept_config: Config, config: Config) -> None:
    """Prints the new paths of a resumed run's data."""
    for key in DATA_PATHS:
        if key not in dotted_keys(config):
            continue
        before = value_of(kept_config, key)
        now = value_of(config, key)
        if before != now:
            print_on_main(f"note: {key}={now}, which was {before}; it must hold the same data")


def _upcycling(args: argparse.Namespace, config: Config) -> Upcycling:
    """Checks --grow and --grow-noise, and prints a note about the expert copies.

    Args:
        args: The parsed command line, with --grow.
        config: The run's config before it grows.

    Returns:
        The growth, with the run's seed; without --grow-noise its noise is 0.01.

    Raises:
        ValueError: --grow or --grow-noise is out of range, or the run has no experts.
    """
    if args.grow < 2:
        raise ValueError(f"--grow {shorten(args.grow)}: 2 or more")
    section = moe_section(config)
    if not section:
        raise ValueError(f"--grow {args.grow}: {args.resume} has no experts")
    noise = 0.01 if args.grow_noise is None else args.grow_noise
    if not 0 <= noise <= 1:
        raise ValueError(f"--grow-noise {noise}: from 0 to 1")
    num_experts = section[1].num_experts
    print_on_main(
        f"note: {num_experts} experts become {num_experts * args.grow}; copies differ by up to "
        f"{noise:.3g}"
    )
    return Upcycling(args.grow, noise, config.seed)
