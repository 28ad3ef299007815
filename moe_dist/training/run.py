"""The command line of train.py, and the run folder that it opens.

RUN/config.json  RUN/layout.json  RUN/metrics.jsonl  RUN/checkpoints/  RUN/report.html  RUN/report/*.png
RUN/profile/  RUN/wandb/  RUN/lock
"""

import argparse
import contextlib
import errno
import fcntl
import glob
import json
import math
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from statistics import mean
from typing import IO, Any

from tqdm import tqdm

from moe_dist.checkpoint import manifest
from moe_dist.checkpoint.format import read_state
from moe_dist.checkpoint.sealed_config import read_config
from moe_dist.checkpoint.upcycle import Upcycling
from moe_dist.config import papers, run_folder
from moe_dist.config.messages import shorten
from moe_dist.config.overrides import dotted_keys, fit_groups, keys_of, override, to_json, value_of
from moe_dist.config.run_folder import SUBFOLDERS, is_same_file, make_folder, open_existing, write
from moe_dist.config.schema import Config, moe_section
from moe_dist.config.validate import check_config
from moe_dist.distributed.batch_layout import make_batch_layout
from moe_dist.distributed.collectives import run_on_main
from moe_dist.distributed.launch_env import (
    check_launch_environment,
    memory_per_rank,
    num_nodes,
    ranks_per_node,
    world_size,
)
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.ds_config import read_ds_config
from moe_dist.monitoring.console import is_main_rank, print_on_main
from moe_dist.monitoring.metric_format import format_metric
from moe_dist.monitoring.metrics_file import FILE_NAME as METRICS
from moe_dist.monitoring.metrics_file import read_metrics
from moe_dist.monitoring.wandb_logger import wandb_mode_of
from moe_dist.tasks.registry import task_of
from moe_dist.training.args import parse_args
from moe_dist.training.errors import plain_errors
from moe_dist.training.model_stats import describe_layout, format_layout

MOST_RANKS = 2**20
AUTO = Path("auto")  # of --resume: from --folder, where it has a checkpoint


