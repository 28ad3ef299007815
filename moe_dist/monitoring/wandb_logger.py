"""Logging to wandb from a thread of its own."""

import contextlib
import os
import pathlib
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from moe_dist.config import run_folder
from moe_dist.config.validate import WANDB_MODES
from moe_dist.monitoring.metric_keys import WANDB_HIDDEN

INIT_TIMEOUT_S = 15.0
FINISH_TIMEOUT_S = 20.0  # later uploads are left to `wandb sync`
_TEARDOWN_TIMEOUT_S = 1.0
_MAX_QUEUE = 10_000  # a fast run logs this many lines while wandb waits for a server
_MODE_ALIASES = {"run": "online", "dryrun": "offline", "disabled": "off"}  # in WANDB_MODE


def wandb_mode_of(mode: str) -> str:
    """Combines a configured wandb mode with the environment.

    Args:
        mode: One of `config.validate.WANDB_MODES`.

    Returns:
        The mode; WANDB_MODE replaces "online", which is the default.

    Raises:
        ValueError: The mode or WANDB_MODE is unknown.
    """
    if mode not in WANDB_MODES:
        raise ValueError(f"wandb mode {mode!r} is unknown: use one of {', '.join(WANDB_MODES)}")
    from_environment = os.environ.get("WANDB_MODE") or mode
    from_environment = _MODE_ALIASES.get(from_environment, from_environment)
    if from_environment not in (*WANDB_MODES, "shared"):
        known = ", ".join((*WANDB_MODES, "shared", *_MODE_ALIASES))
        raise ValueError(
            f"WANDB_MODE={from_environment!r:.80} in the environment is unknown: use one of {known}"
        )
    return from_environment if mode == "online" else mode


