"""Tiles of the Triton kernels, and when experts use the kernels."""

import importlib.util
from typing import Any

import pytest
import torch

from moe_dist.moe.experts import Experts, GeluExperts
from moe_dist.moe.kernels import triton_ffn
from moe_dist.moe.kernels.triton_ffn import Tiles, feedforward, tile

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
SMALL = Tiles(tile(16, 32, 32, 2, 4), tile(16, 16, 16, 2, 4), tile(32, 16, 16, 2, 4))
# tokens, and how many assignments each expert has: more and less than a tile's rows, exactly so
# many, none
CASES = {
    "ragged": (37, [19, 0, 16, 1, 33, 0]),
    "one expert": (20, [20]),
    "all to one of many": (18, [0, 0, 18, 0]),
    "empty at both ends": (5, [0, 3, 0]),
}


def test_every_assignment_is_in_one_tile() -> None:
    for _, count_e in CASES.values():
        work = triton_ffn._Work.listed(torch.zeros(sum(count_e)), torch.tensor(count_e), SMALL)
        tiles = [(i, n, min(n + 16, end)) for i, n, end in work.tile_M3.tolist() if n < end]
        last_e = torch.tensor(count_e).cumsum(0).tolist()
        in_order = [
            (i, n, min(n + 16, last))
            for i, (count, last) in enumerate(zip(count_e, last_e, strict=True))
            for n in range(last - count, last, 16)
        ]
        assert tiles == in_order


def test_triton_is_off_by_default_and_checks_support(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def path(experts: Experts, num_rows: int = 10, on: Any = None) -> Any:
        return experts._select_kernel(num_rows, torch.zeros(1, 16), on, *experts.parameters())

    experts, with_biases = Experts(2, 16, 32), GeluExperts(2, 16, 32)
    assert not experts.use_triton
    experts.use_triton = with_biases.use_triton = True
    assert path(experts) is None, "there is no GPU"
    monkeypatch.setattr(triton_ffn, "supported", lambda num_rows, *_: num_rows > 0)
    assert path(experts) is feedforward
    assert path(experts, num_rows=0) is path(experts, on=torch.sign) is path(with_biases) is None
    experts.use_triton = False
    assert path(experts) is None
