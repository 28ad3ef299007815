"""The flight recorder's files: RUN/calls/rank00000.txt, one per rank.

A file has a header line and a ring with `NUM_RECORDS` lines, one per collective, each RECORD_WIDTH
bytes long. The operating system holds the written bytes, so the file survives a killed process. The
next start renames the file to rank00000.before.
"""

import contextlib
import os
import re
import socket
from pathlib import Path
from typing import NamedTuple

from moe_dist.config.run_folder import make_folder, open_existing

FOLDER_NAME = "calls"
NUM_RECORDS = 256  # collectives in a file; the newest one overwrites the oldest
RECORD_WIDTH = 160  # bytes per line, with its newline
_HEADER = re.compile(r"line (\d+), (\d+) calls begun(, ended)?, in (\w+)")


class Header(NamedTuple):
    """The first line in a rank's file.

    Attributes:
        heartbeat: Headers written so far, this one included.
        num_started: Collectives started so far.
        ended: True if the recording has ended.
        phase: The step's phase, for example "forward".
    """

    heartbeat: int
    num_started: int
    ended: bool
    phase: str


class RecordFiles:
    """All ranks' files: this rank's is written, the others are read."""

    def __init__(self, run: Path, rank: int, size: int) -> None:
        """Prepares the paths; nothing is created yet.

        Args:
            run: The run folder.
            rank: This rank.
            size: World size.
        """
        self.folder = run / FOLDER_NAME
        self.rank = rank
        self.size = size
        self.descriptor: int | None = None  # this rank's open file

    def create(self) -> None:
        """Creates this rank's file and keeps an earlier start's file as .before.

        Raises:
            OSError: The file cannot be written.
        """
        make_folder(self.folder.parent, FOLDER_NAME)
        path = self._path(self.rank)
        if os.path.lexists(path):
            path.replace(path.with_suffix(".before"))
        self.descriptor = self._create()

    def restore(self) -> None:
        """Creates the file again if the run folder was removed and has been created again."""
        assert self.descriptor is not None
        if self.folder.parent.is_dir() and not os.path.lexists(self._path(self.rank)):
            with contextlib.suppress(OSError):
                new = self._create()
                os.dup2(new, self.descriptor)  # keeps the number, which other threads write to
                os.close(new)

    def close(self) -> None:
        """Closes this rank's file."""
        assert self.descriptor is not None
        os.close(self.descriptor)
        self.descriptor = None

    def write_header(self, header: Header, time: str) -> None:
        """Writes the first line in this rank's file.

        Args:
            header: The values for other ranks.
            time: Date and time, for people.
        """
        ended = ", ended" if header.ended else ""
        process = (
            f"rank {self.rank} of {self.size} on {socket.gethostname()}, process {os.getpid()}"
        )
        self._write_line(
            0,
            f"line {header.heartbeat}, {header.num_started} calls begun{ended}, in {header.phase}, "
            f"{time}; {process}",
        )
        # a network file system shows written bytes to other machines after a close
        assert self.descriptor is not None
        os.close(os.dup(self.descriptor))

    def write_record(self, number: int, text: str) -> None:
        """Writes the line for collective `number`, counted from 1."""
        self._write_line(1 + (number - 1) % NUM_RECORDS, text)

    def read_headers(self) -> dict[int, Header | None]:
        """Returns every other rank's header; None for a rank without a readable file."""
        return {rank: self.read_header(rank) for rank in range(self.size) if rank != self.rank}

    def read_header(self, rank: int) -> Header | None:
        """Returns one rank's header; None if its file cannot be read."""
        try:
            with open(open_existing(self._path(rank)), errors="replace") as file:
                match = _HEADER.match(file.readline(2 * RECORD_WIDTH))
        except OSError:
            return None
        if not match:
            return None
        heartbeat, num_started, ended, phase = match.groups()
        return Header(int(heartbeat), int(num_started), bool(ended), phase)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank{rank:05d}.txt"

    def _create(self) -> int:
        """Creates this rank's file at its full size, so a disk that fills up later does no harm."""
        make_folder(self.folder.parent, FOLDER_NAME)
        descriptor = open_existing(self._path(self.rank), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.write(descriptor, (b" " * (RECORD_WIDTH - 1) + b"\n") * (NUM_RECORDS + 1))
        return descriptor

    def _write_line(self, line: int, text: str) -> None:
        assert self.descriptor is not None
        width = RECORD_WIDTH - 1
        padded = text[:width].ljust(width).encode("ascii", "replace") + b"\n"
        with contextlib.suppress(OSError):
            os.pwrite(self.descriptor, padded, line * RECORD_WIDTH)
