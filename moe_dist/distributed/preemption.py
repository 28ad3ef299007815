"""SIGTERM as a wish to stop, on which all ranks agree."""

import signal
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from moe_dist.distributed.collectives import all_reduce_max
from moe_dist.distributed.mesh import Mesh

EXIT_STATUS = 128 + signal.SIGTERM  # of a process that SIGTERM ended, as shells tell it
GRACE_S = (
    5.0  # that may be spent after a SIGTERM on what a run can do without; launchers kill after 30
)


class _Interrupted(BaseException):
    """Raised in the main thread by SIGTERM in `Stop.run_unless_preempted`."""


class PreemptionHandler:
    """While it is entered SIGTERM ends nothing, and `asked` returns whether any rank has had one."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.previous_handler: Any = signal.SIG_DFL  # the handler when it is left
        self.received = False  # this rank has had one, or when all were last asked, any

    def requested(self) -> bool:
        """Returns the same answer on every rank. A collective."""
        asked = bool(
            all_reduce_max(torch.tensor(int(self.received), device=self.mesh.device), self.mesh.dp)
        )
        if asked:  # else a SIGTERM that has come meanwhile would be forgotten
            self.received = True
        return asked

    def run_unless_preempted(self, work: Callable[[], None]) -> bool:
        """Runs `work`, which the run can do without: it is left out after a SIGTERM, and ended by one.

        SIGTERM is ignored from then on, for good: the run has done what it is for, and its process is about to end.

        Returns:
            Whether `work` was done.
        """

        def interrupt(*_: Any) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.received = True
            raise _Interrupted

        self.previous_handler = signal.SIG_IGN
        try:
            signal.signal(signal.SIGTERM, interrupt)
            if not self.received:
                work()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        except _Interrupted:
            pass
        return not self.received

    def __enter__(self) -> "PreemptionHandler":
        def note(*_: Any) -> None:
            self.received = True

        self.previous_handler = signal.signal(signal.SIGTERM, note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self.previous_handler)