class WandbLogger(threading.Thread):
    """A thread that logs to wandb.

    wandb's calls block while its service starts, hangs or uploads, so the training thread must not
    make them.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        config: dict,
        mode: str,
        run_id: str,
        labels: Mapping[str, str | None],
    ) -> None:
        """Starts the thread.

        Args:
            folder: The run folder; offline data is written to its folder "wandb".
            config: The configuration of the run.
            mode: "online", "shared" or "offline".
            run_id: Id of the wandb run, which is created or resumed.
            labels: "project", "group", "tags" and "notes", see `MetricsLogger`.
        """
        super().__init__(name="wandb-feed", daemon=True)
        self._folder = folder
        self._config = config
        self._mode = mode
        self._run_id = run_id
        self._labels = labels
        self._queue: queue.SimpleQueue[tuple[int, Callable[[], dict[str, Any]]] | None] = (
            queue.SimpleQueue()
        )
        self._exit_code = 0
        self._failed = False
        self._sync_hint = ""  # part of a warning: how to upload the offline data
        self.start()

    def put(self, step: int, make: Callable[[], dict[str, Any]]) -> None:
        """Queues values for wandb.

        Args:
            step: Number of optimizer steps so far.
            make: Returns the values by key: numbers, arrays, and paths of PNG or HTML files. It is
                called in this thread.
        """
        if self._queue.qsize() >= _MAX_QUEUE:
            self._fail(f"it is {_MAX_QUEUE} lines behind")
        if not self._failed:
            self._queue.put((step, make))

    def close(self, exit_code: int, seconds: float | None = None) -> None:
        """Waits until wandb has finished.

        Args:
            exit_code: Status of the wandb run: 0 for finished, any other for failed.
            seconds: Timeout; None for INIT_TIMEOUT_S + FINISH_TIMEOUT_S.
        """
        if seconds is None:
            seconds = INIT_TIMEOUT_S + FINISH_TIMEOUT_S
        self._exit_code = exit_code
        self._queue.put(None)
        try:
            self.join(seconds)
        finally:
            if self.is_alive():
                self._fail(f"it does not finish{self._sync_hint}")
                teardown = threading.Thread(target=_wandb_teardown, daemon=True)
                teardown.start()
                teardown.join(_TEARDOWN_TIMEOUT_S)

    def run(self) -> None:
        """Logs the queued values until `close` is called; the thread's main function."""
        # wandb reports its errors to its own server even in offline mode, and exit waits for that
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            wandb_run = self._begin()
            self._log_queue(wandb_run)
            wandb_run.finish(self._exit_code)
        except Exception as error:
            self._fail(f"{error!r:.300}{self._sync_hint}")
        finally:
            _wandb_teardown()

    def _log_queue(self, wandb_run: Any) -> None:
        """Logs each item of the queue until the item None."""
        known_keys: set[str] = set()
        while (item := self._queue.get()) is not None:
            step, make = item
            try:
                values = {key: _for_wandb(value) for key, value in make().items()}
            except Exception as error:  # a plot may fail; the curves must go on
                warning = f"warning: nothing logged to wandb at step {step}: {error!r:.300}"
                tqdm.write(warning, file=sys.stderr)
                continue
            for key in sorted(values.keys() - known_keys):
                known_keys.add(key)
                if WANDB_HIDDEN.fullmatch(key):
                    wandb_run.define_metric(key, hidden=True)
            wandb_run.log(values, step=step)

    def _begin(self) -> Any:
        """Starts the wandb run: offline if nobody is logged in or the server cannot be used."""
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        if self._mode == "offline":
            return self._init("offline")
        try:
            if wandb.login(prompt=False, verify=False):
                return self._init(self._mode)
            wandb_run = self._init("offline")
            note = "note: nobody is logged in to wandb, so it is offline for this run"
            tqdm.write(f"{note}{self._sync_hint}", file=sys.stderr)
            return wandb_run
        # no network, no such server, a rejected key: wandb raises many types for them
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
        # a wandb service that has been given this run would report that the run id is in use
        _wandb_teardown()
        wandb_run = self._init("offline")
        warning = f"warning: wandb is offline for this run ({reason}){self._sync_hint}"
        tqdm.write(warning, file=sys.stderr)
        return wandb_run

    def _init(self, mode: str) -> Any:
        """Calls `wandb.init` with labels of the config, the environment, or defaults."""
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        if not os.environ.get("WANDB_DIR"):
            run_folder.make_folder(self._folder, "wandb")
        name = self._folder.resolve().name.encode("utf-8", "replace").decode()
        tags = self._labels.get("tags")
        wandb_run = wandb.init(
            project=self._label("project", "WANDB_PROJECT", "moe_dist"),
            name=self._label("name", "WANDB_NAME", name),
            dir=self._label("dir", "WANDB_DIR", str(self._folder)),
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
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
            ),
        )
        self._sync_hint = f"; wandb sync {wandb_run.settings.sync_dir} uploads it"
        return wandb_run

    def _label(self, label: str, variable: str, default: str) -> str | None:
        """Returns a label of the config; None if wandb reads it from an environment variable."""
        if self._labels.get(label):
            return self._labels[label]
        return None if os.environ.get(variable) else default

    def _fail(self, reason: str) -> None:
        """Prints the first failure as a warning; nothing is queued from then on."""
        if not self._failed:
            self._failed = True
            tqdm.write(f"warning: wandb is off for the rest of this run: {reason}", file=sys.stderr)


def _for_wandb(value: Any) -> Any:
    """Returns an array as a histogram, a path as an image or a page, any other value unchanged."""
    import wandb

    if isinstance(value, np.ndarray):
        return wandb.Histogram(value[np.isfinite(value)].tolist())
    if isinstance(value, pathlib.Path) and value.suffix == ".html":
        return wandb.Html(value, inject=False)
    if isinstance(value, pathlib.Path):
        return wandb.Image(str(value))
    return value


def _wandb_teardown() -> None:
    """Ends wandb's service.

    wandb's own exit hook would wait for a stuck service and keep the interpreter from exiting.
    """
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()
