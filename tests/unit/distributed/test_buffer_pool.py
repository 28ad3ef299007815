"""Large CPU tensors reuse the memory of released ones."""

import random

import pytest
import torch

from moe_dist.distributed import buffer_pool
from moe_dist.moe.permutation import TokenPermutation

LIKE = torch.zeros(1)
MEGA = 2**20  # elements of 4 bytes


@pytest.fixture(autouse=True)
def nothing_yet() -> None:
    buffer_pool._free.clear()
    buffer_pool._total = buffer_pool._max_used = 0


def test_buffer_is_reused_after_its_last_view() -> None:
    first = buffer_pool.pooled_empty(3, MEGA, like=LIKE)
    where, view = first.data_ptr(), first[1:]
    del first
    other = buffer_pool.pooled_empty(3, MEGA, like=LIKE)
    assert other.data_ptr() != where, "a view is alive"
    del view
    # of 2.5 where 3 are free: within 1.5 times its size; and of another dtype
    again = buffer_pool.pooled_empty(5, MEGA, like=LIKE.to(torch.bfloat16))
    assert again.data_ptr() == where and again.dtype == torch.bfloat16 and again.shape == (5, MEGA)


def test_outgrown_buffer_is_released() -> None:
    for size in range(8, 20):
        tensor = buffer_pool.pooled_empty(size, MEGA, like=LIKE)
        del tensor
    # 8 MB, outgrown by 9, and so on; each comes in place of the one before
    assert [len(block) for block in buffer_pool._free] == [19 * 4 * MEGA]


def test_changing_sizes_do_not_accumulate() -> None:
    """Four live tensors of 1 to 16 MB: with changing sizes the pool holds at most 1.5 times
    their largest total."""
    chance = random.Random(0)
    alive: list[torch.Tensor] = []
    most = 0
    for _ in range(400):
        alive = [*alive[-3:], buffer_pool.pooled_empty(int(2 ** chance.uniform(18, 22)), like=LIKE)]
        most = max(most, sum(t.nbytes for t in alive))
    del alive
    assert buffer_pool._total == sum(map(len, buffer_pool._free))
    assert (
        most <= buffer_pool._total <= 1.5 * 1.5 * most
    )  # blocks may be 1.5 times as large as what they are lent for


def test_autograd_may_accumulate_into_buffers() -> None:
    """Autograd does not if other tensors own the memory; a view's memory belongs to its base."""
    assert not buffer_pool.pooled_empty(MEGA, like=LIKE)._is_view()


def test_small_tensors_are_not_pooled() -> None:
    tensor = buffer_pool.pooled_empty(2**10, like=LIKE)
    del tensor
    assert not buffer_pool._free


def test_gradients_reuse_the_buffers_of_the_last_step() -> None:
    x_TD = torch.ones(2**10, 2**9, requires_grad=True)
    copies = TokenPermutation(torch.arange(2**10).repeat(2), 2**10)
    for _ in range(3):
        x_TD.grad = None
        copies.unpermute(copies.permute(x_TD) * 2).sum().backward()
        assert x_TD.grad is not None and (x_TD.grad == 4).all()  # two copies, twice
    assert len(buffer_pool._free) == 1  # of copies forward, and of their gradient after them
