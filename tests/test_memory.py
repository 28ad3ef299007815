"""Large tensors on CPU get the pages of dead ones."""

import torch

from moe_dist import memory
from moe_dist.rows import Copies

LIKE = torch.zeros(1)
MEGA = 2**20  # elements of 4 bytes


def test_pages_go_to_the_next_tensor_when_the_last_view_is_gone() -> None:
    first = memory.empty(3, MEGA, like=LIKE)
    where, view = first.data_ptr(), first[1:]
    del first
    other = memory.empty(3, MEGA, like=LIKE)
    assert other.data_ptr() != where, "a view is alive"
    del view
    # of 2.5 where 3 are free: within 1.5 times its size; and of another dtype
    again = memory.empty(5, MEGA, like=LIKE.to(torch.bfloat16))
    assert again.data_ptr() == where and again.dtype == torch.bfloat16 and again.shape == (5, MEGA)


def test_a_block_that_was_outgrown_is_let_go() -> None:
    memory._free.clear()
    for size in range(8, 20):
        tensor = memory.empty(size, MEGA, like=LIKE)
        del tensor
    # 8 MB, outgrown by 9, and so on; each comes in place of the one before
    assert [len(block) for block in memory._free] == [19 * 4 * MEGA]


def test_small_ones_are_left_to_torch() -> None:
    memory._free.clear()
    tensor = memory.empty(2**10, like=LIKE)
    del tensor
    assert not memory._free


def test_gradients_take_the_pages_of_the_last_step() -> None:
    memory._free.clear()
    x_TD = torch.ones(2**10, 2**9, requires_grad=True)
    copies = Copies(torch.arange(2**10).repeat(2), 2**10)
    for _ in range(3):
        x_TD.grad = None
        copies.add_up(copies.take(x_TD) * 2).sum().backward()
        assert x_TD.grad is not None and (x_TD.grad == 4).all()  # two copies, twice
    assert len(memory._free) == 1  # of copies forward, and of their gradient after them
