"""Pool for large CPU buffers: a new tensor reuses a freed tensor's memory.

The operating system takes freed large blocks back at once, and page faults in new ones cost a fifth
of a layer's time. GPU tensors and small tensors need no pool: torch keeps freed GPU memory, and the
C library keeps small blocks.
"""

import weakref
from threading import Lock

import numpy as np
import torch

LARGE = 2**20  # bytes from which a tensor is pooled
# two limits: a block is at most SLACK times its tensor's size, and the pool holds at most SLACK
# times the most bytes ever in use at once
SLACK = 1.5

_lock = Lock()
# Free blocks, oldest first. A finalizer appends to the list at any time, also within `_take`, so
# the list grows at its end without the lock.
_free: list[np.ndarray] = []
_total = 0  # bytes in all blocks, free and in use
_max_used = 0  # the most bytes ever in use at once


def pooled_empty(*size: int, like: torch.Tensor) -> torch.Tensor:
    """Allocates an uninitialized tensor; a large CPU tensor comes from the pool.

    Args:
        *size: The tensor's shape.
        like: A tensor with the dtype and the device to use.

    Returns:
        The tensor; it is not a view.
    """
    num_bytes = like.element_size() * int(np.prod(size))
    if like.device.type != "cpu" or num_bytes < LARGE:
        return like.new_empty(size)
    block = _take(num_bytes)
    buffer = block[:num_bytes]  # torch holds this view for as long as any tensor uses the memory
    weakref.finalize(buffer, _free.append, block).atexit = False
    # FENCE: set_ on an empty tensor, not a view of from_numpy: autograd accumulates a second
    # gradient in place only into a non-view (torch 2.13, test_buffer_pool.py)
    storage = torch.from_numpy(buffer).untyped_storage()
    return like.new_empty(0).set_(storage, 0, size)  # type: ignore[call-overload]


def _take(num_bytes: int) -> np.ndarray:
    """Returns the smallest free block that fits, or a new one.

    If the pool is over its limit, it frees the blocks unused for the longest time. Otherwise blocks
    would pile up when sizes change from step to step.
    """
    global _total, _max_used
    with _lock:
        fitting = []
        for i, block in enumerate(_free):
            if num_bytes <= len(block) <= SLACK * num_bytes:
                fitting.append((len(block), i))
        if fitting:
            _, index = min(fitting)
            taken = _free.pop(index)
        else:
            taken = np.empty(num_bytes, np.uint8)
            _total += num_bytes
        _max_used = max(_max_used, _total - sum(map(len, list(_free))))
        while _free and _total > SLACK * _max_used:
            _total -= len(_free.pop(0))
    return taken
