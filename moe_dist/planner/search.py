"""Searches over layouts: memory and seconds for every expert-parallel degree and ZeRO stage."""

import dataclasses
from collections.abc import Iterator

from moe_dist.config.overrides import override
from moe_dist.config.schema import Config, moe_section
from moe_dist.distributed.batch_layout import BatchLayout, make_batch_layout
from moe_dist.engine.ds_config import read_ds_config
from moe_dist.planner.cost_model import (
    Machine,
    RankCost,
    rank_cost_on_gpu,
    rank_memory,
    step_seconds,
)
from moe_dist.tasks.registry import task_of
from moe_dist.training.model_stats import layout_dispatcher

NUM_ZERO_STAGES = 4
# a layout's expert-parallel degree and ZeRO stage
LayoutKey = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class PlannedLayout:
    """A layout with its estimated cost. The option --json writes these fields.

    Attributes:
        ep: Expert-parallel degree.
        zero_stage: ZeRO stage.
        memory: Bytes per rank by kind.
        seconds: Seconds per step by part.
        intra_node_bytes: Bytes sent by a rank inside its node in a step, by purpose.
        inter_node_bytes: Bytes sent by a rank to other nodes in a step, by purpose.
        fits: True if a rank's memory is large enough.
    """

    ep: int
    zero_stage: int
    memory: dict[str, int]
    seconds: dict[str, float]
    intra_node_bytes: dict[str, float]
    inter_node_bytes: dict[str, float]
    fits: bool

    @property
    def step_s(self) -> float:
        """Seconds per step."""
        return sum(self.seconds.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes per rank."""
        return sum(self.memory.values())

    @property
    def sent_bytes(self) -> float:
        """Bytes sent by a rank in a step."""
        return sum(self.intra_node_bytes.values()) + sum(self.inter_node_bytes.values())


def legal_layouts(
    config: Config, nodes: int, ranks_per_node: int
) -> Iterator[tuple[Config, BatchLayout]]:
    """Yields every layout allowed by the config and its DeepSpeed file on the ranks.

    Args:
        config: The config.
        nodes: Node count.
        ranks_per_node: Ranks on each node.

    Yields:
        The config with `mesh.ep` and `zero_stage` set, and its batch layout; by degree, then by
        stage.

    Raises:
        ValueError: No layout is legal. The message is the first layout's error.
    """
    world = nodes * ranks_per_node
    first_error: ValueError | None = None
    found = False
    for ep in _ep_candidates(config, world):
        try:
            with_ep = override(config, [f"mesh.ep={ep}"])
            layout = make_batch_layout(with_ep, world)
            layout_dispatcher(with_ep, ranks_per_node)
        except ValueError as error:
            first_error = first_error or error
            continue
        for stage in range(NUM_ZERO_STAGES):
            with_stage = override(with_ep, [f"zero_stage={stage}"])
            try:
                read_ds_config(with_stage)
            except ValueError as error:
                first_error = first_error or error
                continue
            found = True
            yield with_stage, layout
    if not found:
        assert first_error
        raise first_error


def _ep_candidates(config: Config, world: int) -> list[int]:
    """Returns the rank count's divisors; only 1 for a model without experts."""
    if not moe_section(config):
        return [1]
    return [ep for ep in range(1, world + 1) if world % ep == 0]


def plan_layouts(
    config: Config,
    nodes: int,
    ranks_per_node: int,
    machine: Machine,
    rank_costs: dict[LayoutKey, RankCost] | None = None,
) -> list[PlannedLayout]:
    """Estimates every legal layout's cost.

    Args:
        config: The config.
        nodes: Node count.
        ranks_per_node: Ranks on each node.
        machine: A rank's links and memory.
        rank_costs: One rank's measured work by degree and stage. None: estimated for the GPU named
            `machine.name`.

    Returns:
        The layouts: those that fit come first, and among them the fastest.

    Raises:
        ValueError: No layout is legal.
    """
    plain = task_of(config).build_model(config)
    planned = []
    for at_layout, layout in legal_layouts(config, nodes, ranks_per_node):
        ds = read_ds_config(at_layout)
        ep = at_layout.mesh.ep
        zero_stage = ds["zero_optimization"]["stage"]
        if rank_costs:
            rank_cost = rank_costs[ep, zero_stage]
        else:
            rank_cost = rank_cost_on_gpu(machine.name, plain, at_layout, layout, ds)
        seconds, traffic = step_seconds(
            plain, at_layout, layout, ranks_per_node, ds, rank_cost, machine
        )
        memory = rank_memory(plain, at_layout, layout, ds, rank_cost)
        intra_node_bytes = {}
        inter_node_bytes = {}
        for messages in traffic:
            if messages.intra_node_bytes:
                intra_node_bytes[messages.name] = messages.intra_node_bytes
            if messages.inter_node_bytes:
                inter_node_bytes[messages.name] = messages.inter_node_bytes
        fits = sum(memory.values()) <= machine.memory
        planned.append(
            PlannedLayout(ep, zero_stage, memory, seconds, intra_node_bytes, inter_node_bytes, fits)
        )
    return sorted(planned, key=lambda layout: (not layout.fits, layout.step_s))
