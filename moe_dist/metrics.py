"""What a user sees of a run: its curves on disk, its progress on the terminal, and wandb."""

import contextlib
import io
import json
import math
import os
import pathlib
import queue
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from moe_dist import run_folder
from moe_dist.config import WANDB_MODES
from moe_dist.measures import headline, written

FILE_NAME = "metrics.jsonl"
_BY_EXPERT = ("/importance", "/load")  # keys of lists end with one of these
_LISTS = (*_BY_EXPERT, "memory/peak_bytes")
_TEXTS = ("train/not_finite",)
_MOST_STEPS = 10**9
_LONGEST_KEY = 200  # characters: pictures are named by layers
_LINE_SECONDS = 2.0  # least time between two progress lines
_WANDB_INIT_SECONDS = 15.0
_FAILED_SECONDS = 15.0  # that a run which fails waits for wandb: launchers kill after 30
_WANDB_FINISH_SECONDS = 20.0  # what is not uploaded by then stays on disk for `wandb sync`
_WANDB_QUEUE = 10_000  # lines wandb may lie behind, which a fast run has logged while a server is waited for
_WANDB_MODES = {"run": "online", "dryrun": "offline", "disabled": "off"}  # of WANDB_MODE, by other names than ours
HIDDEN = re.compile(r"moe/.+/p\d+_over_mean_load|exchange/.+_bytes")  # in wandb: `panels` draws them together


def wandb_mode_of(mode: str) -> str:
    """Returns a config's wandb mode as the environment has it: WANDB_MODE replaces "online", which is the default.

    Raises:
        ValueError: The mode, or WANDB_MODE, is unknown.
    """
    if mode not in WANDB_MODES:
        raise ValueError(f"wandb mode {mode!r} is unknown: use one of {', '.join(WANDB_MODES)}")
    asked = os.environ.get("WANDB_MODE") or mode
    if (asked := _WANDB_MODES.get(asked, asked)) not in (*WANDB_MODES, "shared"):
        known = ", ".join((*WANDB_MODES, "shared", *_WANDB_MODES))
        raise ValueError(f"WANDB_MODE={asked!r:.80} in the environment is unknown: use one of {known}")
    return asked if mode == "online" else mode


