"""The mesh of ranks, and how a config is laid out on it.

Axes: `ep`, the ranks that together hold one whole set of experts (consecutive ranks, so that an exchange stays inside
a node where it can); `edp`, the ranks that hold the same experts as I do; `dp`, all ranks, each with data of its own.

    rank = edp_index * ep + ep_index          world = edp * ep
"""

import os
import sys
import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from moe_dist.distributed import rendezvous_port
from moe_dist.distributed.batch_layout import check_ep
from moe_dist.distributed.flight_recorder import FlightRecorder
from moe_dist.distributed.labels import CommLabel, TrafficKey
from moe_dist.distributed.launch_env import (
    JOIN_TIMEOUT_VARIABLE,
    _check_number,
    local_rank,
    ranks_per_node,
    world_size,
)
from moe_dist.monitoring.step_timer import StepTimer


@dataclass(frozen=True)
class Axis:
    """One group of ranks. `bytes_sent` counts bytes sent to other ranks."""

    size: int
    index: int  # of this rank
    group: dist.ProcessGroup
    node_P: tuple[int, ...] = ()  # of each of its ranks; empty where all are in one
    bytes_sent: Counter[TrafficKey] = field(default_factory=Counter)
    flight_recorder: FlightRecorder = field(default_factory=FlightRecorder)
    ranks: tuple[int, ...] = ()  # of the world, in the order of the axis

    def record_bytes(self, label: CommLabel, bytes_P: list[int]) -> None:
        """What this rank sends to each, over the links between nodes apart from the others."""
        self.bytes_sent[TrafficKey(label.place, label.direction, inter_node=False)] += 0
        for peer, num_bytes in enumerate(bytes_P):
            if peer != self.index:
                self._send(label, peer, num_bytes)

    def record_ring_bytes(self, label: CommLabel, num_bytes: int) -> None:
        """What each rank sends to the next one, and the last to the first, where a sum goes round them."""
        self._send(label, (self.index + 1) % self.size, num_bytes)

    def _send(self, label: CommLabel, peer: int, num_bytes: int) -> None:
        inter_node = bool(self.node_P) and self.node_P[peer] != self.node_P[self.index]
        self.bytes_sent[TrafficKey(label.place, label.direction, inter_node)] += num_bytes

    def split_ranges(self, number: int) -> list[slice]:
        """`number` things in consecutive parts, one for each rank, as `torch.chunk` cuts them: equal but for the last
        ones, which may be smaller or empty."""
        most = -(-number // self.size)
        return [slice(min(i * most, number), min((i + 1) * most, number)) for i in range(self.size)]


@dataclass(frozen=True)
class Mesh:
    """Built once by `start` and passed explicitly. Owns which experts are mine."""

    ep: Axis
    expert_dp: Axis
    dp: Axis
    ranks_per_node: int
    device: torch.device
    device_mesh: DeviceMesh  # (ep, edp), on CPU: for sharded tensors in checkpoints
    checkpoint_group: (
        dist.ProcessGroup
    )  # all ranks on gloo, for checkpoints: one may be written while a step runs
    intra_node: Axis | None = (
        None  # the ranks of `ep` in this rank's node, where `ep` spans several nodes evenly
    )
    step_timer: StepTimer = field(default_factory=lambda: StepTimer(torch.device("cpu")))
    flight_recorder: FlightRecorder = field(default_factory=FlightRecorder)  # of all its axes

    @property
    def bytes_sent(self) -> Counter[TrafficKey]:
        """Returns the bytes that this rank has sent to other ranks so far, over all axes."""
        total: Counter[TrafficKey] = Counter()
        for axis in (
            self.ep,
            self.expert_dp,
            self.dp,
            *([self.intra_node] if self.intra_node else []),
        ):
            total.update(axis.bytes_sent)  # "+" would drop who has sent nothing yet
        return total

    @property
    def is_main(self) -> bool:
        return self.dp.index == 0

    def local_experts(self, num_experts: int) -> range:
        """Global ids of the experts (or groups of experts) on this rank: consecutive blocks along `ep`."""
        per_rank = num_experts // self.ep.size
        return range(self.ep.index * per_rank, (self.ep.index + 1) * per_rank)

    def owns_item(self, i: int) -> bool:
        """Whether the i-th of many pieces of work is this rank's: they go round."""
        return i % self.dp.size == self.dp.index


RENDEZVOUS_THREAD = "meeting"  # name of the thread in which a rank waits for the others


def init_distributed(ep: int, timeout_s: float = 60.0) -> Mesh:
    """Joins the other ranks and arranges them. Raises ValueError where `ep` does not divide their number."""
    check_ep(ep, world_size())
    init_process_group(
        timedelta(seconds=max(600, 2 * timeout_s))
    )  # torch's own word comes after ours (`record`)
    return build_mesh(ep)


def init_process_group(timeout: timedelta = timedelta(minutes=10)) -> None:
    """Enters the process group that the launcher's environment describes: NCCL where there is CUDA, gloo elsewhere.

    `timeout` is for steps; for all ranks to meet there are MOE_DIST_JOIN_SECONDS of the environment, or 5 minutes.

    Raises ValueError where rank 0's port is taken, or not all ranks meet there in time.
    """
    if "MASTER_ADDR" not in os.environ:  # one process without a launcher is a world of one
        alone = dict(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(rendezvous_port.find_free_port()),
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
        )
        os.environ |= alone
        rendezvous_port.reserve()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    os.environ.setdefault(JOIN_TIMEOUT_VARIABLE, "300")
    _check_number(JOIN_TIMEOUT_VARIABLE, 1, 10**6)
    try:
        store, rank, world = _rendezvous(int(os.environ[JOIN_TIMEOUT_VARIABLE]))
        store.set_timeout(timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
    except (dist.DistError, TimeoutError) as error:
        where = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
        reason = (str(error) or f"no answer in {os.environ[JOIN_TIMEOUT_VARIABLE]} s").splitlines()[
            0
        ]
        raise ValueError(
            f"{where}: {world_size()} ranks cannot meet there; start them all, with a free port of rank 0 ({reason})"
        ) from None


def _rendezvous(seconds: int) -> tuple[dist.Store, int, int]:
    """The store that the ranks share, this rank and their number. In a thread, for where a stranger holds the port,
    torch waits for its answer without end. Raises TimeoutError then, and DistError for what torch finds itself."""
    met: Future[tuple[dist.Store, int, int]] = Future()

    def meet() -> None:
        try:
            met.set_result(_create_store(rendezvous_port.release_fd(), timedelta(seconds=seconds)))
        except Exception as error:
            met.set_exception(error)

    threading.Thread(target=meet, name=RENDEZVOUS_THREAD, daemon=True).start()
    return met.result(seconds + 2)  # torch's own reason is the better one


def _create_store(held: int | None, timeout: timedelta) -> tuple[dist.Store, int, int]:
    if held is None:
        return next(rendezvous("env://", timeout=timeout))
    host, at = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(
        host, at, world_size(), is_master=True, timeout=timeout, master_listen_fd=held
    )
    return store, 0, world_size()


def build_mesh(ep: int) -> Mesh:
    """The mesh of the ranks that have joined; every rank must call it."""
    world, rank = dist.get_world_size(), dist.get_rank()
    check_ep(ep, world)
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    # (ep, edp): a stack of experts is cut over ep, and that part over the replicas which update it
    device_mesh = DeviceMesh(
        "cpu", torch.arange(world).view(-1, ep).t(), mesh_dim_names=("ep", "edp")
    )
    assert dist.group.WORLD is not None
    per_node, record = ranks_per_node(), FlightRecorder(rank, world)

    def axis(ranks: range, group: dist.ProcessGroup) -> Axis:
        return Axis(
            len(ranks),
            ranks.index(rank),
            group,
            node_P(ranks),
            flight_recorder=record,
            ranks=tuple(ranks),
        )

    def node_P(ranks: range) -> tuple[int, ...]:
        nodes = tuple(r // per_node for r in ranks)
        return nodes if len(set(nodes)) > 1 else ()

    inside = None
    if 1 < per_node < ep and ep % per_node == 0:
        nodes = [
            dist.new_group(list(range(first, first + per_node)))
            for first in range(0, world, per_node)
        ]
        first = rank - rank % per_node
        inside = axis(range(first, first + per_node), nodes[rank // per_node])  # type: ignore[arg-type]
    return Mesh(
        ep=axis(range(rank - rank % ep, rank - rank % ep + ep), device_mesh.get_group("ep")),
        expert_dp=axis(range(rank % ep, world, ep), device_mesh.get_group("edp")),
        dp=axis(range(world), dist.group.WORLD),
        ranks_per_node=per_node,
        device=device,
        device_mesh=device_mesh,
        checkpoint_group=dist.new_group(backend="gloo", timeout=timedelta(hours=1)),
        intra_node=inside,
        step_timer=StepTimer(device),
        flight_recorder=record,
    )


def shutdown() -> None:
    """Leaves the process group, all ranks together: a rank that ends before its peers can abort them."""
    dist.barrier()
    dist.destroy_process_group()


def exit_process(status: int) -> NoReturn:
    """Ends this process, without the others. At once where ranks have met, or are still about to: threads of libraries
    abort an orderly end now and then, with words of theirs."""
    if dist.is_initialized() or any(
        thread.name == RENDEZVOUS_THREAD for thread in threading.enumerate()
    ):
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
