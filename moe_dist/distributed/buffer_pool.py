"""Large tensors on CPU whose pages are kept when they die, and given to the next ones.

The system takes large blocks back at once, and to fill fresh pages again costs a fifth of a layer's time. On a GPU
torch keeps freed memory itself, and small blocks stay in the process anyway.
"""

import weakref
from threading import Lock

import numpy as np
import torch

LARGE = 2**20  # bytes
SLACK = 1.5  # the largest block that a tensor takes, in its own size; the most of all, in what was lent at once

_free: list[
    np.ndarray
] = []  # oldest first; the end may grow at any time: a tensor may die within `empty`
_total = _most = 0  # bytes of all blocks, free and lent; the most that were lent at once
_taking = Lock()


def pooled_empty(*size: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the dtype and on the device of `like`, its values undefined."""
    num_bytes = like.element_size() * int(np.prod(size))
    if like.device.type != "cpu" or num_bytes < LARGE:
        return like.new_empty(size)
    block = _take(num_bytes)
    lent = block[:num_bytes]  # torch holds it for as long as any tensor has the memory
    weakref.finalize(lent, _free.append, block).atexit = False
    # not a view, whose memory autograd would not add another gradient to in place
    return like.new_empty(0).set_(torch.from_numpy(lent).untyped_storage(), 0, size)  # type: ignore[call-overload]


def _take(num_bytes: int) -> np.ndarray:
    """The smallest free block that will do, else a new one. Of all, those that have lain free for longest go, so that
    sizes which change from step to step do not pile up."""
    global _total, _most
    with _taking:
        fitting = [
            (len(b), i) for i, b in enumerate(_free) if num_bytes <= len(b) <= SLACK * num_bytes
        ]
        if fitting:
            block = _free.pop(min(fitting)[1])
        else:
            block = np.empty(num_bytes, np.uint8)
            _total += num_bytes
        _most = max(_most, _total - sum(map(len, list(_free))))
        while _free and _total > SLACK * _most:
            _total -= len(_free.pop(0))
    return block
