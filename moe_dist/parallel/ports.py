"""The port at which ranks meet: free when a launcher looks, and soon another's. Imports no torch."""

import errno
import os
import secrets
import socket
from contextlib import suppress

_held: socket.socket | None = None


def hold() -> None:
    """Rank 0 takes MASTER_PORT of its environment at once. torchrun finds a free one and lets it go; torch takes it
    only once it is imported, seconds later. Where it is taken already, nothing is done: `mesh.join` will tell."""
    global _held
    ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else the agent listens there itself
    port = os.environ.get("MASTER_PORT", "")
    if ours and os.environ.get("RANK") == "0" and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 2**16:
        family, both = (socket.AF_INET6, True) if socket.has_dualstack_ipv6() else (socket.AF_INET, False)
        with suppress(OSError):
            _held = socket.create_server(("", int(port)), family=family, dualstack_ipv6=both, backlog=4096)


def give() -> int | None:
    """The file descriptor of the socket that `hold` took, to whoever asks first."""
    global _held
    held, _held = _held, None
    return held.detach() if held else None


def free() -> int:
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
