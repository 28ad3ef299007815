"""Flight recorder: logs every collective of this rank and names the rank that blocks it.

`FlightRecorder.recording` opens RUN/calls/rank00000.txt (`record_file`) and starts a thread, the
watch. The watch writes the file's header twice a second (the heartbeat) and tracks this rank's
progress with the states in `watch_state`. After half the timeout without progress it prints a
warning and continues to wait. After the timeout it prints an error and ends the process.

Before either message the watch reads the other ranks' headers twice, two seconds apart. A rank
whose header stays the same is stopped or dead. A rank with new headers but fewer collectives is
late. So a rank ends at most 5 seconds after the timeout. If a collective fails because a peer is
gone, the same comparison names the peer at once.

Time is counted in this rank's heartbeats, never by comparing clocks: a rank that was itself stopped
for an hour has counted no time, so it reports no other rank.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from moe_dist.distributed.labels import CommLabel
from moe_dist.distributed.record_file import Header, RecordFiles
from moe_dist.distributed.watch_state import Clock, SystemClock, Watch, WatchEvent, WatchState

T = TypeVar("T")
HEARTBEAT_S = 0.5  # seconds between two headers
LOOK_HEARTBEATS = 4  # heartbeats between the two reads of the other ranks' headers
MAX_NAMED_RANKS = 4  # in a message


@dataclass(eq=False)
class CollectiveCall:
    """A collective started by this rank.

    Attributes:
        work: The torch.distributed handle.
        number: Index among this rank's collectives, from 1.
        description: Direction, layer and step.
        peers: Participating global ranks, this one included.
        send_P: Rows sent to each peer; None if all peers get the same.
        receive_P: Rows received from each peer; None if all peers send the same.
        started_at_heartbeat: This rank's heartbeat at the start.
        start_time: The recorder's clock at the start, in seconds.
        waited: True if `wait_for` was called. On CUDA the collective may still run.
        returned: True if a library's blocking call, which is its own `work`, has returned.
    """

    work: Any
    number: int = 0
    description: str = ""
    peers: tuple[int, ...] = ()
    send_P: list[int] | None = None
    receive_P: list[int] | None = None
    started_at_heartbeat: int = 0
    start_time: float = 0.0
    waited: bool = False
    returned: bool = False

    def is_completed(self) -> bool:
        """Returns `returned`, as the `work` of a library's blocking call."""
        return self.returned

    def describe_rows(self, rank: int) -> str:
        """Returns the rows sent to and received from a rank, or "" if they are not counted."""
        if self.send_P is None or self.receive_P is None or rank not in self.peers:
            return ""
        i = self.peers.index(rank)
        return f" ({self.send_P[i]} rows to it, {self.receive_P[i]} from it)"


