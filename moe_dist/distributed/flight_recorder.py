"""A record of what a rank says to the others, and whom it waits for.

Each rank keeps RUN/calls/rank00000.txt: a first line that says it is there, and its last calls, what goes to others and
comes from them with each. The system holds the file, so it outlives a killed rank, and the
next start keeps it beside its own, as rank00000.before. A thread writes the first line twice
a second, and looks whether the rank gets on. One that has got nowhere for `patience` seconds reads the others' files,
twice: whose first line has stayed the same does not answer; who answers, but has begun fewer calls, is late. It says
whom it waits for, in which call, and ends: after `patience` and at most 5 seconds more. After half of `patience` it
says so and waits on. Where a call fails because a peer is gone, it is found in the same way.

No clocks are compared: time is counted in lines that this rank wrote, so one that was stopped itself blames nobody.
"""

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from moe_dist.config.run_folder import make_folder, open_existing
from moe_dist.distributed.labels import CommLabel

T = TypeVar("T")
FOLDER_NAME = "calls"
HEARTBEAT_S = 0.5  # seconds between two first lines
NUM_RECORDS, RECORD_WIDTH = 256, 160  # calls that a file holds, and characters of a line
_FIRST_LINE = re.compile(r"line (\d+), (\d+) calls begun(, ended)?, in (\w+)")


class Header(NamedTuple):
    """The first one of a rank's file."""

    heartbeat: int
    num_started: int  # calls
    ended: bool
    phase: str


@dataclass(eq=False)
class CollectiveCall:
    """One that this rank has begun."""

    work: Any  # of torch
    number: int = 0
    description: str = ""  # direction, layer and step
    peers: tuple[int, ...] = ()  # ranks, this one among them
    send_P: list[int] | None = (
        None  # rows to each of the peers, and from each; None where all get the same
    )
    receive_P: list[int] | None = None
    started_at_heartbeat: int = 0  # that was the first one's number when it began
    start_time: float = 0.0
    waited: bool = False  # for it, which on CUDA is not to its end
    returned: bool = False  # that of a library, which is a work of its own

    def is_completed(self) -> bool:
        return self.returned

    def describe_rows(self, rank: int) -> str:
        if self.send_P is None or self.receive_P is None or rank not in self.peers:
            return ""
        i = self.peers.index(rank)
        return f" ({self.send_P[i]} rows to it, {self.receive_P[i]} from it)"


