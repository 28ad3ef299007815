"""The port at which ranks meet: free when a launcher looks, and soon another's. Imports no torch."""

import errno
import ipaddress
import os
import secrets
import socket
from contextlib import suppress

_held: socket.socket | None = None
_beside: socket.socket | None = None


def reserve() -> None:
    """Rank 0 takes MASTER_PORT of its environment at once. torchrun finds a free one and lets it go; torch takes it
    only once it is imported, seconds later. Where it is taken already, nothing is done: `mesh.init_process_group` will tell."""
    global _held, _beside
    ours = (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    )  # else the agent listens there itself
    port = os.environ.get("MASTER_PORT", "")
    if (
        ours
        and os.environ.get("RANK") == "0"
        and port.isdecimal()
        and len(port) <= 5
        and 0 < int(port) < 2**16
    ):
        with suppress(OSError):
            _held = _listen(os.environ.get("MASTER_ADDR", ""), int(port))
        with suppress(
            OSError
        ):  # localhost is ::1 too: nobody listens there, and no other process may
            if _held and os.environ.get("MASTER_ADDR") == "localhost":
                _beside = socket.socket(socket.AF_INET6)
                _beside.bind(("::1", int(port)))


def _listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens where the ranks meet: at the loopback address where `host` is one, so that no other
    machine reaches it, else at every address of this machine."""
    with suppress(ValueError):
        loopback = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
        if loopback.is_loopback:
            family = socket.AF_INET6 if loopback.version == 6 else socket.AF_INET
            return socket.create_server((str(loopback), port), family=family, backlog=4096)
    family, both = (
        (socket.AF_INET6, True) if socket.has_dualstack_ipv6() else (socket.AF_INET, False)
    )
    return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=4096)


def release_fd() -> int | None:
    """The file descriptor of the socket that `hold` took, to whoever asks first."""
    global _held
    held, _held = _held, None
    return held.detach() if held else None


def find_free_port() -> int:
    """A port of this machine that is free, below those that Linux by itself hands out to whoever asks for any. Raises
    OSError where none can be had."""
    while True:
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port := 20000 + secrets.randbelow(12768)))
                return port
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
