"""Turns expected errors into one line and an exit status."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from moe_dist.checkpoint import manifest
from moe_dist.config.messages import one_line
from moe_dist.distributed.mesh import exit_process
from moe_dist.monitoring.console import is_main_rank

# exit statuses
MISTAKE = 2
INTERRUPTED = 130
# an error on another rank is printed this much later, because rank 0 usually has the same error
OTHER_RANKS_DELAY_S = 3


@contextlib.contextmanager
def plain_errors(*kinds: type[Exception], run: Path | None = None) -> Iterator[None]:
    """Turns an error into one line on stderr and exit status 2, Ctrl-C into status 130.

    Rank 0 prints first, and its exit ends the other ranks. If only another rank has an error, it
    prints 3 seconds later.

    Args:
        *kinds: Exceptions to print without a traceback; by default ValueError (a user mistake) and
            OSError.
        run: The run folder if the block trains. The Ctrl-C message then shows the command to
            continue the run.
    """
    expected = kinds or (ValueError, OSError)
    try:
        yield
    except expected as error:
        prefix = "error"
        if not is_main_rank():
            time.sleep(OTHER_RANKS_DELAY_S)
            prefix = f"error on rank {os.environ['RANK']}"
        print(one_line(f"{prefix}: {error}"), file=sys.stderr, flush=True)
        exit_process(MISTAKE)
    except KeyboardInterrupt:
        if is_main_rank():
            print(f"interrupted{_how_to_continue(run)}", file=sys.stderr, flush=True)
        exit_process(INTERRUPTED)


def _how_to_continue(run: Path | None) -> str:
    """Returns the second half of the Ctrl-C message."""
    if run is None:
        return ""
    checkpoints = manifest.list_checkpoints(run)
    if not checkpoints:
        return " before its first checkpoint"
    return f"; train.py --resume {run} goes on from {checkpoints[-1].name}"
