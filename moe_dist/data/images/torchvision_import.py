"""The package's only import of torchvision. What imports it by itself, as transformers and timm do, comes after."""

import importlib
import sys
from typing import Any

import torch

_SCHEMAS: list[torch.library.Library] = []  # what one defines is gone when nobody holds it


def import_torchvision() -> Any:
    """torchvision with `transforms.v2`; the first call takes about a second.

    torchvision's CUDA build, which package indexes give by default, does not load its operators beside a CPU build of
    torch, and then fails where it describes one ("operator torchvision::nms does not exist"). Their schemas are all
    that it misses: with them data sets, transforms and models work. `torchvision.io` does not, so images are opened
    with PIL. Where the import works nothing else is done.
    """
    try:
        return _import()
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    _SCHEMAS.append(torch.library.Library("torchvision", "FRAGMENT"))
    for name in ("nms", "qnms"):
        _SCHEMAS[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [
        name for name in sys.modules if name.split(".")[0] == "torchvision"
    ]:  # half imported
        del sys.modules[name]
    return _import()


def _import() -> Any:
    importlib.import_module("torchvision.transforms.v2")
    return sys.modules["torchvision"]
