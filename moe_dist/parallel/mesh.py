"""The mesh of ranks, and how a config is laid out on it.

Axes: `ep`, the ranks that together hold one whole set of experts (consecutive ranks, so that an exchange stays inside
a node where it can); `edp`, the ranks that hold the same experts as I do; `dp`, all ranks, each with data of its own.

    rank = edp_index * ep + ep_index          world = edp * ep
"""

import math
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

from moe_dist.clock import Clock
from moe_dist.config import MOST, Config, MoEConfig, mixture, shown
from moe_dist.parallel import ports
from moe_dist.parallel.record import Record


@dataclass(frozen=True)
class Axis:
    """One group of ranks. `sent` counts bytes sent to other ranks by (site, direction)."""

    size: int
    index: int  # of this rank
    group: dist.ProcessGroup
    node_P: tuple[int, ...] = ()  # of each of its ranks; empty where all are in one
    sent: Counter = field(default_factory=Counter)
    record: Record = field(default_factory=Record)
    ranks: tuple[int, ...] = ()  # of the world, in the order of the axis

    def count(self, label: tuple[int | str, str], bytes_P: list[int]) -> None:
        """What this rank sends to each, over the links between nodes apart from the others."""
        self.sent[label] += 0
        for peer, num_bytes in enumerate(bytes_P):
            if peer != self.index:
                self._send(label, peer, num_bytes)

    def count_ring(self, label: tuple[int | str, str], num_bytes: int) -> None:
        """What each rank sends to the next one, and the last to the first, where a sum goes round them."""
        self._send(label, (self.index + 1) % self.size, num_bytes)

    def _send(self, label: tuple[int | str, str], peer: int, num_bytes: int) -> None:
        far = self.node_P and self.node_P[peer] != self.node_P[self.index]
        self.sent[label[0], f"{label[1]}_between_nodes" if far else label[1]] += num_bytes

    def parts(self, number: int) -> list[slice]:
        """`number` things in consecutive parts, one for each rank, as `torch.chunk` cuts them: equal but for the last
        ones, which may be smaller or empty."""
        most = -(-number // self.size)
        return [slice(min(i * most, number), min((i + 1) * most, number)) for i in range(self.size)]


@dataclass(frozen=True)
class Mesh:
    """Built once by `start` and passed explicitly. Owns which experts are mine."""

    ep: Axis
    edp: Axis
    dp: Axis
    ranks_per_node: int
    device: torch.device
    device_mesh: DeviceMesh  # (ep, edp), on CPU: for sharded tensors in checkpoints
    files: dist.ProcessGroup  # all ranks on gloo, for checkpoints: one may be written while a step runs
    inside: Axis | None = None  # the ranks of `ep` in this rank's node, where `ep` spans several nodes evenly
    clock: Clock = field(default_factory=lambda: Clock(torch.device("cpu")))
    record: Record = field(default_factory=Record)  # of all its axes

    @property
    def sent(self) -> Counter:
        """Bytes that this rank has sent to others, by (site, direction)."""
        total: Counter = Counter()
        for axis in (self.ep, self.edp, self.dp, *([self.inside] if self.inside else [])):
            total.update(axis.sent)  # "+" would drop who has sent nothing yet
        return total

    @property
    def is_main(self) -> bool:
        return self.dp.index == 0

    def my_experts(self, num_experts: int) -> range:
        """Global ids of the experts (or groups of experts) on this rank: consecutive blocks along `ep`."""
        per_rank = num_experts // self.ep.size
        return range(self.ep.index * per_rank, (self.ep.index + 1) * per_rank)

    def owns(self, i: int) -> bool:
        """Whether the i-th of many pieces of work is this rank's: they go round."""
        return i % self.dp.size == self.dp.index


LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")  # what torchrun tells every rank
# numbers that launchers tell: torchrun's names and those of DeepSpeed's launcher -> least, most
SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_WORLD_SIZE", "CROSS_SIZE")
NUMBERS = dict.fromkeys(SIZES, (1, MOST)) | {"MASTER_PORT": (1, 2**16 - 1)}
NUMBERS |= dict.fromkeys(("RANK", "LOCAL_RANK", "GROUP_RANK", "CROSS_RANK"), (0, MOST - 1))
BELOW = {
    "RANK": "WORLD_SIZE",
    "LOCAL_RANK": "LOCAL_WORLD_SIZE",
    "GROUP_RANK": "GROUP_WORLD_SIZE",
    "CROSS_RANK": "CROSS_SIZE",
}
MEETING = "meeting"  # name of the thread in which a rank waits for the others
JOIN_SECONDS = "MOE_DIST_JOIN_SECONDS"  # of the environment: how long ranks wait for each other at the start


def check_launch() -> None:
    """Checks what a launcher, or a user by hand, told of the ranks in the environment.

    Raises:
        ValueError: A variable is no number or out of its range, a part of LAUNCH alone is there, or
            the numbers do not fit together.
    """
    there = {key for key in (*LAUNCH, *NUMBERS) if os.environ.get(key)}
    for key, (least, most) in NUMBERS.items():
        if key in there:
            _check_number(key, least, most)
    missing = [key for key in LAUNCH if key not in there]
    if 0 < len(missing) < len(LAUNCH):
        raise ValueError(
            f"the environment has no {', '.join(missing)}: set all of {', '.join(LAUNCH)}, or none of them"
        )
    for key, of in BELOW.items():
        if {key, of} <= there:
            _check_number(key, 0, int(os.environ[of]) - 1)
    if "LOCAL_WORLD_SIZE" in there and num_nodes() * ranks_per_node() != world_size():
        raise ValueError(
            f"{world_size()} ranks on {num_nodes()} nodes, {ranks_per_node()} of them here: start as many on each "
            f"node, and give their numbers (WORLD_SIZE, GROUP_WORLD_SIZE or CROSS_SIZE, LOCAL_WORLD_SIZE)"
        )


def _check_number(key: str, least: int, most: int) -> None:
    text = os.environ[key]
    plain = text.isascii() and text.isdecimal() and len(text) < 20 and text == str(int(text))
    if not (plain and least <= int(text) <= most):
        raise ValueError(f"{key}={shown(ascii(text)[1:-1])} in the environment: a whole number from {least} to {most}")


def memory_per_rank(ranks: int | None = None) -> int:
    """Bytes: of a rank's GPU, or its share of the machine's memory. `ranks`: of a node; None: those that are here."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(local_rank()).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole // (ranks or ranks_per_node())


def local_rank() -> int:
    """Of this node, which is the number of its GPU. Raises ValueError where CUDA has fewer."""
    rank, num_devices = int(os.environ.get("LOCAL_RANK") or "0"), torch.cuda.device_count()
    if rank >= num_devices:
        raise ValueError(f"LOCAL_RANK={rank}, but this node has {num_devices} GPUs: start {num_devices} ranks on it")
    return rank


def world_size() -> int:
    """Ranks that the launcher started; one without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def num_nodes() -> int:
    """Nodes that torchrun, or DeepSpeed's launcher, started ranks on; one without them."""
    return int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("CROSS_SIZE") or "1")


