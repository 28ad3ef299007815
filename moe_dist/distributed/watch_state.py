"""The watch over a rank's progress: its states, their transitions, and the clock.

    state      meaning
    working    no collective is open
    waiting    a collective is open
    stalled    no progress for half the timeout; on entry the watch looks at the other ranks and
               prints a warning
    lost       no progress for the timeout; on entry the watch looks again, prints an error and ends
               the process

"Progress" is the start or the end of a collective. The watch itself is in `flight_recorder`.
"""

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from moe_dist.distributed.record_file import Header


class Clock(Protocol):
    """A time source; tests replace it."""

    def now(self) -> float:
        """Returns seconds since an arbitrary start."""
        ...

    def sleep(self, seconds: float) -> None:
        """Blocks the calling thread."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        """Returns `time.perf_counter()`."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Calls `time.sleep`."""
        time.sleep(seconds)


class WatchState(Enum):
    """This rank's progress, as observed by the watch."""

    WORKING = "working"
    WAITING = "waiting"
    STALLED = "stalled"
    LOST = "lost"


class WatchEvent(Enum):
    """The watch's observation at one heartbeat."""

    PROGRESS = "a collective has started or completed since the last heartbeat"
    CALL_OPEN = "a collective is open, for less than half the timeout"
    HALF_TIMEOUT = "no progress for half the timeout"
    TIMEOUT = "no progress for the timeout"
    ALL_WORKING = "no collective is open, and every other rank has answered"


# An unlisted pair changes nothing. STALLED on HALF_TIMEOUT is not listed, so one stall has
# one warning. LOST on TIMEOUT is, so the look is repeated until the process ends.
TRANSITIONS = {
    (WatchState.WORKING, WatchEvent.CALL_OPEN): WatchState.WAITING,
    (WatchState.WORKING, WatchEvent.HALF_TIMEOUT): WatchState.STALLED,
    (WatchState.WORKING, WatchEvent.TIMEOUT): WatchState.LOST,
    (WatchState.WAITING, WatchEvent.PROGRESS): WatchState.WORKING,
    (WatchState.WAITING, WatchEvent.HALF_TIMEOUT): WatchState.STALLED,
    (WatchState.WAITING, WatchEvent.TIMEOUT): WatchState.LOST,
    (WatchState.STALLED, WatchEvent.PROGRESS): WatchState.WORKING,
    (WatchState.STALLED, WatchEvent.ALL_WORKING): WatchState.WORKING,
    (WatchState.STALLED, WatchEvent.TIMEOUT): WatchState.LOST,
    (WatchState.LOST, WatchEvent.PROGRESS): WatchState.WORKING,
    (WatchState.LOST, WatchEvent.ALL_WORKING): WatchState.WORKING,
    (WatchState.LOST, WatchEvent.TIMEOUT): WatchState.LOST,
}


@dataclass
class Watch:
    """The watch's state between heartbeats.

    Attributes:
        state: This rank's progress.
        since: Heartbeat at the last progress. It identifies a stall.
        headers_at_warning: The other ranks' headers after the last warning.
    """

    state: WatchState = WatchState.WORKING
    since: int = 0
    headers_at_warning: dict[int, Header | None] = field(default_factory=dict)

    def apply(self, event: WatchEvent) -> bool:
        """Changes the state by `TRANSITIONS`. Returns False if the table has no such pair."""
        entered = TRANSITIONS.get((self.state, event))
        if entered is None:
            return False
        self.state = entered
        return True
