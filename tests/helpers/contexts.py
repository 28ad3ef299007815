"""Token contexts for layers that are tested alone."""

import dataclasses
from typing import Any

import torch

from moe_dist.nn.token_context import TokenContext


def context(num_tokens: int, tokens_per_sample: int = 1, **changes: Any) -> TokenContext:
    """Returns `num_tokens` valid tokens of consecutive samples, all in one balance group."""
    token_T = torch.arange(num_tokens)
    num_samples = -(-num_tokens // tokens_per_sample)
    ctx = TokenContext(
        sample_T=token_T // tokens_per_sample,
        position_T=token_T % tokens_per_sample,
        valid_T=torch.ones(num_tokens, dtype=torch.bool),
        seed=1,
        step=0,
        train=True,
        first_sample=0,
        num_samples=max(1, num_samples),
        balance_loss_group_size=max(1, num_samples),
        capacity_group_size=1,
    )
    return dataclasses.replace(ctx, **changes)


NOWHERE = TokenContext(  # 40 tokens, none of them valid
    *(torch.zeros(40, dtype=t) for t in (torch.int64, torch.int64, torch.bool)),
    0,
    1,
    True,
    0,
    40,
    40,
    1,
)
