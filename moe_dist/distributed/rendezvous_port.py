"""Reserves the rendezvous port. Imports no torch.

torchrun finds a free port and releases it; torch binds it only after its import, seconds later. In
between another process could take it, so rank 0 binds it first.
"""

import errno
import ipaddress
import os
import secrets
import socket
from contextlib import suppress

FIRST_PORT = 20000
NUM_PORTS = 12768  # up to 32767: Linux assigns the ports above to any socket (ip_local_port_range)
BACKLOG = 4096  # simultaneous connections

_reserved: socket.socket | None = None
_reserved_ipv6: socket.socket | None = None


def reserve() -> None:
    """Binds MASTER_PORT on rank 0, when its process starts.

    Does nothing on other ranks, without a valid MASTER_PORT, or if the port is taken:
    `mesh.init_process_group` reports it. With torchrun's agent store the agent itself listens.
    """
    global _reserved, _reserved_ipv6
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    if os.environ.get("RANK") != "0":
        return
    text = os.environ.get("MASTER_PORT", "")
    is_port = text.isdecimal() and len(text) <= 5 and 0 < int(text) < 2**16
    if not is_port:
        return
    host = os.environ.get("MASTER_ADDR", "")
    with suppress(OSError):
        _reserved = _listen(host, int(text))
    # localhost is ::1 too: bind it without listening, so no other process can
    with suppress(OSError):
        if _reserved and host == "localhost":
            _reserved_ipv6 = socket.socket(socket.AF_INET6)
            _reserved_ipv6.bind(("::1", int(text)))


def _listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket: for a loopback `host` on it alone, else on every address."""
    with suppress(ValueError):
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
        if address.is_loopback:
            family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
            return socket.create_server((str(address), port), family=family, backlog=BACKLOG)
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
        )
    return socket.create_server(("", port), family=socket.AF_INET, backlog=BACKLOG)


def release_fd() -> int | None:
    """Returns the reserved socket's file descriptor to the first caller, then None."""
    global _reserved
    if _reserved is None:
        return None
    descriptor = _reserved.detach()
    _reserved = None
    return descriptor


def find_free_port() -> int:
    """Finds a free port on this machine.

    Returns:
        The port, below the range from which Linux assigns ports.

    Raises:
        OSError: A port cannot be bound, but not because it is in use.
    """
    while True:
        port = FIRST_PORT + secrets.randbelow(NUM_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
