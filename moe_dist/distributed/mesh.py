"""The mesh: its axes of ranks, and how a process joins it.

Axes:
    ep           the ranks that share one whole set of experts; consecutive ranks, to keep their
                 all-to-all inside a node if possible
    expert_dp    the ranks with the same experts as this rank
    dp           all ranks, each with its own data

    rank = expert_dp_index * ep + ep_index          world = expert_dp * ep
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
    check_number_variable,
    local_rank,
    ranks_per_node,
    world_size,
)
from moe_dist.monitoring.step_timer import StepTimer


@dataclass(frozen=True)
class Axis:
    """A group of ranks along one mesh axis.

    Attributes:
        size: Ranks on the axis.
        index: This rank's index along the axis.
        group: The process group.
        node_P: Each rank's node; empty if all ranks are on one node.
        bytes_sent: Bytes sent by this rank to others.
        flight_recorder: Log for the collectives.
        ranks: Global ranks along the axis.
    """

    size: int
    index: int
    group: dist.ProcessGroup
    node_P: tuple[int, ...] = ()
    bytes_sent: Counter[TrafficKey] = field(default_factory=Counter)
    flight_recorder: FlightRecorder = field(default_factory=FlightRecorder)
    ranks: tuple[int, ...] = ()

    def record_bytes(self, label: CommLabel, bytes_P: list[int]) -> None:
        """Counts an all-to-all's bytes.

        Args:
            label: Label for the flight recorder and the byte counts.
            bytes_P: Bytes for each rank; bytes for this rank itself are not counted.
        """
        self.bytes_sent[TrafficKey(label.place, label.direction, inter_node=False)] += 0
        for peer, num_bytes in enumerate(bytes_P):
            if peer != self.index:
                self._count(label, peer, num_bytes)

    def record_ring_bytes(self, label: CommLabel, num_bytes: int) -> None:
        """Counts a ring collective's bytes: each rank sends to the next one.

        Args:
            label: Label for the flight recorder and the byte counts.
            num_bytes: Bytes sent by this rank.
        """
        self._count(label, (self.index + 1) % self.size, num_bytes)

    def _count(self, label: CommLabel, peer: int, num_bytes: int) -> None:
        inter_node = bool(self.node_P) and self.node_P[peer] != self.node_P[self.index]
        self.bytes_sent[TrafficKey(label.place, label.direction, inter_node)] += num_bytes

    def split_ranges(self, number: int) -> list[slice]:
        """Splits `number` items into consecutive parts, one for each rank, as `torch.chunk` does.

        Args:
            number: Item count.

        Returns:
            One slice per rank, equal in size but for the last ones, which may be smaller or empty.
        """
        largest = -(-number // self.size)
        ranges = []
        for i in range(self.size):
            ranges.append(slice(min(i * largest, number), min((i + 1) * largest, number)))
        return ranges


@dataclass(frozen=True)
class Mesh:
    """This rank's axes, and its process's singletons.

    Attributes:
        ep: The ranks that share one set of experts with this rank.
        expert_dp: The ranks with the same experts as this rank.
        dp: All ranks.
        ranks_per_node: Ranks per node.
        device: This rank's device.
        device_mesh: (ep, expert_dp) on CPU, for sharded tensors in checkpoints.
        checkpoint_group: All ranks on gloo, because a checkpoint may be written while a step runs.
        intra_node: The `ep` ranks on this node, if `ep` spans several nodes evenly.
        step_timer: Timer for the parts of a step.
        flight_recorder: Log for the collectives on all axes.
    """

    ep: Axis
    expert_dp: Axis
    dp: Axis
    ranks_per_node: int
    device: torch.device
    device_mesh: DeviceMesh
    checkpoint_group: dist.ProcessGroup
    intra_node: Axis | None = None
    step_timer: StepTimer = field(default_factory=lambda: StepTimer(torch.device("cpu")))
    flight_recorder: FlightRecorder = field(default_factory=FlightRecorder)

    @property
    def bytes_sent(self) -> Counter[TrafficKey]:
        """Bytes sent by this rank to others so far, over all axes."""
        total: Counter[TrafficKey] = Counter()
        for axis in (self.ep, self.expert_dp, self.dp, self.intra_node):
            if axis:
                total.update(axis.bytes_sent)  # "+" would drop keys with a count of 0
        return total

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.dp.index == 0

    def local_experts(self, num_experts: int) -> range:
        """Returns the global ids of this rank's experts (or groups): a consecutive block."""
        per_rank = num_experts // self.ep.size
        return range(self.ep.index * per_rank, (self.ep.index + 1) * per_rank)

    def owns_item(self, i: int) -> bool:
        """Returns True if this rank does work item `i`; items are assigned to ranks in turn."""
        return i % self.dp.size == self.dp.index


RENDEZVOUS_THREAD = "rendezvous"  # name of the thread in which a rank waits for the others


def init_distributed(ep: int, timeout_s: float = 60.0) -> Mesh:
    """Joins the other ranks and builds the mesh.

    Args:
        ep: Number of ranks per set of experts.
        timeout_s: The flight recorder's timeout; torch has a longer one, so its own
            error comes after the more precise one of the flight recorder.

    Returns:
        The mesh.

    Raises:
        ValueError: `ep` does not divide the number of ranks, or the ranks cannot meet.
    """
    check_ep(ep, world_size())
    init_process_group(timedelta(seconds=max(600, 2 * timeout_s)))
    return build_mesh(ep)