@dataclass
class TrainingRun:
    """What the command line asks for. `earlier` is the run to go on from, None for a new one, and `checkpoint` its
    newest whole checkpoint, which `route_noisy` finds, with newer ones that were `refused`. With `growth` its experts become
    more, in a run folder of their own. With `auto` there may be no checkpoint yet, and nothing left to do."""

    config: Config
    ds_config: dict[str, Any]
    folder: Path | None
    source_run: Path | None = None
    checkpoint: Path | None = None
    refused: dict[Path, str] = field(default_factory=dict)
    growth: Upcycling | None = None
    evaluate: bool = False
    auto_resume: bool = False
    profile: bool = False
    explicit_keys: frozenset[str] = frozenset()  # dotted keys that --set names
    notes: list[str] = field(default_factory=list)  # about the config, one line each
    allow_changed_data: bool = False
    layout_report: dict[str, Any] = field(default_factory=dict)  # the layout, of `summary.describe`
    lock: IO[bytes] | None = None  # of the folder, on the main rank, once it is open
    restoring: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def saved(self) -> dict[str, Any]:
        """The state beside the checkpoint's tensors."""
        return read_state(self.checkpoint) if self.checkpoint else {"step": 0}

    @property
    def first_step(self) -> int:
        """Steps done."""
        return self.saved["step"]

    @property
    def finished(self) -> bool:
        return self.first_step >= self.config.steps

    @property
    def lock_timeout_s(self) -> int:
        """Seconds that a run which goes on by itself waits for what killed ranks have left to end."""
        return 20 if self.auto_resume else 0

    @property
    def wandb_id(self) -> str | None:
        return None if self.growth else self.saved.get("wandb_id")

    def last_losses(self) -> dict[str, float]:
        """Returns the last training loss of the run that goes on, where its metrics can be read. A collective."""

        def read() -> dict[str, float]:
            with contextlib.suppress(ValueError, OSError):
                for line in reversed(read_metrics(self.source_run) if self.source_run else []):
                    if "train/loss" in line:
                        return {"train/loss": line["train/loss"]}
            return {}

        return run_on_main(read)

    def task_metadata(self) -> dict[str, Any] | None:
        """What the task of the run that goes on knew; None for a new one."""
        return self.saved if self.checkpoint else None

    def find_checkpoint(self, mesh: Mesh) -> None:
        """Finds the checkpoint to go on from, and says which were refused. A collective, for all are read whole.

        Raises ValueError, on every rank, where none is whole or has steps to go.
        """
        earlier = self.source_run
        if not earlier or (
            self.auto_resume and not run_on_main(lambda: manifest.list_checkpoints(earlier))
        ):
            return
        self.checkpoint, self.refused = manifest.newest_complete(earlier, mesh.checkpoint_group)
        for reason in self.refused.values():
            print_on_main(f"warning: {reason}. Refused; using {self.checkpoint.name}", sys.stderr)
        done, steps = f"{earlier}: has done {self.first_step} steps", self.config.steps
        done += f", and steps={steps} is fewer" if steps < self.first_step else ", all of them"
        done += "; --set steps=N with more goes on"
        if self.auto_resume:
            print_on_main(f"note: {done}" if self.finished else f"goes on from {self.checkpoint}")
        elif self.finished and not self.evaluate:
            raise ValueError(done)

    def adopt_config(self, config: Config) -> None:
        """Takes over the config as the data determines it, and prints the lines of the layout's table that change.

        Raises:
            ValueError: The model is too large now.
        """
        if config == self.config:
            return
        before = format_layout(self.layout_report).splitlines()
        layout, model = make_batch_layout(config, world_size()), task_of(config).build_model(config)
        self.config, self.layout_report = (
            config,
            describe_layout(config, layout, self.ds_config, model, num_nodes()),
        )
        changed = [
            line for line in format_layout(self.layout_report).splitlines() if line not in before
        ]
        print_on_main("\n".join(changed))
        _check_memory(self.layout_report)

    def open_folder(self) -> Path:
        """The run folder, the same on every rank, with the config in it. Raises ValueError on every rank where it
        cannot be written, or where another run is using it."""
        self.folder = run_on_main(self._claim)
        return self.folder

    def check_folder(self) -> None:
        """Finds before any work, and writes nothing, what `open` would find after it."""
        folder = self.folder or Path("runs")
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(
                f"{folder}: cannot be written ({there} is no folder to write to); give another --folder"
            )
        try:
            for name in SUBFOLDERS:
                run_folder.check_folder(folder, name)
            if os.path.lexists(folder / "lock"):
                with _open_lock(folder) as lock:
                    _lock(lock, folder, self.lock_timeout_s)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be written ({run_folder.reason(error)})") from None

    def _claim(self) -> Path:
        """Makes the folder this process's own for as long as it lives."""
        name = f"{self.config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        folder = self.folder or Path("runs") / name
        if self.evaluate:
            return folder
        try:
            make_folder(folder)
            self.lock = _open_lock(folder)
            _lock(self.lock, folder, self.lock_timeout_s)
            for name, text in self._files().items():
                if not (
                    self.finished and (folder / name).exists()
                ):  # nothing is trained, so what was stays told
                    write(folder, name, text)
        except OSError as error:
            raise ValueError(
                f"{folder}: cannot be written ({run_folder.reason(error)}); give another --folder"
            ) from None
        return folder

    def _files(self) -> dict[str, str]:
        """Returns by name the files of the run folder that describe the run."""
        return {
            "config.json": to_json(self.config),
            "layout.json": json.dumps(self.layout_report, indent=2),
        }

    def restore(self) -> None:
        """Makes the run folder again where it was removed or renamed since `open`, with a warning.

        It does so on the main rank; on others it does nothing. Any thread may call it.

        Raises:
            OSError: The folder cannot be made again, or another run is using it now.
        """
        with self.restoring:
            if self.lock and self.folder:
                self._restore(self.lock, self.folder)

    def _restore(self, held: IO[bytes], folder: Path) -> None:
        missing = {
            name: text for name, text in self._files().items() if not (folder / name).exists()
        }
        gone = list(missing)
        if not is_same_file(held.fileno(), folder / "lock"):
            make_folder(folder)
            lock = _open_lock(folder)
            try:
                _lock(lock, folder, 0)
            except ValueError as error:
                lock.close()
                raise OSError(str(error)) from None
            self.lock = lock
            held.close()
            gone.append("lock")
        for name, text in missing.items():
            write(folder, name, text)
        if gone:
            reason = f"{', '.join(gone)} removed or renamed while it trains; written again"
            tqdm.write(f"warning: {folder}: {reason}", file=sys.stderr)


def _open_lock(folder: Path) -> IO[bytes]:
    return open(open_existing(folder / "lock", os.O_RDWR | os.O_CREAT), "r+b")


