"""What a user sees of a run: its curves on disk, its progress on the terminal, and wandb."""

import json
import os
import pathlib
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any

from tqdm import tqdm

from moe_dist.config import run_folder
from moe_dist.monitoring.metric_format import format_metric, primary_metric
from moe_dist.monitoring.metric_keys import throughput_key, throughput_unit
from moe_dist.monitoring.metrics_file import (
    FILE_NAME,
    as_json,
    as_number,
    open_for_append,
    read_metrics,
    truncate_after,
)
from moe_dist.monitoring.wandb_logger import WandbLogger, wandb_mode_of

_LINE_SECONDS = 2.0  # least time between two progress lines


_FAILED_SECONDS = 15.0  # that a run which fails waits for wandb: launchers kill after 30


class MetricsLogger:
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
        truncate_after(run, start_step)
        self._file = open_for_append(run)
        self._waiting = b""  # lines that a full disk did not take
        self._wandb: WandbLogger | None = None
        if mode != "off":
            self.wandb_id = wandb_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
            self._wandb = WandbLogger(run, config, mode, self.wandb_id, wandb_labels)
        self._headline: dict[str, str] = {}
        self._shown = (start_step, "")
        self._start_time, self._line_time = time.monotonic(), -_LINE_SECONDS
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            bar_format = "step {n_fmt}/{total_fmt} |{bar}| {desc}  eta {remaining}"
            self._bar = tqdm(
                initial=start_step, total=total_steps, bar_format=bar_format, dynamic_ncols=True
            )

    def log(self, step: int, values: Mapping[str, float | list[float] | str]) -> None:
        """Appends one line to the metrics file, and shows it: as curves in wandb, and its headline on the terminal.

        A list, of a number per expert, is a histogram in wandb. What is not finite is null in the file, for JSON has
        no word for it.
        """
        if not self._enabled:
            return
        line = json.dumps({"step": step} | {key: as_json(value) for key, value in values.items()})
        self._append(line.encode() + b"\n")
        if self._wandb:
            compact = {key: as_number(value) for key, value in values.items()}
            self._wandb.put(step, lambda: compact)
        self._headline |= dict(_headline(values))
        self._show(step, "  ".join(f"{name} {text}" for name, text in self._headline.items()))

    def log_images(self, step: int, draw: Callable[[], list[pathlib.Path]]) -> None:
        """Gives wandb the PNG and HTML files that `draw` returns, and the charts of `panels`. It is called in wandb's
        thread; without wandb, never."""

        def make() -> dict[str, Any]:
            from moe_dist.monitoring.wandb_charts import (
                charts,
            )  # here, as matplotlib is by `draw`: for wandb alone

            return {f"report/{path.stem}": path for path in draw()} | charts(
                read_metrics(self._run)
            )

        if self._enabled and self._wandb:
            self._wandb.put(step, make)

    def _append(self, line: bytes) -> None:
        """What a full disk does not take is told once, and waits for the next line: the run goes on."""
        told, self._waiting = bool(self._waiting), self._waiting + line
        try:
            self._restore()
            if not run_folder.is_same_file(self._file.fileno(), self._run / FILE_NAME):
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
        with run_folder.atomic_write(self._run, FILE_NAME) as file:
            shutil.copyfileobj(self._file, file)
        removed = self._file
        self._file = open_for_append(self._run)
        removed.close()

    def _show(self, step: int, text: str) -> None:
        """How far the run is: a live bar on a terminal, elsewhere a plain line at most every two seconds."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_description_str(
                text
            )  # drawn at once, for an evaluation is no step further
        elif (step, text) != self._shown and (
            step >= self._total_steps or now - self._line_time >= _LINE_SECONDS
        ):
            self._line_time, self._shown = now, (step, text)
            seconds = (
                (now - self._start_time)
                * (self._total_steps - step)
                / max(1, step - self._start_step)
            )
            eta = tqdm.format_interval(seconds)
            print(
                f"step {step}/{self._total_steps}  {text}  eta {eta}", file=sys.stderr, flush=True
            )

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
            self._wandb.close(exit_code, seconds)

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.close(1, _FAILED_SECONDS)


def _headline(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields names and values for the terminal, short, for 80 columns. The last value of each is shown."""
    if "train/loss" in values:
        yield "loss", _number("loss", values["train/loss"])
    if measure := primary_metric(values, "train"):
        yield measure, _number(measure, values[f"train/{measure}"])
    unit = throughput_unit([dict(values)])
    speed = values.get(throughput_key(unit))
    if speed is not None:
        yield f"{unit}/s", _number("", speed)
    if measure := primary_metric(values, "valid"):
        yield "valid", _number(measure, values[f"valid/{measure}"])


def _number(measure: str, value: float) -> str:
    return format_metric(measure, value, ".0f" if 1e3 <= abs(value) < 1e6 else "#.4g")
