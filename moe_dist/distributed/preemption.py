"""Preemption: SIGTERM as a request to stop, on which all ranks agree.

`train.run_steps` reads the request after each step, saves a checkpoint and ends the loop; the
process then exits with `EXIT_STATUS`. Before `training.session` installs the handler, and in an
evaluation alone, SIGTERM ends the process as usual. A SIGTERM during an evaluation takes effect
after it and one more step. On the last step the run ends normally, without its report.
"""

import signal
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from moe_dist.distributed.collectives import all_reduce_max
from moe_dist.distributed.mesh import Mesh

EXIT_STATUS = 128 + signal.SIGTERM  # a shell's status for a process ended by SIGTERM
# seconds after a SIGTERM for optional work; launchers send SIGKILL after 30 s
GRACE_S = 5.0


class _Interrupted(BaseException):
    """Raised in the main thread by SIGTERM in `PreemptionHandler.run_unless_preempted`."""


class PreemptionHandler:
    """A context in which SIGTERM does not end the process, but sets a flag."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.previous_handler: Any = signal.SIG_DFL  # restored on exit
        self.received = False  # by this rank; after `requested`, by any rank

    def requested(self) -> bool:
        """Returns True on every rank if any rank has received SIGTERM. A collective."""
        flag = torch.tensor(int(self.received), device=self.mesh.device)
        any_received = bool(all_reduce_max(flag, self.mesh.dp))
        if any_received:  # never set to False: a SIGTERM may have arrived during the collective
            self.received = True
        return any_received

    def run_unless_preempted(self, work: Callable[[], None]) -> bool:
        """Runs optional work at the end of a run; SIGTERM skips or interrupts it.

        From then on SIGTERM is ignored, also after the context: the process is about to end.

        Args:
            work: The work; an interrupted one is abandoned.

        Returns:
            True if `work` has completed.
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
        def set_received(*_: Any) -> None:
            self.received = True

        self.previous_handler = signal.signal(signal.SIGTERM, set_received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self.previous_handler)