def _lock(file: IO[Any], folder: Path, seconds: int) -> None:
    """`step_seconds`: how long to wait for it. Some file systems of clusters have no locks."""
    for left in reversed(range(seconds + 1)):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if left == 0:
                raise ValueError(
                    f"{folder}: in use by a run that has not ended; wait for it, or stop it"
                ) from None
            time.sleep(1)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            print_on_main(
                f"warning: {folder}: its disk has no locks ({error.strerror}); do not start two runs in it",
                sys.stderr,
            )
            return


def parse_run(argv: list[str], doc: str | None) -> TrainingRun:
    """Reads the command line. Prints and exits for --list and --dry-run; a mistake is one line and exit status 2."""
    args = parse_args(argv, doc)
    with plain_errors():
        if (args.json or args.ranks is not None) and not args.dry_run:
            raise ValueError("--json and --ranks: only with --dry-run")
        if args.ranks is not None and not 1 <= args.ranks <= MOST_RANKS:
            raise ValueError(f"--ranks {shorten(args.ranks)}: from 1 to {MOST_RANKS}")
        if args.nodes is not None and (args.nodes < 1 or not args.ranks or args.ranks % args.nodes):
            raise ValueError(f"--nodes {shorten(args.nodes)}: with --ranks, a multiple of it")
        if args.profile and args.evaluate:
            raise ValueError("--profile: only of training, not with --evaluate")
        if args.allow_changed_data and not (args.resume or args.evaluate):
            raise ValueError("--allow-changed-data: only with --resume or --evaluate")
        check_launch_environment()
        run = _resolve(args)
        wandb_mode_of(run.config.wandb.mode)
        task = task_of(run.config)
        if not args.dry_run:  # which tells of a model without its data
            try:
                task.check_data(run.config, is_main_rank(), run.explicit_keys)
            except ValueError as error:
                raise ValueError(f"{error}{_elsewhere(run)}") from None
        layout = make_batch_layout(run.config, args.ranks or world_size())
        model = task.build_model(run.config)
        if run.config.baseline:
            _kept_metrics(run.config.baseline)
        told = describe_layout(run.config, layout, run.ds_config, model, args.nodes or num_nodes())
    if args.dry_run and (
        unread := [
            key
            for key in task.fields_from_data
            if key not in run.explicit_keys and not run.source_run
        ]
    ):
        run.notes.append(f"--dry-run reads no data, from which a run takes {' and '.join(unread)}")
    notes = [f"note: {note}" for note in run.notes]
    print_on_main(json.dumps(told) if args.json else "\n".join([format_layout(told), *notes]))
    if args.dry_run:
        sys.exit(0)
    with plain_errors():
        if (
            run.config.init_from
            and not run.source_run
            and not manifest.list_checkpoints(Path(run.config.init_from))
        ):
            raise ValueError(
                f"init_from={run.config.init_from}: no checkpoint to begin with; give a run folder that has one"
            )
        _check_memory(told)
        if is_main_rank() and not run.evaluate:
            run.check_folder()
    run.layout_report, run.profile, run.allow_changed_data = (
        told,
        args.profile,
        args.allow_changed_data,
    )
    return run


def _check_memory(told: dict[str, Any]) -> None:
    """Checks that a rank has the memory of a layout, because the system would kill the rank without a message.

    Args:
        told: The layout (`summary.describe`).

    Raises:
        ValueError: A rank has less memory.
    """
    needed = sum(told["per_rank"]["memory_bytes"].values())
    if needed > (has := memory_per_rank()):
        raise ValueError(
            f"a rank needs {needed / 1e9:.1f} GB and has {has / 1e9:.1f} GB: the table above tells what for; more "
            f"ranks with a larger mesh.ep or zero, or a smaller model or batch would do"
        )


# where data lies: whether it is the same there is seen by its fingerprint
PLACES = ("data.text", "data.images", "data.image_root", "data.sentences", "data.questions")
# what a run that goes on, or is evaluated, may change: nothing that its checkpoint or its place in the data depends on
MAY_CHANGE = (
    *PLACES,
    "steps",
    "log_every",
    "eval_every",
    "save_every",
    "keep_last_n",
    "async_save",
    "ds_config",
    "zero_stage",
    "baseline",
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
    "write_report",
    "wandb.",
)


