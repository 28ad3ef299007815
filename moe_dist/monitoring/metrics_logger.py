"""Logging of a run's metrics to `metrics.jsonl`, the terminal and wandb."""

import json
import os
import pathlib
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping
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

_LINE_INTERVAL_S = 2.0  # minimum between two progress lines
_FAILED_CLOSE_TIMEOUT_S = 15.0  # launchers kill a failed rank after 30 s
_BAR_FORMAT = "step {n_fmt}/{total_fmt} |{bar}| {desc}  eta {remaining}"


class MetricsLogger:
    """Writes the metrics of one run to `run/metrics.jsonl`, the terminal and wandb.

    A line with step s describes the state after s optimizer steps. A resumed run therefore first
    drops the lines after its `start_step`, and a run from step 0 starts with an empty file. Log
    step s before writing the checkpoint of step s.

    An online wandb run becomes an offline run, in a folder for `wandb sync`, if nobody is logged in
    or the server cannot be used. Any other failure of wandb is one warning on stderr, and the run
    continues without wandb.

    Attributes:
        wandb_id: Id of the wandb run; None if there is none. Store it in the checkpoint and pass it
            to the logger of the resumed run.
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
        """Opens the metrics file and starts wandb's thread.

        Args:
            run: The run folder.
            config: The configuration, for wandb.
            enabled: True on rank 0 only. On other ranks all methods do nothing.
            wandb_mode: "online" (which WANDB_MODE overrides), "offline" or "off".
            total_steps: Steps of the whole run, for the progress bar.
            start_step: Step from which the run resumes.
            wandb_id: Id of an earlier wandb run; None for a new run.
            wandb_labels: "project", "group", "tags" (separated by commas) and "notes". Missing
                labels are taken from the environment (WANDB_PROJECT and so on).
            restore: Called before every line; restores the run folder if it was removed.

        Raises:
            ValueError: The wandb mode is unknown.
        """
        mode = wandb_mode_of(wandb_mode)
        self.wandb_id = wandb_id
        self._enabled = enabled
        if not enabled:
            return
        self._restore = restore
        self._start_step = start_step
        self._total_steps = total_steps
        self._run = run
        truncate_after(run, start_step)
        self._file = open_for_append(run)
        self._unwritten = b""  # lines that could not be written yet
        self._wandb: WandbLogger | None = None
        if mode != "off":
            self.wandb_id = wandb_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
            self._wandb = WandbLogger(run, config, mode, self.wandb_id, wandb_labels)
        self._headline: dict[str, str] = {}
        self._last_shown = (start_step, "")
        self._start_time = time.monotonic()
        self._last_line_time = -_LINE_INTERVAL_S
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                initial=start_step, total=total_steps, bar_format=_BAR_FORMAT, dynamic_ncols=True
            )

    def log(self, step: int, values: Mapping[str, float | list[float] | str]) -> None:
        """Appends one line to the metrics file, and shows it in wandb and on the terminal.

        Args:
            step: Number of optimizer steps so far.
            values: Values by key. A list (one number per expert or rank) is a histogram in wandb.
                A number that is not finite is null in the file, because JSON cannot express it.
        """
        if not self._enabled:
            return
        line = {"step": step} | {key: as_json(value) for key, value in values.items()}
        self._append(json.dumps(line).encode() + b"\n")
        if self._wandb:
            compact = {key: as_number(value) for key, value in values.items()}
            self._wandb.put(step, lambda: compact)
        self._headline |= _headline(values)
        self._show(step, "  ".join(f"{name} {text}" for name, text in self._headline.items()))

    def log_images(self, step: int, draw: Callable[[], list[pathlib.Path]]) -> None:
        """Sends plots, the HTML page and the custom charts to wandb; does nothing without wandb.

        Args:
            step: Number of optimizer steps so far.
            draw: Returns PNG and HTML files. It is called in wandb's thread.
        """

        def make() -> dict[str, Any]:
            # imported here because only runs with wandb need it
            from moe_dist.monitoring.wandb_charts import charts

            files = {f"report/{path.stem}": path for path in draw()}
            return files | charts(read_metrics(self._run))

        if self._enabled and self._wandb:
            self._wandb.put(step, make)

    def _append(self, line: bytes) -> None:
        """Writes the unwritten lines and a new one; a full disk is one warning, not an error."""
        already_warned = bool(self._unwritten)
        self._unwritten += line
        try:
            self._restore()
            if not run_folder.is_same_file(self._file.fileno(), self._run / FILE_NAME):
                self._rewrite()
            while self._unwritten:
                num_written = self._file.write(self._unwritten)
                self._unwritten = self._unwritten[num_written:]
        except OSError as error:
            if not already_warned:
                reason = f"{self._run / FILE_NAME}: {error.strerror or error}"
                warning = f"warning: {reason}; new lines stay in memory until it can be written"
                tqdm.write(warning, file=sys.stderr)

    def _rewrite(self) -> None:
        """Copies the lines of a file that was removed from the run folder to a new file."""
        self._file.seek(0)
        with run_folder.atomic_write(self._run, FILE_NAME) as file:
            shutil.copyfileobj(self._file, file)
        removed = self._file
        self._file = open_for_append(self._run)
        removed.close()

    def _show(self, step: int, text: str) -> None:
        """Shows progress: a live bar on a terminal, otherwise a line at most every 2 seconds."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            # redraws the bar even if the step is the same, as after an evaluation
            self._bar.set_description_str(text)
            return
        now = time.monotonic()
        is_due = step >= self._total_steps or now - self._last_line_time >= _LINE_INTERVAL_S
        if is_due and (step, text) != self._last_shown:
            self._last_line_time = now
            self._last_shown = (step, text)
            steps_left = self._total_steps - step
            steps_done = max(1, step - self._start_step)
            eta = tqdm.format_interval((now - self._start_time) * steps_left / steps_done)
            progress = f"step {step}/{self._total_steps}  {text}  eta {eta}"
            print(progress, file=sys.stderr, flush=True)

    def end_progress(self) -> None:
        """Ends the live bar, so that other lines can be printed."""
        if self._enabled and self._bar is not None:
            self._bar.close()

    def close(self, exit_code: int = 0, seconds: float | None = None) -> None:
        """Ends the bar, the file and wandb. A second call does nothing.

        Args:
            exit_code: Status of the wandb run: 0 for finished, any other for failed.
            seconds: Timeout for wandb; None for its timeouts to connect and to upload.
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
            self.close(1, _FAILED_CLOSE_TIMEOUT_S)


def _headline(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns short names and values for a terminal of 80 columns."""
    headline = {}
    if "train/loss" in values:
        headline["loss"] = _format(values["train/loss"], "loss")
    metric = primary_metric(values, "train")
    if metric is not None:
        headline[metric] = _format(values[f"train/{metric}"], metric)
    unit = throughput_unit([dict(values)])
    if throughput_key(unit) in values:
        headline[f"{unit}/s"] = _format(values[throughput_key(unit)], "")
    metric = primary_metric(values, "valid")
    if metric is not None:
        headline["valid"] = _format(values[f"valid/{metric}"], metric)
    return headline


def _format(value: float, metric: str) -> str:
    return format_metric(metric, value, ".0f" if 1e3 <= abs(value) < 1e6 else "#.4g")