@dataclass
class FlightRecorder:
    """One rank's flight recorder. Disabled (no overhead) outside `recording()`.

    Attributes:
        rank: This rank.
        size: World size.
        step: Training step; the caller updates it.
        phase: The step's phase (`enter_phase`).
        on_phase: Called with each phase and each direction before it begins (fault injection).
        clock: Time source.
        files: All ranks' files; None while disabled.
    """

    rank: int = 0
    size: int = 1
    step: int = 0
    phase: str = "start"
    on_phase: Callable[[str], None] | None = None
    clock: Clock = field(default_factory=SystemClock)
    files: RecordFiles | None = None

    @contextlib.contextmanager
    def recording(
        self, run: Path, timeout_s: float, barrier: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Records collectives and watches this rank's progress.

        If a collective fails because another rank is gone, the process prints which one and ends at
        once: an orderly shutdown could wait for the lost rank, or for the network.

        Args:
            run: The run folder.
            timeout_s: Seconds without progress after which this rank ends.
            barrier: Returns when all ranks are ready to train. Time before it does not count.

        Yields:
            Nothing.
        """
        if not self._start(run, timeout_s, barrier):
            yield
            return
        end = threading.Event()
        thread = threading.Thread(target=self._watch_loop, args=(end,), name="calls", daemon=True)
        thread.start()
        try:
            yield
        except RuntimeError as error:  # gloo and NCCL raise it if a peer is gone
            self._explain(error)
            raise
        finally:
            end.set()
            thread.join()
            self._stop()

    def enter_phase(self, phase: str) -> None:
        """Sets the step's phase; other ranks read it from this rank's header."""
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
        """Starts a collective and records it.

        Args:
            label: Label for the flight recorder and the byte counts.
            peers: Participating global ranks, this one included.
            start: Starts it and returns the torch.distributed handle.
            send_P: Rows sent to each peer, if they differ.
            receive_P: Rows received from each peer, if they differ.

        Returns:
            The call; pass it to `wait_for`.
        """
        if self.files is None:
            return CollectiveCall(start())
        call = self._begin(label, peers, send_P, receive_P)
        call.work = start()
        self.open_calls[call.number] = call
        return call

    def wait_for(self, call: CollectiveCall) -> None:
        """Blocks until the collective completes; on CUDA, makes the current stream wait for it."""
        call.work.wait()
        if self.files is not None:
            call.waited = True
            self._close_if_completed(call)

    def record_blocking_call(
        self,
        label: CommLabel,
        peers: tuple[int, ...],
        run: Callable[[], T],
        work: Callable[[T], Any],
    ) -> T:
        """Records a library's collective, which may block.

        Args:
            label: Label for the flight recorder and the byte counts.
            peers: Participating global ranks, this one included.
            run: Makes the call.
            work: Takes `run`'s result and returns its unfinished work (an object with
                `is_completed`), or None if nothing is left to wait for.

        Returns:
            `run`'s result.
        """
        if self.files is None:
            return run()
        call = self._begin(label, peers)
        call.work = call  # open until `run` returns
        self.open_calls[call.number] = call
        result = run()
        call.work = work(result) or call
        call.waited = True
        call.returned = call.work is call
        self._close_if_completed(call)
        return result

    def _start(self, run: Path, timeout_s: float, barrier: Callable[[], None]) -> bool:
        """Opens the file and writes the first header. Returns False if it cannot be written."""
        files = RecordFiles(run, self.rank, self.size)
        self.timeout_s = timeout_s
        self.num_started = 0
        self.heartbeat = 0
        self.last_progress = 0  # heartbeat at which a collective last started or ended
        self.open_calls: dict[int, CollectiveCall] = {}
        self.watch = Watch()
        self.stale_headers = files.read_headers()  # of an earlier start
        barrier()
        self.start_time = self.clock.now()
        try:
            files.create()
        except OSError as error:
            print(
                f"warning: {files.folder}: {error.strerror}; calls are not recorded",
                file=sys.stderr,
                flush=True,
            )
            return False
        self.files = files
        self._write_header()
        return True

    def _stop(self) -> None:
        assert self.files is not None
        self._write_header(ended=True)
        self.files.close()
        self.files = None

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
            work=None,
            number=self.num_started,
            description=f"{label.describe()}, step {self.step}",
            peers=peers,
            send_P=send_P,
            receive_P=receive_P,
            started_at_heartbeat=self.heartbeat,
            start_time=self.clock.now(),
        )
        self._write_record(call, "begun")
        return call

    def _close_if_completed(self, call: CollectiveCall) -> None:
        if not (call.waited and call.work.is_completed()):
            return
        # the main thread and the watch may both get here: the one that pops the call records it
        if self.open_calls.pop(call.number, None):
            self.last_progress = self.heartbeat
            milliseconds = 1e3 * (self.clock.now() - call.start_time)
            self._write_record(call, f"done after {milliseconds:.3f} ms")

    def _write_record(self, call: CollectiveCall, state: str) -> None:
        rows = ""
        if call.send_P is not None and call.receive_P is not None:
            rows = f", {sum(call.send_P)} rows out, {sum(call.receive_P)} in"
        seconds = call.start_time - self.start_time
        assert self.files is not None
        self.files.write_record(
            call.number, f"{call.number:8d}  {seconds:12.4f} s  {call.description}{rows}: {state}"
        )

    def _write_header(self, ended: bool = False) -> None:
        """Writes the next heartbeat."""
        assert self.files is not None
        self.heartbeat += 1
        header = Header(self.heartbeat, self.num_started, ended, self.phase)
        self.files.write_header(header, time.strftime("%Y-%m-%d %H:%M:%S"))

    def _watch_loop(self, end: threading.Event) -> None:
        while not end.wait(HEARTBEAT_S):
            self._tick()

    def _tick(self) -> None:
        """Writes a heartbeat and checks this rank's progress."""
        assert self.files is not None
        self.files.restore()
        self._write_header()
        for call in list(self.open_calls.values()):
            self._close_if_completed(call)
        oldest = self._oldest_open_call()
        since = oldest.started_at_heartbeat if oldest else self.last_progress
        if since != self.watch.since:
            self.watch.since = since
            self.watch.apply(WatchEvent.PROGRESS)
        idle_s = (self.heartbeat - since) * HEARTBEAT_S
        if idle_s >= self.timeout_s:
            event = WatchEvent.TIMEOUT
        elif idle_s >= self.timeout_s / 2:
            event = WatchEvent.HALF_TIMEOUT
        elif oldest:
            event = WatchEvent.CALL_OPEN
        else:
            return
        if self.watch.apply(event) and event is not WatchEvent.CALL_OPEN:
            self._look(oldest, idle_s)

    def _oldest_open_call(self) -> CollectiveCall | None:
        for call in list(self.open_calls.values()):
            if not call.work.is_completed():
                return call
        return None

    def _look(self, call: CollectiveCall | None, idle_s: float) -> None:
        """Finds the blocking ranks; prints a warning if stalled, ends if lost."""
        assert self.files is not None
        lost = self.watch.state is WatchState.LOST
        silent = self._silent_ranks()
        if lost and call is None:
            # no rank waits here, and a slow disk can keep a live rank from writing for a moment:
            # only a rank that has been silent since the warning is dead
            seen = self.watch.headers_at_warning
            silent = [rank for rank in silent if self.files.read_header(rank) == seen.get(rank)]
        if not lost:
            self.watch.headers_at_warning = self.files.read_headers()
        if call and call.work.is_completed():
            return
        if call is None and not silent:
            self.last_progress = self.heartbeat
            self.watch.apply(WatchEvent.ALL_WORKING)
            return
        message = self._describe_block(f"has waited for {idle_s:.0f} s", silent, call)
        if lost:
            self._end(message)
        else:
            print(f"warning: {message}", file=sys.stderr, flush=True)

    def _silent_ranks(self) -> list[int]:
        """Returns the started ranks without heartbeats, except ended ones."""
        assert self.files is not None
        before = self.files.read_headers()
        for _ in range(LOOK_HEARTBEATS):
            self.clock.sleep(HEARTBEAT_S)
            self._write_header()  # other ranks may look at this one meanwhile
        silent = []
        for rank, header in self.files.read_headers().items():
            if header is None or header.ended:
                continue
            if header == before[rank] and header != self.stale_headers[rank]:
                silent.append(rank)
        return silent

    def _explain(self, error: RuntimeError) -> None:
        """Ends the process if another rank caused a collective's failure."""
        assert self.files is not None
        call = next(iter(self.open_calls.values()), None)
        silent = self._silent_ranks()
        if silent:
            message = self._describe_block("lost another rank", silent, call)
            self._end(f"{message}: {_first_sentence(error)}")
        headers = self.files.read_headers()
        ended = [str(rank) for rank, header in headers.items() if header and header.ended]
        if call and ended:
            ranks = ", ".join(ended[:MAX_NAMED_RANKS])
            self._end(f"in {call.description}: rank {ranks} ended first; see its error message")

    def _describe_block(self, problem: str, silent: list[int], call: CollectiveCall | None) -> str:
        """Returns a message with the silent ranks, or else the late ones."""
        assert self.files is not None
        named = []
        for rank in silent:
            named.append(f"rank {rank}{call.describe_rows(rank) if call else ''}")
        if call and not silent:
            for rank, header in self.files.read_headers().items():
                if header and header.num_started < call.number:
                    state = "which has ended" if header.ended else f"late in {header.phase}"
                    named.append(f"rank {rank}{call.describe_rows(rank)}, {state}")
        ranks = "; ".join(named[:MAX_NAMED_RANKS])
        if len(named) > MAX_NAMED_RANKS:
            ranks += f"; and {len(named) - MAX_NAMED_RANKS} more"
        if silent:
            ranks += ": stopped or dead"
        place = call.description if call else f"a call that is not recorded, step {self.step}"
        cause = ranks or "all ranks are in it, so the network may be broken"
        return f"{problem} in {place}: {cause} (see {self.files.folder})"

    def _end(self, message: str) -> NoReturn:
        """Ends this process at once."""
        self._write_header(ended=True)
        sys.stdout.flush()
        print(f"error on rank {self.rank}: {message}", file=sys.stderr, flush=True)
        os._exit(1)


def _first_sentence(error: BaseException) -> str:
    """Returns an error's first sentence, without torch's leading [file:line]."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[[^]]*\] *|\. .*", "", line)