class Metrics:
    """Writes the curves of one run to `run/metrics.jsonl`, the terminal and wandb.

    `enabled` is true on rank 0 only; elsewhere every method does nothing. A line with step s describes the state
    after s optimizer steps, so a run that goes on from `start_step` first drops the lines of later steps, and one that
    starts at 0 starts an empty file: log step s before the checkpoint of step s is written.

    `wandb_mode` is "online" (or what WANDB_MODE says), "offline" or "off". Online runs are offline where nobody is
    logged in or the server cannot be used, in a folder for `wandb sync`. Whatever else goes wrong in wandb is one
    warning on stderr, and the run goes on without it. `wandb_id` names the wandb run (None: a new one, or none); keep
    it in the checkpoint and pass it back on resume. `wandb_labels` are the "project", "group", "tags" (with commas
    between them) and "notes" of a run; for what is not there the environment counts (WANDB_PROJECT and so on).

    Raises ValueError for an unknown mode, and for a metrics file that it cannot read on resume.
    """

    def __init__(
        self,
        run: pathlib.Path,
        config: dict,
        *,
        enabled: bool,
        wandb_mode: str,
        total_steps: int,
        start_step: int = 0,
        wandb_id: str | None = None,
        wandb_labels: Mapping[str, str | None] = MappingProxyType({}),
        restore: Callable[[], None] = lambda: None,
    ) -> None:
        mode = wandb_mode_of(wandb_mode)
        self.wandb_id = wandb_id
        self._enabled = enabled
        if not enabled:
            return
        self._restore = restore
        self._start_step, self._total_steps = start_step, total_steps
        self._run = run
        _keep_until(run, start_step)
        self._file = _open(run)
        self._waiting = b""  # lines that a full disk did not take
        self._wandb: _WandbThread | None = None
        if mode != "off":
            self.wandb_id = wandb_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
            self._wandb = _WandbThread(run, config, mode, self.wandb_id, wandb_labels)
        self._headline: dict[str, str] = {}
        self._shown = (start_step, "")
        self._start_time, self._line_time = time.monotonic(), -_LINE_SECONDS
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            bar_format = "step {n_fmt}/{total_fmt} |{bar}| {desc}  eta {remaining}"
            self._bar = tqdm(initial=start_step, total=total_steps, bar_format=bar_format, dynamic_ncols=True)

    def log(self, step: int, values: Mapping[str, float | list[float] | str]) -> None:
        """Appends one line to the metrics file, and shows it: as curves in wandb, and its headline on the terminal.

        A list, of a number per expert, is a histogram in wandb. What is not finite is null in the file, for JSON has
        no word for it.
        """
        if not self._enabled:
            return
        line = json.dumps({"step": step} | {key: _or_null(value) for key, value in values.items()})
        self._append(line.encode() + b"\n")
        if self._wandb:
            compact = {key: _as_number(value) for key, value in values.items()}
            self._wandb.put(step, lambda: compact)
        self._headline |= dict(_headline(values))
        self._show(step, "  ".join(f"{name} {text}" for name, text in self._headline.items()))

    def pictures(self, step: int, draw: Callable[[], list[pathlib.Path]]) -> None:
        """Gives wandb the PNG and HTML files that `draw` returns, and the charts of `panels`. It is called in wandb's
        thread; without wandb, never."""

        def make() -> dict[str, Any]:
            from moe_dist.panels import charts  # here, as matplotlib is by `draw`: for wandb alone

            return {f"report/{path.stem}": path for path in draw()} | charts(read_metrics(self._run))

        if self._enabled and self._wandb:
            self._wandb.put(step, make)

    def _append(self, line: bytes) -> None:
        """What a full disk does not take is told once, and waits for the next line: the run goes on."""
        told, self._waiting = bool(self._waiting), self._waiting + line
        try:
            self._restore()
            if not run_folder.is_same(self._file.fileno(), self._run / FILE_NAME):
                self._write_again()
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not told:
                reason = f"{self._run / FILE_NAME}: {error.strerror or error}"
                tqdm.write(f"warning: {reason}; its lines wait in memory", file=sys.stderr)

    def _write_again(self) -> None:
        """Writes to the run folder the lines of a file that was removed from it."""
        self._file.seek(0)
        with run_folder.replacing(self._run, FILE_NAME) as file:
            shutil.copyfileobj(self._file, file)
        removed = self._file
        self._file = _open(self._run)
        removed.close()

    def _show(self, step: int, text: str) -> None:
        """How far the run is: a live bar on a terminal, elsewhere a plain line at most every two seconds."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_description_str(text)  # drawn at once, for an evaluation is no step further
        elif (step, text) != self._shown and (step >= self._total_steps or now - self._line_time >= _LINE_SECONDS):
            self._line_time, self._shown = now, (step, text)
            seconds = (now - self._start_time) * (self._total_steps - step) / max(1, step - self._start_step)
            eta = tqdm.format_interval(seconds)
            print(f"step {step}/{self._total_steps}  {text}  eta {eta}", file=sys.stderr, flush=True)

    def end_progress(self) -> None:
        """Ends the live bar, before other lines are printed."""
        if self._enabled and self._bar is not None:
            self._bar.close()

    def close(self, exit_code: int = 0, seconds: float | None = None) -> None:
        """Ends the bar, the file and wandb. A second call does nothing.

        Args:
            exit_code: The status of the run in wandb: 0 for finished, any other for failed.
            seconds: The longest wait for wandb. None for as long as it may take to connect and then to upload.
        """
        if not self._enabled:
            return
        self.end_progress()
        self._enabled = False
        self._file.close()
        if self._wandb:
            self._wandb.close(exit_code, _WANDB_INIT_SECONDS + _WANDB_FINISH_SECONDS if seconds is None else seconds)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.close(1, _FAILED_SECONDS)


def read_metrics(run: pathlib.Path) -> list[dict]:
    """Returns the lines of `run/metrics.jsonl` in order, less a last line that a killed run left torn.

    A null is NaN, and a list a float32 array of shape [E].

    Raises:
        ValueError: There is no such file, or a line of it is not JSON, has no step or has a value that no run writes.
    """
    path = run / FILE_NAME
    if not path.is_file():
        raise ValueError(f"no metrics file {path}: give the folder of a run that has started")
    lines = []
    experts: dict[str, int] = {}  # by key of a list
    for number, _, values in _lines(path):
        if isinstance(values, str):
            raise ValueError(f"{path} line {number} {values}: mend or remove it")
        for key, value in values.items():
            # of memory there is a number for each rank, and a run may go on with others
            if key.endswith(_BY_EXPERT) and len(value) != experts.setdefault(key, len(value)):
                told = f"has {len(value)} numbers in {key!r}, where an earlier line has {experts[key]}"
                raise ValueError(f"{path} line {number} {told}: mend or remove it")
        lines.append(values)
    return lines


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes, dict | str]]:
    """Yields of each complete line of a metrics file its number, itself, and its values or why it cannot be read."""
    with open(run_folder.open_existing(path), "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError):
                    yield number, line, f"is not JSON ({line[:80]!r})"
                    continue
                step = values.get("step") if isinstance(values, dict) else None
                if type(step) is not int or not 0 <= step <= _MOST_STEPS:
                    yield number, line, f"has no step ({line[:80]!r})"
                    continue
                if strange := [key for key, value in values.items() if not _is_told(key, value)]:
                    yield number, line, f"has a {strange[0]!r:.90} that is none of ours ({line[:80]!r})"
                    continue
                yield number, line, {key: _as_number(value) for key, value in values.items()}


def _is_told(key: str, value: Any) -> bool:
    """Returns whether a line may hold `value` as its `key`."""
    if not (key.isprintable() and len(key) <= _LONGEST_KEY):
        return False
    if key.endswith(_LISTS):
        return isinstance(value, list) and len(value) > 0 and all(_is_number(each) for each in value)
    return isinstance(value, str) and value.isprintable() if key in _TEXTS else _is_number(value)


def _is_number(value: Any) -> bool:
    """Returns whether a value is null or a number that a float can hold."""
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)


def _open(run: pathlib.Path) -> io.FileIO:
    """Opens the metrics file of a run, which exists, to read it and to append to it."""
    return open(run_folder.open_existing(run / FILE_NAME, os.O_RDWR | os.O_APPEND), "a+b", buffering=0)


def _keep_until(run: pathlib.Path, step: int) -> None:
    """Drops the lines of a run's metrics after `step`, at step 0 all of them, for the run starts anew.

    The file is replaced as a whole. Lines that a crash of the machine has damaged are dropped with a warning, so that a
    run that is started again by itself goes on.
    """
    path = run / FILE_NAME
    with run_folder.replacing(run, FILE_NAME) as file:
        for number, line, values in _lines(path) if step and path.is_file() else ():
            if isinstance(values, str):
                print(f"warning: {path} line {number} {values}: it is dropped", file=sys.stderr, flush=True)
            elif values["step"] <= step:
                file.write(line)


def _or_null(value: float | list[float] | str) -> Any:
    if isinstance(value, list):
        return [_or_null(each) for each in value]
    return value if isinstance(value, str) or math.isfinite(value) else None


def _as_number(value: Any) -> Any:
    if isinstance(value, list):
        with np.errstate(over="ignore"):  # a number that a float32 cannot hold is infinite
            return np.array(value, dtype=np.float32)  # an eighth of a list's memory: runs have thousands of experts
    return math.nan if value is None else value


def _headline(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields names and values for the terminal, short, for 80 columns. The last value of each is shown."""
    if "train/loss" in values:
        yield "loss", _number("loss", values["train/loss"])
    if measure := headline(values, "train"):
        yield measure, _number(measure, values[f"train/{measure}"])
    for unit in ("words", "images", "texts"):
        if (key := f"{unit}_per_second") in values:
            yield f"{unit}/s", _number(key, values[key])
    if measure := headline(values, "valid"):
        yield "valid", _number(measure, values[f"valid/{measure}"])