def _elsewhere(run: TrainingRun) -> str:
    """Returns advice for a run that goes on where its data is no longer in its place, else nothing."""
    for key in PLACES:
        if run.source_run and key in dotted_keys(run.config) and key not in run.explicit_keys:
            place = value_of(run.config, key)
            if place and os.sep in place and not glob.glob(place):
                return f"; the run was trained on it: where it lies elsewhere now, give --set {key}=PLACE"
    return ""


def _resolve(args: argparse.Namespace) -> TrainingRun:
    if args.resume == AUTO:
        return _begin_or_go_on(args)
    earlier = args.resume or args.evaluate
    new = args.name is not None or args.grow is not None
    if (
        (args.name is None) == (earlier is None)
        or (args.resume and args.evaluate)
        or (args.folder and not new)
    ):
        raise ValueError(
            "give one of: NAME, --resume RUN, --evaluate RUN (and --folder PATH with NAME or --grow alone)"
        )
    if args.grow is not None and not args.resume:
        raise ValueError(f"--grow {args.grow}: only with --resume RUN")
    if args.grow_noise is not None and args.grow is None:
        raise ValueError(f"--grow-noise {args.grow_noise}: only with --grow N")
    if args.folder and manifest.list_checkpoints(args.folder):
        raise ValueError(
            f"--folder {args.folder}: holds a run already; --resume {args.folder} goes on with it"
        )
    explicit = keys_of(args.set)
    if earlier is None:
        config, notes = _new_config(args)
        return TrainingRun(
            config, read_ds_config(config), args.folder, explicit_keys=explicit, notes=notes
        )
    config, note = read_config(earlier, explicit)
    if note:
        print_on_main(f"note: {note}", sys.stderr)
    section = (moe_section(config) or ("", None))[0]
    may_change = MAY_CHANGE + ((f"{section}.k", "name") if args.grow else ())
    for key in sorted(explicit):
        if key in dotted_keys(config) and not key.startswith(may_change):
            raise ValueError(
                f"--set {key}: {earlier} cannot go on with another; what may change: {', '.join(may_change)}"
            )
    config = _fit_ep(config)
    before, config = config, override(config, args.set)
    check_config(config)
    _tell_places(before, config)
    steps = before.steps
    if args.resume and config.optim.schedule == "cosine" and config.steps != steps:
        print_on_main(
            f"note: the learning rate goes on as if the run had always had {config.steps} steps, not {steps}"
        )
    if args.resume and (earlier / METRICS).exists():
        read_metrics(earlier)
    manifest.require_checkpoints(earlier)
    folder, growth = earlier, None
    if args.grow is not None:
        make_batch_layout(config, world_size())  # for the saved experts are read by the same ranks
        folder, growth = args.folder, _growth(args, config)
        config = growth.grow_config(config)
        check_config(config)
    return TrainingRun(
        config,
        read_ds_config(config),
        folder,
        earlier,
        growth=growth,
        evaluate=bool(args.evaluate),
        explicit_keys=explicit,
    )


def named_config(name: str, assignments: list[str]) -> tuple[Config, list[str]]:
    """Returns a named config with the assignments of --set, and notes about groups of samples that follow from them.

    Raises:
        ValueError: As `override` and `check` do.
    """
    config = override(papers.get(name), assignments)
    check_config(config)
    return fit_groups(config, keys_of(assignments))


def _new_config(args: argparse.Namespace) -> tuple[Config, list[str]]:
    """Returns the config of a new run, and notes. Where --set mesh.ep does not say more, experts are spread over the
    ranks of a node, as far as they divide."""
    config, notes = named_config(args.name, args.set)
    if (experts := moe_section(config)) and not any(
        text.startswith("mesh.ep=") for text in args.set
    ):
        spread = getattr(experts[1], "num_groups", None) or experts[1].num_experts
        here = args.ranks // (args.nodes or 1) if args.ranks else ranks_per_node()
        config = override(config, [f"mesh.ep={math.gcd(spread, here)}"])
    return config, notes


def _fit_ep(config: Config) -> Config:
    """The layout is no part of the result, so any that fits will do."""
    if world_size() % config.mesh.ep:
        ep = math.gcd(config.mesh.ep, world_size())
        print_on_main(
            f"note: mesh.ep={ep} on these ranks, which {config.mesh.ep} does not divide; the result is the same"
        )
        config = override(config, [f"mesh.ep={ep}"])
    return config


