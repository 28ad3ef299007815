"""The rendezvous port of the ranks: no other process can take it."""

import errno
import os
import socket
import threading
from pathlib import Path

import pytest
from paths import ROOT

from moe_dist.distributed import mesh, rendezvous_port


def test_train_reserves_the_port_first() -> None:
    """Only imports of the standard library come before."""
    lines = [
        line
        for line in Path(ROOT / "train.py").read_text().splitlines()
        if line.startswith(("from", "import"))
    ]
    ours = [line for line in lines if "moe_dist" in line]
    assert ours[0] == "from moe_dist.distributed import rendezvous_port" and lines.index(
        ours[0]
    ) == len(lines) - len(ours)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1"},
        {
            "TORCHELASTIC_USE_AGENT_STORE": "True"
        },  # of torchrun --standalone: its agent listens there
        {"MASTER_PORT": "99999"},
        {"MASTER_PORT": "9" * 5000},
        {"MASTER_PORT": ""},
    ],
)
def test_only_rank_0_reserves_the_port(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in (
        {"RANK": "0", "MASTER_PORT": str(rendezvous_port.find_free_port())} | environment
    ).items():
        monkeypatch.setenv(key, value)
    rendezvous_port.reserve()
    assert rendezvous_port.release_fd() is None


@pytest.mark.parametrize(
    ("master", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.3", "127.0.0.3"),
        ("::1", "::1"),
        ("localhost", "127.0.0.1"),
        ("node0", "::" if socket.has_dualstack_ipv6() else "0.0.0.0"),
        ("10.0.0.1", "::"),
        ("", "::"),
    ],
)
def test_port_of_one_node_is_bound_to_loopback(
    master: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ":" in address and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    for key, value in {
        "RANK": "0",
        "MASTER_ADDR": master,
        "MASTER_PORT": str(rendezvous_port.find_free_port()),
    }.items():
        monkeypatch.setenv(key, value)
    rendezvous_port.reserve()
    held = rendezvous_port.release_fd()
    assert held is not None
    with socket.socket(fileno=held) as listening:
        assert listening.getsockname()[0] == address


def test_port_of_another_process_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        rendezvous_port.reserve()
        assert rendezvous_port.release_fd() is None


def test_free_port_is_outside_the_ephemeral_range() -> None:
    assert all(1024 <= rendezvous_port.find_free_port() < 32768 for _ in range(100))


def test_sigterm_before_rendezvous_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit skips Python's cleanup, in which torch's wait may abort."""

    class Ended(Exception):
        pass

    def ended(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(mesh, "_create_store", lambda *_: never.wait())
    monkeypatch.setattr(os, "_exit", ended)
    never = threading.Event()
    with pytest.raises(SystemExit, match="2"):
        mesh.exit_process(2)
    with pytest.raises(TimeoutError):
        mesh._rendezvous(-2)
    with pytest.raises(Ended, match="2"):
        mesh.exit_process(2)
    never.set()


def test_missing_free_port_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(socket.socket, "bind", forbidden)
    with pytest.raises(PermissionError):
        rendezvous_port.find_free_port()
