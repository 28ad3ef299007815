"""Ratios of loads, and sums over ranks, by hand."""

import pytest
import torch

from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.labels import CommLabel, TrafficKey
from moe_dist.training import metric_accumulator as meters


@pytest.mark.parametrize(
    ("load_SE", "expected"),
    [
        (
            [[4, 0, 0, 0], [1, 1, 1, 1]],
            (3**0.5 / 2, (4 + 1) / 2),
        ),  # CV of (4, 0, 0, 0) is sqrt(3), that of even ones 0
        ([[0, 0], [6, 2]], (0.5 / 2, 1.5 / 2)),  # a step without rows is even
        ([[1, 3], [2, 6], [3, 1]], (0.5, 1.5)),
    ],
)
def test_ratios_by_hand(load_SE: list[list[float]], expected: tuple[float, float]) -> None:
    load = torch.tensor(load_SE, dtype=torch.float64)
    told = dict(zip(meters.RATIOS, meters._ratios(load, load).mean(0).tolist(), strict=True))
    assert (told["load_cv"], told["load_max_over_mean"]) == pytest.approx(expected)
    assert told["importance_cv"] == told["load_cv"]


def test_ring_bytes_go_to_the_next_rank() -> None:
    """Of four ranks on two nodes the second sends to the third, on the other node, and the
    last to the first."""
    for rank, inter_node in enumerate((False, True, False, True)):
        axis = meshes.Axis(4, rank, None, (0, 0, 1, 1))  # type: ignore[arg-type]
        axis.record_ring_bytes(CommLabel("experts", "gradients"), 100)
        axis.record_ring_bytes(CommLabel("experts", "gradients"), 20)
        assert dict(axis.bytes_sent) == {TrafficKey("experts", "gradients", inter_node): 120}
