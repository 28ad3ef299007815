"""Named configs, one module per paper.

Each function in `CONFIGS` returns a complete config. Its docstring describes the model and has the
command to train it; a line that begins with "Paper" gives the paper's figures, not measurements of
this code. `train.py --list` prints each docstring's first line.
"""

from collections.abc import Callable

from moe_dist.config.messages import nearest
from moe_dist.config.papers import shazeer2017, xue2021
from moe_dist.config.schema import Config

CONFIGS: dict[str, Callable[[], Config]] = {
    make.__name__: make for make in (*shazeer2017.CONFIGS, *xue2021.CONFIGS)
}


def get(name: str) -> Config:
    """Returns a named config.

    Args:
        name: A key of `CONFIGS`.

    Returns:
        The config, not yet checked by `check_config`.

    Raises:
        ValueError: No config has this name; the message has the nearest name.
    """
    if name not in CONFIGS:
        raise ValueError(f"no config {name!r}; {nearest(name, CONFIGS)}")
    return CONFIGS[name]()
