"""The launcher's environment variables: ranks, nodes and the rendezvous."""

import os

import torch

from moe_dist.config.messages import shorten
from moe_dist.config.validate import MAX_COUNT

# set by torchrun for every rank
REQUIRED_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")

# numbers set by torchrun or by DeepSpeed's launcher (LOCAL_SIZE, CROSS_SIZE, CROSS_RANK)
SIZE_VARIABLES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_WORLD_SIZE", "CROSS_SIZE")
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "CROSS_RANK")
# variable -> (smallest value, largest value)
NUMBER_RANGES = {
    **dict.fromkeys(SIZE_VARIABLES, (1, MAX_COUNT)),
    "MASTER_PORT": (1, 2**16 - 1),
    **dict.fromkeys(RANK_VARIABLES, (0, MAX_COUNT - 1)),
}
# variable -> its exclusive upper bound
UPPER_BOUNDS = {
    "RANK": "WORLD_SIZE",
    "LOCAL_RANK": "LOCAL_WORLD_SIZE",
    "GROUP_RANK": "GROUP_WORLD_SIZE",
    "CROSS_RANK": "CROSS_SIZE",
}

JOIN_TIMEOUT_VARIABLE = "MOE_DIST_JOIN_SECONDS"  # the rendezvous timeout


def check_launch_environment() -> None:
    """Checks the variables set by a launcher, or by hand.

    Raises:
        ValueError: A variable is not a number or out of range, only some of REQUIRED_VARIABLES are
            set, or the numbers do not fit together.
    """
    variables = (*REQUIRED_VARIABLES, *NUMBER_RANGES)
    present = {variable for variable in variables if os.environ.get(variable)}
    for variable, (least, most) in NUMBER_RANGES.items():
        if variable in present:
            check_number_variable(variable, least, most)
    missing = [variable for variable in REQUIRED_VARIABLES if variable not in present]
    if 0 < len(missing) < len(REQUIRED_VARIABLES):
        raise ValueError(
            f"the environment has no {', '.join(missing)}: set all of "
            f"{', '.join(REQUIRED_VARIABLES)}, or none of them"
        )
    for variable, bound in UPPER_BOUNDS.items():
        if {variable, bound} <= present:
            check_number_variable(variable, 0, int(os.environ[bound]) - 1)
    if "LOCAL_WORLD_SIZE" in present and num_nodes() * ranks_per_node() != world_size():
        raise ValueError(
            f"{world_size()} ranks on {num_nodes()} nodes, {ranks_per_node()} of them here: start "
            "as many on each node, and set their numbers (WORLD_SIZE, GROUP_WORLD_SIZE or "
            "CROSS_SIZE, LOCAL_WORLD_SIZE)"
        )


def check_number_variable(variable: str, least: int, most: int) -> None:
    """Checks an environment variable: a plain decimal number in a range.

    Args:
        variable: Its name; it must be set.
        least: The smallest valid value.
        most: The largest valid value.

    Raises:
        ValueError: The value is not such a number.
    """
    text = os.environ[variable]
    is_plain = text.isascii() and text.isdecimal() and len(text) < 20 and text == str(int(text))
    if not (is_plain and least <= int(text) <= most):
        raise ValueError(
            f"{variable}={shorten(ascii(text)[1:-1])} in the environment: a whole number from "
            f"{least} to {most}"
        )


def memory_per_rank(num_ranks: int | None = None) -> int:
    """Measures a rank's memory.

    Args:
        num_ranks: Number of ranks on a node; None: the number started here.

    Returns:
        Bytes of the rank's GPU memory; without CUDA, of its share of the machine's memory.
    """
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(local_rank()).total_memory
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine_bytes // (num_ranks or ranks_per_node())


def local_rank() -> int:
    """Reads this rank's index on its node.

    Returns:
        The index; the rank's GPU has the same index.

    Raises:
        ValueError: The node has fewer GPUs.
    """
    rank = int(os.environ.get("LOCAL_RANK") or "0")
    num_devices = torch.cuda.device_count()
    if rank >= num_devices:
        raise ValueError(
            f"LOCAL_RANK={rank}, but this node has {num_devices} GPUs: start {num_devices} ranks "
            "on it"
        )
    return rank


def world_size() -> int:
    """Returns the launcher's world size; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def num_nodes() -> int:
    """Returns the launcher's number of nodes; 1 without a launcher."""
    return int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("CROSS_SIZE") or "1")


def ranks_per_node() -> int:
    """Returns the number of ranks on this node; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