def ranks_per_node() -> int:
    """As the launcher told; one without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def start(ep: int, patience: float = 60.0) -> Mesh:
    """Joins the other ranks and arranges them. Raises ValueError where `ep` does not divide their number."""
    check_ep(ep, world_size())
    join(timedelta(seconds=max(600, 2 * patience)))  # torch's own word comes after ours (`record`)
    return arrange(ep)


def join(timeout: timedelta = timedelta(minutes=10)) -> None:
    """Enters the process group that the launcher's environment describes: NCCL where there is CUDA, gloo elsewhere.

    `timeout` is for steps; for all ranks to meet there are MOE_DIST_JOIN_SECONDS of the environment, or 5 minutes.

    Raises ValueError where rank 0's port is taken, or not all ranks meet there in time.
    """
    if "MASTER_ADDR" not in os.environ:  # one process without a launcher is a world of one
        alone = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports.free()), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ |= alone
        ports.hold()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    os.environ.setdefault(JOIN_SECONDS, "300")
    _check_number(JOIN_SECONDS, 1, 10**6)
    try:
        store, rank, world = _meet(int(os.environ[JOIN_SECONDS]))
        store.set_timeout(timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
    except (dist.DistError, TimeoutError) as error:
        where = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
        reason = (str(error) or f"no answer in {os.environ[JOIN_SECONDS]} s").splitlines()[0]
        raise ValueError(
            f"{where}: {world_size()} ranks cannot meet there; start them all, with a free port of rank 0 ({reason})"
        ) from None


def _meet(seconds: int) -> tuple[dist.Store, int, int]:
    """The store that the ranks share, this rank and their number. In a thread, for where a stranger holds the port,
    torch waits for its answer without end. Raises TimeoutError then, and DistError for what torch finds itself."""
    met: Future[tuple[dist.Store, int, int]] = Future()

    def meet() -> None:
        try:
            met.set_result(_meet_at(ports.give(), timedelta(seconds=seconds)))
        except Exception as error:
            met.set_exception(error)

    threading.Thread(target=meet, name=MEETING, daemon=True).start()
    return met.result(seconds + 2)  # torch's own reason is the better one


def _meet_at(held: int | None, timeout: timedelta) -> tuple[dist.Store, int, int]:
    if held is None:
        return next(rendezvous("env://", timeout=timeout))
    host, at = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, at, world_size(), is_master=True, timeout=timeout, master_listen_fd=held)
    return store, 0, world_size()


def arrange(ep: int) -> Mesh:
    """The mesh of the ranks that have joined; every rank must call it."""
    world, rank = dist.get_world_size(), dist.get_rank()
    check_ep(ep, world)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    # (ep, edp): a stack of experts is cut over ep, and that part over the replicas which update it
    device_mesh = DeviceMesh("cpu", torch.arange(world).view(-1, ep).t(), mesh_dim_names=("ep", "edp"))
    assert dist.group.WORLD is not None
    per_node, record = ranks_per_node(), Record(rank, world)

    def axis(ranks: range, group: dist.ProcessGroup) -> Axis:
        return Axis(len(ranks), ranks.index(rank), group, node_P(ranks), record=record, ranks=tuple(ranks))

    def node_P(ranks: range) -> tuple[int, ...]:
        nodes = tuple(r // per_node for r in ranks)
        return nodes if len(set(nodes)) > 1 else ()

    inside = None
    if 1 < per_node < ep and ep % per_node == 0:
        nodes = [dist.new_group(list(range(first, first + per_node))) for first in range(0, world, per_node)]
        first = rank - rank % per_node
        inside = axis(range(first, first + per_node), nodes[rank // per_node])  # type: ignore[arg-type]
    return Mesh(
        ep=axis(range(rank - rank % ep, rank - rank % ep + ep), device_mesh.get_group("ep")),
        edp=axis(range(rank % ep, world, ep), device_mesh.get_group("edp")),
        dp=axis(range(world), dist.group.WORLD),
        ranks_per_node=per_node,
        device=device,
        device_mesh=device_mesh,
        files=dist.new_group(backend="gloo", timeout=timedelta(hours=1)),
        inside=inside,
        clock=Clock(device),
        record=record,
    )


def stop() -> None:
    """Leaves the process group, all ranks together: a rank that ends before its peers can abort them."""
    dist.barrier()
    dist.destroy_process_group()


def end(status: int) -> NoReturn:
    """Ends this process, without the others. At once where ranks have met, or are still about to: threads of libraries
    abort an orderly end now and then, with words of theirs."""
    if dist.is_initialized() or any(thread.name == MEETING for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def check_ep(ep: int, world: int) -> None:
    if ep < 1 or world % ep:
        divisors = [d for d in range(1, world + 1) if world % d == 0]
        raise ValueError(f"mesh.ep={ep} does not divide {world} ranks; possible: {', '.join(map(str, divisors))}")


@dataclass(frozen=True)
class Layout:
    """Which samples of the global batch lie where: micro-batch m holds `samples_per_micro_batch` consecutive samples,
    and each rank a consecutive share of those. So one rank's order of samples is the global order."""

    world: int
    samples: int
    accumulation: int
    samples_per_balance_group: int
    samples_per_token_group: int

    @property
    def samples_per_micro_batch(self) -> int:
        """Over all ranks."""
        return self.samples // self.accumulation

    @property
    def samples_per_rank(self) -> int:
        """Of one micro-batch."""
        return self.samples_per_micro_batch // self.world

    @property
    def num_balance_groups(self) -> int:
        """Of the whole batch."""
        return self.samples // self.samples_per_balance_group

    def first_sample(self, micro: int) -> int:
        """Global index of the first sample of micro-batch `micro`."""
        return micro * self.samples_per_micro_batch

    def my_samples(self, micro: int, rank: int) -> range:
        """Global indices of the samples of `rank` in micro-batch `micro`."""
        first = self.first_sample(micro) + rank * self.samples_per_rank
        return range(first, first + self.samples_per_rank)


