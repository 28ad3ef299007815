"""Reads what the launcher wrote to the environment: ranks, nodes and the rendezvous."""

import os

import torch

from moe_dist.config.messages import shorten
from moe_dist.config.validate import MAX_COUNT

REQUIRED_VARIABLES = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
)  # what torchrun tells every rank
# numbers that launchers tell: torchrun's names and those of DeepSpeed's launcher -> least, most
SIZE_VARIABLES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_WORLD_SIZE", "CROSS_SIZE")
NUMBER_RANGES = dict.fromkeys(SIZE_VARIABLES, (1, MAX_COUNT)) | {"MASTER_PORT": (1, 2**16 - 1)}
NUMBER_RANGES |= dict.fromkeys(
    ("RANK", "LOCAL_RANK", "GROUP_RANK", "CROSS_RANK"), (0, MAX_COUNT - 1)
)
UPPER_BOUNDS = {
    "RANK": "WORLD_SIZE",
    "LOCAL_RANK": "LOCAL_WORLD_SIZE",
    "GROUP_RANK": "GROUP_WORLD_SIZE",
    "CROSS_RANK": "CROSS_SIZE",
}


JOIN_TIMEOUT_VARIABLE = (
    "MOE_DIST_JOIN_SECONDS"  # of the environment: how long ranks wait for each other at the start
)


def check_launch_environment() -> None:
    """Checks what a launcher, or a user by hand, told of the ranks in the environment.

    Raises:
        ValueError: A variable is no number or out of its range, a part of LAUNCH alone is there, or
            the numbers do not fit together.
    """
    there = {key for key in (*REQUIRED_VARIABLES, *NUMBER_RANGES) if os.environ.get(key)}
    for key, (least, most) in NUMBER_RANGES.items():
        if key in there:
            _check_number(key, least, most)
    missing = [key for key in REQUIRED_VARIABLES if key not in there]
    if 0 < len(missing) < len(REQUIRED_VARIABLES):
        raise ValueError(
            f"the environment has no {', '.join(missing)}: set all of {', '.join(REQUIRED_VARIABLES)}, or none of them"
        )
    for key, of in UPPER_BOUNDS.items():
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
        raise ValueError(
            f"{key}={shorten(ascii(text)[1:-1])} in the environment: a whole number from {least} to {most}"
        )


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
        raise ValueError(
            f"LOCAL_RANK={rank}, but this node has {num_devices} GPUs: start {num_devices} ranks on it"
        )
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
