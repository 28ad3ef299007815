"""The package's only import of torchvision.

Libraries that import torchvision themselves, such as transformers and timm, are imported after it.
"""

import importlib
import sys
from typing import Any

import torch

# A schema exists only as long as the library object that defined it.
_SCHEMAS: list[torch.library.Library] = []


def import_torchvision() -> Any:
    """Returns the module torchvision, with `transforms.v2`; the first call takes about a second.

    FENCE: torchvision's CUDA build, which package indexes offer by default, does not load its
    operators with a CPU build of torch, and then fails when it describes one of them ("operator
    torchvision::nms does not exist"). Only these operators' schemas are missing: with them,
    data sets, transforms and models work. `torchvision.io` does not work, so that images are opened
    with PIL. Nothing is changed if the import succeeds. Tried with torch 2.13; held by
    test_torchvision_import_fix_is_applied_only_when_needed.
    """
    try:
        return _import()
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    schemas = torch.library.Library("torchvision", "FRAGMENT")
    _SCHEMAS.append(schemas)
    for name in ("nms", "qnms"):
        schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in list(sys.modules):  # the failed import has left modules
        if name.split(".")[0] == "torchvision":
            del sys.modules[name]
    return _import()


def _import() -> Any:
    importlib.import_module("torchvision.transforms.v2")
    return sys.modules["torchvision"]
