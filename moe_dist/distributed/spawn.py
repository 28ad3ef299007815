"""Runs a function on several ranks on this machine, without a launcher.

def ranks(x: int) -> int:                          # in a module: it is imported by name
    mesh = meshes.init_distributed(ep=2)
    ...
    meshes.shutdown()
    return mesh.dp.index + x

assert run_distributed(ranks, 2, 10) == [10, 11]   # by rank
"""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple


class RankFailed(Exception):
    """Raised if a rank raises (the text is its traceback) or dies."""


class _Answer(NamedTuple):
    """A rank's last message.

    Attributes:
        time: The rank's `time.monotonic()`, to find the first among several failures.
        rank: The rank.
        failed: True if the function raised.
        value: The pickled result, a ValueError, a traceback, or "" if the rank died.
    """

    time: float
    rank: int
    failed: bool
    value: Any


def run_distributed(
    function: Callable[..., Any], world: int, *args: Any, timeout: float = 120
) -> list[Any]:
    """Runs `function(*args)` in new processes, which can join a process group.

    Function, arguments and results are pickled. All processes have ended on return.

    Args:
        function: A function at a module's top level.
        world: World size.
        *args: Its arguments.
        timeout: Seconds until the processes are killed.

    Returns:
        The results by rank.

    Raises:
        ValueError: The first failed rank raised it.
        RankFailed: The first failed rank raised another exception, or died.
        TimeoutError: A rank does not finish in time.
    """
    import torch.distributed as dist  # here: a rank imports this file before it sets its variables

    deadline = time.monotonic() + timeout
    call = pickle.dumps((function, args))
    # bound to loopback, unreachable from other machines, and held until the end
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    store = dist.TCPStore(
        "127.0.0.1",
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    # a fork server imports a module once for many processes (set_forkserver_preload)
    context = multiprocessing.get_context("forkserver")
    processes: list[Any] = []
    running: dict[Connection, int] = {}  # receiving end of a rank's pipe -> rank
    results: list[Any] = [None] * world
    try:
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            rank_args = (sender, call, rank, world, store.port, timeout)
            processes.append(context.Process(target=_run_rank, args=rank_args, daemon=True))
            processes[rank].start()
            sender.close()  # the rank has the only copy, so its death closes the pipe
            running[receiver] = rank
        while running:
            ready = wait(list(running), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(
                    f"{_name(function)}: ranks {sorted(running.values())} of {world} not done "
                    f"after {timeout} s"
                )
            answers = []
            for connection in ready:
                answers.append(_receive(connection, running.pop(connection)))  # type: ignore[arg-type, call-overload]
            failures = [answer for answer in answers if answer.failed]
            if failures:  # report the first: the others may only have lost their peer
                failure = min(failures, key=lambda answer: (answer.time, answer.rank))
                _raise_failure(failure, processes[failure.rank], _name(function), world)
            for answer in answers:
                results[answer.rank] = pickle.loads(answer.value)
        for process in processes:
            process.join(5)
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def _receive(receiver: Any, rank: int) -> _Answer:
    try:
        seconds, failed, value = receiver.recv()
        return _Answer(seconds, rank, failed, value)
    except EOFError:  # time 0: a death comes before all failures of its peers
        return _Answer(0.0, rank, True, "")
    finally:
        receiver.close()


def _raise_failure(failure: _Answer, process: Any, name: str, world: int) -> None:
    """Raises a failed rank's exception."""
    text = failure.value
    if isinstance(text, ValueError):
        raise text
    if not text:
        process.join(5)
        text = f"died without a traceback, exit code {process.exitcode}"
    raise RankFailed(f"{name}: rank {failure.rank} of {world}\n{text}")


def _run_rank(
    sender: Connection, call: bytes, rank: int, world: int, port: int, timeout: float
) -> None:
    """Runs the call in one rank's process and sends (time, failed, value)."""
    # before torch is imported, which unpickling the call may do
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the parent process listens there
        "OMP_NUM_THREADS": "1",
    }
    faulthandler.dump_traceback_later(0.8 * timeout)  # to stderr, shows where a rank hangs
    message: tuple[float, bool, Any]
    try:
        import torch

        torch.set_num_threads(1)
        function, args = pickle.loads(call)
        message = (time.monotonic(), False, pickle.dumps(function(*args)))
    except ValueError as error:  # a user's mistake
        message = (time.monotonic(), True, error)
    except BaseException:  # raised again by the parent
        message = (time.monotonic(), True, traceback.format_exc())
    faulthandler.cancel_dump_traceback_later()
    sender.send(message)
    sender.close()


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))