@dataclass
class FlightRecorder:
    """Of one rank. Outside of `kept` it costs nothing and knows nothing."""

    rank: int = 0
    size: int = 1  # ranks in all
    step: int = 0
    phase: str = "start"
    on_phase: Callable[[str], None] | None = (
        None  # is told each phase, and the direction of a call to begin (`chaos`)
    )
    file: int | None = None

    @contextlib.contextmanager
    def recording(
        self, run: Path, timeout_s: float, barrier: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Records into the run folder until it is left, from when `meet` returns: for what some rank had to do before,
        others have all the patience that it takes. Where another rank's end is the cause of an exception, this one
        says whose, and ends at once: what else would end in an orderly way may wait for that rank, or for a network."""
        self.folder, self.timeout_s = run / FOLDER_NAME, timeout_s
        self.num_started, self.heartbeat, self.last_progress = 0, 0, 0
        self.open_calls: dict[int, CollectiveCall] = {}
        self.stale_headers = self._first_lines()  # from an earlier start
        barrier()
        self.started = time.perf_counter()
        try:
            make_folder(run, FOLDER_NAME)
            path = self._path(self.rank)
            if os.path.lexists(path):  # from the last start
                path.replace(path.with_suffix(".before"))
            self.file = self._new_file()
        except OSError as error:
            print(
                f"warning: {self.folder}: {error.strerror}; calls are not recorded",
                file=sys.stderr,
                flush=True,
            )
            self.file = None
            yield
            return
        self._write_first_line()
        end = threading.Event()
        watch = threading.Thread(target=self._watch, args=(end,), name="calls", daemon=True)
        watch.start()
        try:
            yield
        except RuntimeError as error:  # what gloo and NCCL raise
            call = next(iter(self.open_calls.values()), None)
            if silent := self._silent():
                self._end(f"{self._told(silent, 'lost another rank', call)}: {_reason(error)}")
            ended = [str(rank) for rank, line in self._first_lines().items() if line and line.ended]
            if call and ended:
                self._end(
                    f"in {call.description}: rank {', '.join(ended[:4])} ended first, and says why"
                )
            raise
        finally:
            end.set()
            watch.join()
            self._write_first_line(", ended")
            os.close(self.file)
            self.file = None

    def enter_phase(self, phase: str) -> None:
        """What this rank is at, for others that wait for it."""
        self.phase = phase
        if self.on_phase:
            self.on_phase(phase)

    def start_call(
        self,
        label: CommLabel,
        peers: tuple[int, ...],
        start: Callable[[], Any],
        send_P: list[int] | None = None,
        receive_P: list[int] | None = None,
    ) -> CollectiveCall:
        """Starts a call: `start` gives torch's work."""
        if self.file is None:
            return CollectiveCall(start())
        call = self._begin(label, peers, send_P, receive_P)
        call.work = start()
        self.open_calls[call.number] = call
        return call

    def _begin(
        self,
        label: CommLabel,
        peers: tuple[int, ...],
        send_P: list[int] | None = None,
        receive_P: list[int] | None = None,
    ) -> CollectiveCall:
        if self.on_phase:
            self.on_phase(label.direction)
        self.num_started += 1
        self.last_progress = self.heartbeat
        call = CollectiveCall(
            None,
            self.num_started,
            f"{label.describe()}, step {self.step}",
            peers,
            send_P,
            receive_P,
            self.heartbeat,
            time.perf_counter(),
        )
        self._write(call, "begun")
        return call

    def record_blocking_call(
        self,
        label: CommLabel,
        peers: tuple[int, ...],
        run: Callable[[], T],
        work: Callable[[T], Any],
    ) -> T:
        """What `run` returns, a call of a library's. It may wait for others itself; what it has left to wait for is the
        `work` of what it returns, as torch's (`is_completed`), None where that is nothing."""
        if self.file is None:
            return run()
        call = self._begin(label, peers)
        call.work = self.open_calls[call.number] = call  # under way until it returns
        result = run()
        call.work, call.waited = work(result) or call, True
        call.returned = call.work is call
        self._close(call)
        return result

    def wait_for(self, call: CollectiveCall) -> None:
        """For its end; on CUDA the stream waits."""
        call.work.wait()
        if self.file is not None:
            call.waited = True
            self._close(call)

    def _close(self, call: CollectiveCall) -> None:
        if call.waited and call.work.is_completed() and self.open_calls.pop(call.number, None):
            self.last_progress = self.heartbeat
            self._write(call, f"done after {1e3 * (time.perf_counter() - call.start_time):.3f} ms")

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank{rank:05d}.txt"

    def _new_file(self) -> int:
        """Makes this rank's file and returns its descriptor."""
        make_folder(self.folder.parent, FOLDER_NAME)
        file = open_existing(self._path(self.rank), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.write(
            file, (b" " * (RECORD_WIDTH - 1) + b"\n") * (NUM_RECORDS + 1)
        )  # room, before a disk may be full
        return file

    def _restore(self) -> None:
        """Makes the file again where the run folder was removed and has been made again."""
        assert self.file is not None
        if self.folder.parent.is_dir() and not os.path.lexists(self._path(self.rank)):
            with contextlib.suppress(OSError):
                file = self._new_file()
                os.dup2(file, self.file)  # in its place, for other threads write to it
                os.close(file)

    def _write(self, call: CollectiveCall, state: str) -> None:
        rows = (
            ""
            if call.send_P is None or call.receive_P is None
            else (f", {sum(call.send_P)} rows out, {sum(call.receive_P)} in")
        )
        text = f"{call.number:8d}  {call.start_time - self.started:12.4f} s  {call.description}{rows}: {state}"
        self._put(1 + (call.number - 1) % NUM_RECORDS, text)

    def _write_first_line(self, state: str = "") -> None:
        self.heartbeat += 1
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        where = f"rank {self.rank} of {self.size} on {socket.gethostname()}, process {os.getpid()}"
        self._put(
            0,
            f"line {self.heartbeat}, {self.num_started} calls begun{state}, in {self.phase}, {now}; {where}",
        )
        assert self.file is not None
        os.close(
            os.dup(self.file)
        )  # a network's file system hands to others what is written before a close

    def _put(self, line: int, text: str) -> None:
        assert self.file is not None
        with contextlib.suppress(OSError):
            os.pwrite(
                self.file,
                text[: RECORD_WIDTH - 1].ljust(RECORD_WIDTH - 1).encode("ascii", "replace") + b"\n",
                line * RECORD_WIDTH,
            )

    def _watch(self, end: threading.Event) -> None:
        warned: Any = None
        seen: dict[int, Header | None] = {}  # when it warned
        while not end.wait(HEARTBEAT_S):
            self._restore()
            self._write_first_line()
            for call in list(self.open_calls.values()):
                self._close(call)
            oldest = next(
                (call for call in list(self.open_calls.values()) if not call.work.is_completed()),
                None,
            )
            since = oldest.started_at_heartbeat if oldest else self.last_progress
            waited = (self.heartbeat - since) * HEARTBEAT_S
            if waited < self.timeout_s / 2 or (waited < self.timeout_s and warned == since):
                continue
            silent = self._silent()
            if (
                not oldest
            ):  # nobody waits: one that a slow disk kept from writing for a moment is not dead
                silent = [
                    rank
                    for rank in silent
                    if waited < self.timeout_s or self._first_line(rank) == seen.get(rank)
                ]
            warned, seen = since, self._first_lines() if waited < self.timeout_s else seen
            if oldest and oldest.work.is_completed():
                continue
            if not (oldest or silent):  # all are at work, for as long as it takes
                self.last_progress = self.heartbeat
                continue
            told = self._told(silent, f"has waited for {waited:.0f} s", oldest)
            if waited < self.timeout_s:
                print(f"warning: {told}", file=sys.stderr, flush=True)
            else:
                self._end(told)

    def _end(self, told: str) -> NoReturn:
        self._write_first_line(", ended")
        sys.stdout.flush()
        print(f"error on rank {self.rank}: {told}", file=sys.stderr, flush=True)
        os._exit(1)

    def _first_lines(self) -> dict[int, Header | None]:
        """Of every other rank; None for one that has none in this folder."""
        return {rank: self._first_line(rank) for rank in range(self.size) if rank != self.rank}

    def _first_line(self, rank: int) -> Header | None:
        try:
            with open(open_existing(self._path(rank)), errors="replace") as file:
                match = _FIRST_LINE.match(file.readline(2 * RECORD_WIDTH))
        except OSError:
            return None
        return Header(int(match[1]), int(match[2]), bool(match[3]), match[4]) if match else None

    def _silent(self) -> list[int]:
        """Ranks that have come, and write nothing though they have not ended."""
        before = self._first_lines()
        for _ in range(4):  # meanwhile the others may ask the same
            time.sleep(HEARTBEAT_S)
            self._write_first_line()
        after = self._first_lines()
        return [
            rank
            for rank, line in after.items()
            if line and line == before[rank] != self.stale_headers[rank] and not line.ended
        ]

    def _told(self, silent: list[int], what: str, call: CollectiveCall | None) -> str:
        """Whom this rank waits for, or has lost."""
        where = (
            f"in {call.description}"
            if call
            else f"in a call that is none of the exchange's, step {self.step}"
        )
        late = (
            {}
            if silent or call is None
            else {
                rank: f"late in {line.phase}" if not line.ended else "which has ended"
                for rank, line in self._first_lines().items()
                if line and line.num_started < call.number
            }
        )
        whom = [f"rank {rank}{call.describe_rows(rank) if call else ''}" for rank in silent]
        whom += [
            f"rank {rank}{call.describe_rows(rank) if call else ''}, {why}"
            for rank, why in late.items()
        ]
        named = "; ".join(whom[:4]) + (f"; and {len(whom) - 4} more" if len(whom) > 4 else "")
        if silent:
            named += ": stopped or dead"
        return f"{what} {where}: {named or 'all ranks are in it, so the network may be broken'} (see {self.folder})"


def _reason(error: BaseException) -> str:
    """Its first sentence, without the place in torch's code that it begins with."""
    return re.sub(
        r"^\[[^]]*\] *|\. .*", "", (str(error).strip() or type(error).__name__).splitlines()[0]
    )
