"""Feeds wandb from a thread of its own."""

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


FINISH_TIMEOUT_S = 20.0  # what is not uploaded by then stays on disk for `wandb sync`
_MAX_QUEUE = (
    10_000  # lines wandb may lie behind, which a fast run has logged while a server is waited for
)
_MODE_ALIASES = {
    "run": "online",
    "dryrun": "offline",
    "disabled": "off",
}  # of WANDB_MODE, by other names than ours


def wandb_mode_of(mode: str) -> str:
    """Returns a config's wandb mode as the environment has it: WANDB_MODE replaces "online", which is the default.

    Raises:
        ValueError: The mode, or WANDB_MODE, is unknown.
    """
    if mode not in WANDB_MODES:
        raise ValueError(f"wandb mode {mode!r} is unknown: use one of {', '.join(WANDB_MODES)}")
    asked = os.environ.get("WANDB_MODE") or mode
    if (asked := _MODE_ALIASES.get(asked, asked)) not in (*WANDB_MODES, "shared"):
        known = ", ".join((*WANDB_MODES, "shared", *_MODE_ALIASES))
        raise ValueError(
            f"WANDB_MODE={asked!r:.80} in the environment is unknown: use one of {known}"
        )
    return asked if mode == "online" else mode


class WandbLogger(threading.Thread):
    """Feeds wandb from a thread of its own, for wandb's calls block while its service starts, hangs or uploads."""

    def __init__(
        self,
        folder: pathlib.Path,
        config: dict,
        mode: str,
        run_id: str,
        labels: Mapping[str, str | None],
    ) -> None:
        super().__init__(name="wandb-feed", daemon=True)
        self._folder, self._config, self._mode, self._run_id, self._labels = (
            folder,
            config,
            mode,
            run_id,
            labels,
        )
        self._queue: queue.SimpleQueue[tuple[int, Callable[[], dict[str, Any]]] | None] = (
            queue.SimpleQueue()
        )
        self._exit_code = 0
        self._failed = False
        self._kept = ""  # how to upload what wandb keeps on disk
        self.start()

    def put(self, step: int, make: Callable[[], dict[str, Any]]) -> None:
        """Queues what `make`, called in this thread, returns: numbers, arrays and paths of pictures by name."""
        if self._queue.qsize() >= _MAX_QUEUE:
            self._fail(f"it lies {_MAX_QUEUE} lines behind")
        if not self._failed:
            self._queue.put((step, make))

    def close(self, exit_code: int, seconds: float | None = None) -> None:
        """Waits until wandb has finished, but no longer than `step_seconds`; None: the time to connect and to upload."""
        if seconds is None:
            seconds = INIT_TIMEOUT_S + FINISH_TIMEOUT_S
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
                    f"note: nobody is logged in to wandb, so it is offline for this run{self._kept}",
                    file=sys.stderr,
                )
                return run
            return self._init(self._mode)
        except (
            Exception
        ) as error:  # no network, no such server, a key that it refuses: wandb has many for them
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
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
            ),
        )
        self._kept = f"; wandb sync {run.settings.sync_dir} uploads it"
        return run

    def run(self) -> None:
        os.environ.setdefault(
            "WANDB_ERROR_REPORTING", "false"
        )  # even offline it calls home, and exit waits for it
        try:
            run = self._begin()
            known: set[str] = set()
            while (item := self._queue.get()) is not None:
                step, make = item
                try:
                    values = {key: _for_wandb(value) for key, value in make().items()}
                except Exception as error:  # a picture may fail; curves go on
                    tqdm.write(
                        f"warning: not told to wandb at step {step}: {error!r:.300}",
                        file=sys.stderr,
                    )
                else:
                    for key in sorted(values.keys() - known):
                        known.add(key)
                        if WANDB_HIDDEN.fullmatch(key):
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
        return (
            wandb.Html(value, inject=False) if value.suffix == ".html" else wandb.Image(str(value))
        )
    return value


def _wandb_teardown() -> None:
    """Ends wandb's service. Left to wandb's exit hook, a stuck service would keep the interpreter from exiting."""
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()