def init_process_group(timeout: timedelta = timedelta(minutes=10)) -> None:
    """Joins the process group given by the launcher's environment: NCCL with CUDA, else gloo.

    Without a launcher the process is a world with one rank.

    Args:
        timeout: Timeout for collectives. The timeout for all ranks to meet is the environment
            variable MOE_DIST_JOIN_SECONDS (300 s by default).

    Raises:
        ValueError: Rank 0's port is taken, or not all ranks meet there in time.
    """
    if "MASTER_ADDR" not in os.environ:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(rendezvous_port.find_free_port()),
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
        }
        rendezvous_port.reserve()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    os.environ.setdefault(JOIN_TIMEOUT_VARIABLE, "300")
    check_number_variable(JOIN_TIMEOUT_VARIABLE, 1, 10**6)
    join_timeout_s = int(os.environ[JOIN_TIMEOUT_VARIABLE])
    try:
        store, rank, world = _rendezvous(join_timeout_s)
        store.set_timeout(timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
    except (dist.DistError, TimeoutError) as error:
        address = os.environ["MASTER_ADDR"]
        port = os.environ["MASTER_PORT"]
        reason = (str(error) or f"no answer in {join_timeout_s} s").splitlines()[0]
        raise ValueError(
            f"MASTER_ADDR={address} MASTER_PORT={port}: {world_size()} ranks cannot meet there; "
            f"start them all, with a free port of rank 0 ({reason})"
        ) from None


def _rendezvous(seconds: int) -> tuple[dist.Store, int, int]:
    """Meets the other ranks. Returns the shared store, this rank and the world size.

    FENCE: a thread, since torch 2.13 waits without end if another program holds the port and does
    not answer (test_rendezvous_port.py). TimeoutError comes two seconds after torch's own timeout,
    whose DistError has the better reason.
    """
    result: Future[tuple[dist.Store, int, int]] = Future()

    def meet() -> None:
        try:
            descriptor = rendezvous_port.release_fd()
            result.set_result(_create_store(descriptor, timedelta(seconds=seconds)))
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=meet, name=RENDEZVOUS_THREAD, daemon=True).start()
    return result.result(seconds + 2)


def _create_store(descriptor: int | None, timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Creates the store, on rank 0 with the socket reserved by `rendezvous_port`."""
    if descriptor is None:
        return next(rendezvous("env://", timeout=timeout))
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size(),
        is_master=True,
        timeout=timeout,
        master_listen_fd=descriptor,
    )
    return store, 0, world_size()


def build_mesh(ep: int) -> Mesh:
    """Builds the mesh. A collective.

    Args:
        ep: Number of ranks per set of experts.

    Returns:
        This rank's mesh.

    Raises:
        ValueError: `ep` does not divide the number of ranks.
    """
    world = dist.get_world_size()
    rank = dist.get_rank()
    check_ep(ep, world)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    # a stacked expert parameter's first dimension is split over ep, and each part is split over the
    # replicas that update it
    device_mesh = DeviceMesh(
        "cpu", torch.arange(world).view(-1, ep).t(), mesh_dim_names=("ep", "edp")
    )
    assert dist.group.WORLD is not None
    per_node = ranks_per_node()
    recorder = FlightRecorder(rank, world)

    def axis(ranks: range, group: dist.ProcessGroup) -> Axis:
        node_P = tuple(peer // per_node for peer in ranks)
        if len(set(node_P)) == 1:
            node_P = ()
        index = ranks.index(rank)
        return Axis(len(ranks), index, group, node_P, flight_recorder=recorder, ranks=tuple(ranks))

    intra_node = None
    if 1 < per_node < ep and ep % per_node == 0:
        groups = []
        for first in range(0, world, per_node):
            groups.append(dist.new_group(list(range(first, first + per_node))))
        first = rank - rank % per_node
        intra_node = axis(range(first, first + per_node), groups[rank // per_node])  # type: ignore[arg-type]
    first = rank - rank % ep
    return Mesh(
        ep=axis(range(first, first + ep), device_mesh.get_group("ep")),
        expert_dp=axis(range(rank % ep, world, ep), device_mesh.get_group("edp")),
        dp=axis(range(world), dist.group.WORLD),
        ranks_per_node=per_node,
        device=device,
        device_mesh=device_mesh,
        checkpoint_group=dist.new_group(backend="gloo", timeout=timedelta(hours=1)),
        intra_node=intra_node,
        step_timer=StepTimer(device),
        flight_recorder=recorder,
    )


def shutdown() -> None:
    """Leaves the process group together: a rank that ends before its peers can abort them."""
    dist.barrier()
    dist.destroy_process_group()


def exit_process(status: int) -> NoReturn:
    """Ends this process without waiting for the others.

    If the ranks have met or are about to, it skips Python's shutdown, in which library threads
    sometimes abort with extra messages.

    Args:
        status: Exit status.
    """
    is_meeting = any(thread.name == RENDEZVOUS_THREAD for thread in threading.enumerate())
    if dist.is_initialized() or is_meeting:
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
