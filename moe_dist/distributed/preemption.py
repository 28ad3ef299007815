"""SIGTERM as a wish to stop, on which all ranks agree."""

import signal
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from moe_dist.distributed.collectives import any_over
from moe_dist.distributed.mesh import Mesh

STATUS = 128 + signal.SIGTERM  # of a process that SIGTERM ended, as shells tell it
LEAVE_SECONDS = 5.0  # that may be spent after a SIGTERM on what a run can do without; launchers kill after 30


class _Interrupted(BaseException):
    """Raised in the main thread by SIGTERM in `Stop.try_to_end`."""


class Stop:
    """While it is entered SIGTERM ends nothing, and `asked` returns whether any rank has had one."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.before: Any = signal.SIG_DFL  # the handler when it is left
        self.here = False  # this rank has had one, or when all were last asked, any

    def asked(self) -> bool:
        """Returns the same answer on every rank. A collective."""
        asked = bool(any_over(torch.tensor(int(self.here), device=self.mesh.device), self.mesh.dp))
        if asked:  # else a SIGTERM that has come meanwhile would be forgotten
            self.here = True
        return asked

    def try_to_end(self, work: Callable[[], None]) -> bool:
        """Runs `work`, which the run can do without: it is left out after a SIGTERM, and ended by one.

        SIGTERM is ignored from then on, for good: the run has done what it is for, and its process is about to end.

        Returns:
            Whether `work` was done.
        """

        def interrupt(*_: Any) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.here = True
            raise _Interrupted

        self.before = signal.SIG_IGN
        try:
            signal.signal(signal.SIGTERM, interrupt)
            if not self.here:
                work()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        except _Interrupted:
            pass
        return not self.here

    def __enter__(self) -> "Stop":
        def note(*_: Any) -> None:
            self.here = True

        self.before = signal.signal(signal.SIGTERM, note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGTERM, self.before)