def lay_out(config: Config, world: int) -> Layout:
    """The layout of `config` on `world` ranks. Where there is none, ValueError names the nearest legal number."""
    batch, ep = config.batch, config.mesh.ep
    check_ep(ep, world)
    experts = mixture(config)
    if experts:
        section, moe = experts
        groups = moe.num_groups if isinstance(moe, MoEConfig) else None
        key, spread = ("num_experts", moe.num_experts) if groups is None else ("num_groups", groups)
        if spread < 1 or spread % ep:
            raise ValueError(
                f"{section}.{key}={spread} is not a multiple of mesh.ep={ep}; "
                f"nearest: {_nearest_multiple(spread, ep)}, or mesh.ep={math.gcd(spread, world)}"
            )
    if batch.accumulation < 1:
        raise ValueError(f"batch.accumulation={batch.accumulation}: at least 1")
    if batch.accumulation > 1 and config.optim.free_gradients:
        raise ValueError(
            f"batch.accumulation={batch.accumulation}, but with optim.free_gradients no gradient waits for a second "
            f"micro-batch; it must be 1"
        )
    parts = batch.accumulation * world
    if batch.samples < 1 or batch.samples % parts:
        raise ValueError(
            f"batch.samples={batch.samples} is not a multiple of accumulation x ranks = "
            f"{batch.accumulation} x {world}; "
            f"nearest: {_nearest_multiple(batch.samples, parts)}"
        )
    micro = batch.samples // batch.accumulation
    balance = batch.samples if batch.samples_per_balance_group is None else batch.samples_per_balance_group
    if balance < 1 or micro % balance:
        raise ValueError(
            f"batch.samples_per_balance_group={balance} does not divide a micro-batch of {micro} samples "
            f"({batch.samples} samples / {batch.accumulation} accumulation); "
            f"nearest: {_nearest_divisor(micro, balance)}"
        )
    mine, token_group = batch.samples // parts, batch.samples_per_token_group
    if experts and experts[1].capacity_factor is not None and (token_group < 1 or mine % token_group):
        raise ValueError(
            f"batch.samples_per_token_group={token_group} does not divide a rank's micro-batch of {mine} samples; "
            f"nearest: {_nearest_divisor(mine, token_group)}"
        )
    return Layout(world, batch.samples, batch.accumulation, balance, token_group)


def _nearest_multiple(number: int, of: int) -> int:
    return max(of, round(number / of) * of)


def _nearest_divisor(number: int, to: int) -> int:
    to = min(max(to, 1), number)
    return next(d for gap in range(to) for d in (to - gap, to + gap) if number % d == 0)  # 1 is one
