"""Small encoders of images and texts, and the weights and inputs that tests give them."""

import dataclasses
from typing import Any

import torch
from uneven_batch import (
    LENGTHS,
    NUM_SAMPLES,
    SEED,
    TIMESTEPS,
    Case,
    context,
    drawn,
)

from moe_dist.config.schema import (
    EncoderConfig,
    SoftmaxMoEConfig,
    TextConfig,
    VisionConfig,
)
from moe_dist.models.text_encoder import PretrainingModel
from moe_dist.models.vision_transformer import VisionTransformer
from moe_dist.nn import prng
from moe_dist.nn.init import init_bounds, init_parameter
from moe_dist.nn.token_context import TokenContext

DIM, NUM_EXPERTS, VOCABULARY_SIZE = 8, 4, 11
MOE = SoftmaxMoEConfig(
    num_experts=NUM_EXPERTS, k=2, expert_hidden_dim=10, capacity_factor=1.0, balance_loss_weight=0.5
)
WIDENET = EncoderConfig(depth=3, dim=DIM, num_heads=2, ffn_hidden_dim=12, dropout=0.25, moe=MOE)
# 5 blocks: attention of 0-1, 2-3, 4; ffn of 0-2 and of 3-4; norms of 0-1, 2-3, 4; assignments of
# 0-2 and of 3-4
GROUPED = dataclasses.replace(
    WIDENET,
    depth=5,
    moe_blocks="1,2,4",
    blocks_per_attention=2,
    blocks_per_ffn=3,
    blocks_per_norm=2,
    blocks_per_routing=3,
)
MASKED = [
    (b, s) for b, length in enumerate(LENGTHS) for s in range(length) if (b + s) % 2
]  # samples and places
GROUPS = Case(balance_loss_group_size=4, capacity_group_size=2)


def make(config: VisionConfig | TextConfig) -> VisionTransformer | PretrainingModel:
    return (
        VisionTransformer(config) if isinstance(config, VisionConfig) else PretrainingModel(config)
    )


# what the ranks do


def image_context(first: int, last: int) -> TokenContext:
    """Every patch is valid, except those of sample 3, which is padding."""
    ctx = context(first, last, GROUPS)
    return dataclasses.replace(ctx, valid_T=ctx.sample_T != ctx.first_sample + 3, layer_call=0)


def text_context(first: int, last: int) -> TokenContext:
    return dataclasses.replace(context(first, last, GROUPS), layer_call=0)


def images() -> torch.Tensor:
    return drawn(NUM_SAMPLES, 3, 4, 4, key="images")


def words() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns tokens and their kinds (B, S)."""
    generator = prng.generator("test_widenet", "words")
    token_BS = torch.randint(VOCABULARY_SIZE, (NUM_SAMPLES, TIMESTEPS), generator=generator)
    return token_BS, torch.randint(2, (NUM_SAMPLES, TIMESTEPS), generator=generator)


def places(first: int, last: int) -> torch.Tensor:
    """Returns the places of the masked tokens of samples `first` to `last`."""
    return torch.tensor(
        [(b - first) * TIMESTEPS + s for b, s in MASKED if first <= b < last], dtype=torch.int64
    )


@torch.no_grad()
def fill_zeros(named: list[tuple[str, torch.nn.Parameter]], mine: slice = slice(None)) -> None:
    """Gives gains and biases, which start at zero, other values; of expert stacks the slice
    `mine`."""
    for name, p in named:
        if not p.any():
            shape = (NUM_EXPERTS, *p.shape[1:]) if ".experts." in name else p.shape
            p.copy_(drawn(*shape, key=name)[mine])


# what they should have found


def filled(config: VisionConfig | TextConfig) -> Any:
    """Returns the whole model on one rank, with the weights that `parallelize` and `on_mesh`
    give."""
    model = make(config).double()
    for name, bound in init_bounds(model).items():
        init_parameter(
            model.get_parameter(name),
            name,
            bound,
            SEED,
            range(NUM_EXPERTS) if ".experts." in name else None,
        )
    fill_zeros([*model.named_parameters()])
    return model
