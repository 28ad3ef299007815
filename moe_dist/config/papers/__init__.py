"""Named configs, a file per paper. Each function returns a whole config; its docstring tells what it is for."""

from collections.abc import Callable

from moe_dist.config.messages import nearest
from moe_dist.config.papers import shazeer2017, xue2021
from moe_dist.config.schema import Config

CONFIGS: dict[str, Callable[[], Config]] = {
    f.__name__: f for f in (*shazeer2017.CONFIGS, *xue2021.CONFIGS)
}


def get(name: str) -> Config:
    """The config called `name`. Raises ValueError naming the nearest."""
    if name not in CONFIGS:
        raise ValueError(f"no config {name!r}; {nearest(name, CONFIGS)}")
    return CONFIGS[name]()
