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


@contextlib.contextmanager
def plain_errors(*kinds: type[Exception], run: Path | None = None) -> Iterator[None]:
    """Turns an error into one line on stderr and exit status 2, and Ctrl-C into one line and status 130.

    Rank 0 prints first, and its exit ends the other ranks. A rank that alone found a mistake prints 3 seconds later.

    Args:
        kinds: Exceptions that need no traceback. The default is ValueError, a mistake of the user, and OSError.
        run: The run folder, where the block trains: the line of Ctrl-C names the command that goes on.
    """
    caught = kinds or (ValueError, OSError)
    try:
        yield
    except caught as error:
        if not is_main_rank():
            time.sleep(3)
        where = "error" if is_main_rank() else f"error on rank {os.environ['RANK']}"
        print(one_line(f"{where}: {error}"), file=sys.stderr, flush=True)
        exit_process(2)
    except KeyboardInterrupt:
        if is_main_rank():
            told = "interrupted"
            if run:
                kept = manifest.list_checkpoints(run)
                goes_on = f"; train.py --resume {run} goes on from {kept[-1].name}" if kept else ""
                told += goes_on or " before its first checkpoint"
            print(told, file=sys.stderr, flush=True)
        exit_process(130)