def _begin_or_go_on(args: argparse.Namespace) -> TrainingRun:
    if args.name is None or args.folder is None or args.evaluate or args.grow is not None:
        raise ValueError(
            "--resume auto: give NAME and --folder PATH with it, and neither --evaluate nor --grow"
        )
    config, notes = _new_config(args)
    config, explicit = _fit_ep(config), keys_of(args.set)
    if manifest.list_checkpoints(args.folder):
        from_data = task_of(config).fields_from_data
        before, note = read_config(
            args.folder, dotted_keys(config)
        )  # whatever config.json has, it is written again
        if note:
            print_on_main(f"note: {note}", sys.stderr)
        for key in dotted_keys(config):  # name and task first: the same ones have the same fields
            kept, asked = (attrgetter(key)(each) for each in (before, config))
            if kept != asked and key in from_data and key not in explicit:
                config = override(config, [f"{key}={kept}"])
            elif kept != asked and not key.startswith(MAY_CHANGE):
                raise ValueError(
                    f"--folder {args.folder}: trained with {key}={kept}, not {asked}; give another folder"
                )
        _tell_places(before, config)
    return TrainingRun(
        config,
        read_ds_config(config),
        args.folder,
        args.folder,
        auto_resume=True,
        explicit_keys=explicit,
        notes=notes,
    )


def _tell_places(before: Config, config: Config) -> None:
    """Prints where the data of a run that goes on lies now, if it lay elsewhere."""
    for key in (key for key in PLACES if key in dotted_keys(config)):
        was, now = (value_of(each, key) for each in (before, config))
        if was != now:
            print_on_main(f"note: {key}={now}, which was {was}; it must hold the same data")


def _growth(args: argparse.Namespace, config: Config) -> Upcycling:
    if args.grow < 2:
        raise ValueError(f"--grow {shorten(args.grow)}: 2 or more")
    experts = moe_section(config)
    if not experts:
        raise ValueError(f"--grow {args.grow}: {args.resume} has no experts")
    noise = 0.01 if args.grow_noise is None else args.grow_noise
    if not 0 <= noise <= 1:
        raise ValueError(f"--grow-noise {noise}: from 0 to 1")
    num_experts = experts[1].num_experts
    print_on_main(
        f"note: {num_experts} experts become {num_experts * args.grow}, of which copies differ by up to {noise:.3g}"
    )
    return Upcycling(args.grow, noise, config.seed)


def result_lines(run: TrainingRun, told: str, updates: int) -> str:
    """What the task told of its test metrics and, where the config names kept metrics, the baseline's."""
    lines = [told]
    steps = run.first_step if run.evaluate else run.config.steps
    if updates < steps:
        lines += [
            f"{steps - updates} of {steps} steps were skipped, their gradients not finite: a lower optim.lr may help"
        ]
    if run.config.baseline:
        lines += _baseline(run.config, run.config.baseline, named="baseline" in run.explicit_keys)
    return "\n".join([*lines, f"run folder: {run.folder}"])


def _kept_metrics(compare: str) -> dict[str, Any] | None:
    """None where there is no such file. Raises ValueError for one that holds something else."""
    path = Path(__file__).parents[2] / compare
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text())
    except ValueError:
        kept = None
    if not isinstance(kept, dict) or not {"given", "arms", "command"} <= kept.keys():
        raise ValueError(
            f"baseline={compare}: no kept metrics; give a file that an experiment wrote, or none"
        )
    return kept


def _baseline(config: Config, compare: str, named: bool) -> list[str]:
    """Returns lines about the kept metrics. Where they do not compare there are none, unless the user `named` them."""
    kept = _kept_metrics(compare)
    if kept is None:
        return [f"no kept metrics {compare} to compare with"] if named else []
    task = task_of(config)
    if task.comparison_key(config) != kept["given"]:
        return [f"not comparable with {compare}: other data, batch or steps"] if named else []
    lines = [
        f"kept runs of the same data and steps, each at its own best learning rate ({compare}):"
    ]
    for name, arm in kept["arms"].items():
        seeds = arm[f"test_{task.primary_metric}"]
        each = ", ".join(format_metric(task.primary_metric, seed, ".2f") for seed in seeds)
        average = format_metric(task.primary_metric, mean(seeds), ".2f")
        lines.append(
            f"  {name:<18} mean {average} over {len(seeds)} seeds ({each}), lr {arm['lr']:g}"
        )
    return [*lines, f"  repeat with: {kept['command']}"]
