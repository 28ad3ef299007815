"""Large tensors on CPU whose pages are kept when they die, and given to the next ones.

The system takes large blocks back at once, and to fill fresh pages again costs a fifth of a layer's time. On a GPU
torch keeps freed memory itself, and small blocks stay in the process anyway.
"""

import weakref
from threading import Lock

import numpy as np
import torch

LARGE = 2**20  # bytes
SLACK = 1.5  # the largest block that a tensor takes, in its own size

_free: list[np.ndarray] = []  # the end may grow at any time: a tensor may die within `empty`
_taking = Lock()


def empty(*size: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the dtype and on the device of `like`, its values undefined."""
    num_bytes = like.element_size() * int(np.prod(size))
    if like.device.type != "cpu" or num_bytes < LARGE:
        return like.new_empty(size)
    block = _take(num_bytes)
    lent = block[:num_bytes]  # torch holds it for as long as any tensor has the memory
    weakref.finalize(lent, _free.append, block).atexit = False
    return torch.from_numpy(lent).view(like.dtype).view(size)


def _take(num_bytes: int) -> np.ndarray:
    """The smallest free block that will do. In place of one that was outgrown comes a larger one: sizes that change
    from step to step do not pile up."""
    with _taking:
        sizes = [(len(block), i) for i, block in enumerate(_free)]
        fitting = [(n, i) for n, i in sizes if num_bytes <= n <= SLACK * num_bytes]
        if fitting:
            return _free.pop(min(fitting)[1])
        outgrown = [(n, i) for n, i in sizes if num_bytes / SLACK <= n < num_bytes]
        if outgrown:
            del _free[max(outgrown)[1]]
    return np.empty(num_bytes, np.uint8)
