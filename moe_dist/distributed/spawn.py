"""Functions run by several ranks on this machine, without a launcher.

def ranks(x: int) -> int:                          # in a module: it is imported by name
    mesh = meshes.init_distributed(ep=2)
    ...
    meshes.stop()
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
from typing import Any


class RankFailed(Exception):
    """A rank raised, or died without a word; the text is its traceback."""


def run_distributed(
    function: Callable[..., Any], world: int, *args: Any, timeout: float = 120
) -> list[Any]:
    """Runs `function(*args)` in `world` new processes that can join a process group; returns the results by rank.

    `function`, arguments and results are pickled. Raises RankFailed for the first rank that fails, or the ValueError
    that it raised; TimeoutError after `timeout` seconds. No process is left in any case.
    """
    import torch.distributed as dist  # not above: a rank imports this file before its environment is set

    deadline = time.monotonic() + timeout
    call = pickle.dumps((function, args))
    listener = socket.create_server(
        ("127.0.0.1", 0), backlog=4096
    )  # no other machine reaches it, and it is never let go
    store = dist.TCPStore(
        "127.0.0.1",
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    spawn = multiprocessing.get_context(
        "forkserver"
    )  # who starts many may have it import what they need once
    processes: list[Any] = []
    running: dict[Connection, int] = {}  # where a rank's answer comes from -> the rank
    results: list[Any] = [None] * world
    try:
        for rank in range(world):
            answer, say = spawn.Pipe(duplex=False)
            told = (say, call, rank, world, store.port, timeout)
            processes.append(spawn.Process(target=_rank, args=told, daemon=True))
            processes[rank].start()
            say.close()  # the rank alone holds it now, so that its death is an end of file
            running[answer] = rank
        while running:
            ready = wait(list(running), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(
                    f"{_name(function)}: ranks {sorted(running.values())} of {world} not done after {timeout} s"
                )
            answers = [_receive(answer, running.pop(answer)) for answer in ready]  # type: ignore[arg-type, call-overload]
            failures = sorted(
                (seconds, rank, value) for seconds, rank, failed, value in answers if failed
            )
            if failures:  # the first: the others may only have lost their peer
                _, rank, text = failures[0]
                if not text:
                    processes[rank].join(5)
                    text = f"died without a traceback, exit code {processes[rank].exitcode}"
                if isinstance(text, ValueError):
                    raise text
                raise RankFailed(f"{_name(function)}: rank {rank} of {world}\n{text}")
            for _, rank, _, value in answers:
                results[rank] = pickle.loads(value)
        for process in processes:
            process.join(5)
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def _receive(answer: Any, rank: int) -> tuple[float, int, bool, Any]:
    """(seconds, rank, failed, pickled result or traceback)."""
    try:
        seconds, failed, value = answer.recv()
        return seconds, rank, failed, value
    except EOFError:
        return 0.0, rank, True, ""  # before any failure that its peers report
    finally:
        answer.close()


def _rank(say: Connection, call: bytes, rank: int, world: int, port: int, timeout: float) -> None:
    """One process. The environment is set before torch is imported, which unpickling the call may do."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # another process listens there
        "OMP_NUM_THREADS": "1",
    }
    faulthandler.dump_traceback_later(0.8 * timeout)  # where it hangs, to stderr
    message: tuple[float, bool, Any]
    try:
        import torch

        torch.set_num_threads(1)
        function, args = pickle.loads(call)
        message = (time.monotonic(), False, pickle.dumps(function(*args)))
    except ValueError as error:  # a user's mistake
        message = (time.monotonic(), True, error)
    except BaseException:  # the parent raises it
        message = (time.monotonic(), True, traceback.format_exc())
    faulthandler.cancel_dump_traceback_later()
    say.send(message)
    say.close()


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))