def _number(measure: str, value: float) -> str:
    return written(measure, value, ".0f" if 1e3 <= abs(value) < 1e6 else "#.4g")


class _WandbThread(threading.Thread):
    """Feeds wandb from a thread of its own, for wandb's calls block while its service starts, hangs or uploads."""

    def __init__(
        self, folder: pathlib.Path, config: dict, mode: str, run_id: str, labels: Mapping[str, str | None]
    ) -> None:
        super().__init__(name="wandb-feed", daemon=True)
        self._folder, self._config, self._mode, self._run_id, self._labels = folder, config, mode, run_id, labels
        self._queue: queue.SimpleQueue[tuple[int, Callable[[], dict[str, Any]]] | None] = queue.SimpleQueue()
        self._exit_code = 0
        self._failed = False
        self._kept = ""  # how to upload what wandb keeps on disk
        self.start()

    def put(self, step: int, make: Callable[[], dict[str, Any]]) -> None:
        """Queues what `make`, called in this thread, returns: numbers, arrays and paths of pictures by name."""
        if self._queue.qsize() >= _WANDB_QUEUE:
            self._fail(f"it lies {_WANDB_QUEUE} lines behind")
        if not self._failed:
            self._queue.put((step, make))

    def close(self, exit_code: int, seconds: float) -> None:
        """Waits until wandb has finished, but no longer than `seconds`."""
        self._exit_code = exit_code
        self._queue.put(None)
        try:
            self.join(seconds)
        finally:
            if self.is_alive():
                self._fail(f"it does not finish{self._kept}")
                teardown = threading.Thread(target=_wandb_teardown, daemon=True)
                teardown.start()
                teardown.join(1.0)

    def _begin(self) -> Any:
        """Returns the wandb run: online, or offline where nobody is logged in or the server cannot be used."""
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        reason: object = None
        try:
            if self._mode == "offline":
                return self._init("offline")
            if not wandb.login(prompt=False, verify=False):
                run = self._init("offline")
                tqdm.write(
                    f"note: nobody is logged in to wandb, so it is offline for this run{self._kept}", file=sys.stderr
                )
                return run
            return self._init(self._mode)
        except Exception as error:  # no network, no such server, a key that it refuses: wandb has many for them
            if self._mode == "offline":
                raise
            reason = error
        _wandb_teardown()  # a service that was given this run once takes it for one in use
        run = self._init("offline")
        told = " ".join(str(reason).split())[:200]
        tqdm.write(f"warning: wandb is offline for this run ({told}){self._kept}", file=sys.stderr)
        return run

    def _init(self, mode: str) -> Any:
        """Begins a wandb run. What the config does not say is left to the environment, or else has our default."""
        import wandb

        wandb.setup(wandb.Settings(silent=True))

        def chosen(label: str, variable: str, default: str) -> str | None:
            return self._labels.get(label) or (None if os.environ.get(variable) else default)

        if not os.environ.get("WANDB_DIR"):
            run_folder.make_folder(self._folder, "wandb")
        name = self._folder.resolve().name.encode("utf-8", "replace").decode()
        tags = self._labels.get("tags")
        run = wandb.init(
            project=chosen("project", "WANDB_PROJECT", "moe_dist"),
            name=chosen("name", "WANDB_NAME", name),
            dir=chosen("dir", "WANDB_DIR", str(self._folder)),
            group=self._labels.get("group"),
            tags=[tag.strip() for tag in tags.split(",")] if tags else None,
            notes=self._labels.get("notes"),
            config=self._config,
            id=self._run_id,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=_WANDB_INIT_SECONDS,
                finish_timeout=_WANDB_FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        self._kept = f"; wandb sync {run.settings.sync_dir} uploads it"
        return run

    def run(self) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # even offline it calls home, and exit waits for it
        try:
            run = self._begin()
            known: set[str] = set()
            while (item := self._queue.get()) is not None:
                step, make = item
                try:
                    values = {key: _for_wandb(value) for key, value in make().items()}
                except Exception as error:  # a picture may fail; curves go on
                    tqdm.write(f"warning: not told to wandb at step {step}: {error!r:.300}", file=sys.stderr)
                else:
                    for key in sorted(values.keys() - known):
                        known.add(key)
                        if HIDDEN.fullmatch(key):
                            run.define_metric(key, hidden=True)
                    run.log(values, step=step)
            run.finish(self._exit_code)
        except Exception as error:
            self._fail(f"{error!r:.300}{self._kept}")
        finally:
            _wandb_teardown()

    def _fail(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            tqdm.write(f"warning: wandb is off for the rest of this run: {reason}", file=sys.stderr)


def _for_wandb(value: Any) -> Any:
    import wandb

    if isinstance(value, np.ndarray):
        return wandb.Histogram(value[np.isfinite(value)].tolist())
    if isinstance(value, pathlib.Path):
        return wandb.Html(value, inject=False) if value.suffix == ".html" else wandb.Image(str(value))
    return value


def _wandb_teardown() -> None:
    """Ends wandb's service. Left to wandb's exit hook, a stuck service would keep the interpreter from exiting."""
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()
