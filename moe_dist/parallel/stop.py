"""SIGTERM as a wish to stop, on which all ranks agree."""

import signal
from types import TracebackType
from typing import Any

import torch

from moe_dist.parallel.collectives import any_over
from moe_dist.parallel.mesh import Mesh

STATUS = 128 + signal.SIGTERM  # of a process that SIGTERM ended, as shells tell it


class Stop:
    """While it is entered SIGTERM ends nothing, and `asked` says whether any rank has had one."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.here = False  # this rank has had one

    def asked(self) -> bool:
        """The same answer on every rank. A collective."""
        return bool(any_over(torch.tensor(int(self.here), device=self.mesh.device), self.mesh.dp))

    def __enter__(self) -> "Stop":
        def note(*_: Any) -> None:
            self.here = True

        self.before = signal.signal(signal.SIGTERM, note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGTERM, self.before)
