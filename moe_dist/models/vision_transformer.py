"""Vision transformers: ViT, ViT-MoE and WideNet (Xue et al. 2021). Only their encoders differ.

    patches -> + positions -> encoder -> mean over patches -> tanh layer -> classes

Legend: B images, S patches in each, T = B S tokens, D width, N classes, Q color channels, Y and X
pixels, P a patch's side.
"""

import torch
from torch import nn

from moe_dist.config.schema import VisionConfig
from moe_dist.models.transformer import Encoder, Positions, linear
from moe_dist.moe.layer import LayerStats
from moe_dist.nn.token_context import TokenContext
from moe_dist.nn.token_noise import token_dropout


class VisionTransformer(nn.Module):
    """An image classifier.

    There is no class token; the mean over patches is classified. (The authors' code counts a class
    token in the capacity.)
    """

    def __init__(self, config: VisionConfig) -> None:
        """Creates the layers.

        Args:
            config: The config's section `model`.

        Raises:
            ValueError: Sizes do not fit together.
        """
        super().__init__()
        size = config.image_size
        patch = config.patch_size
        dim = config.encoder.dim
        if size % patch:
            raise ValueError(
                f"model.image_size={size} is not a multiple of model.patch_size={patch}"
            )
        self.p = config.encoder.dropout
        self.patch_size = patch
        self.num_tokens = (size // patch) ** 2
        self.patches = linear(config.channels * patch**2, dim)
        self.positions = Positions(self.num_tokens, dim)
        self.encoder = Encoder(config.encoder)
        self.representation = linear(dim, dim)
        self.head = linear(dim, config.num_classes, bound=0.0)

    def forward(
        self, image_BQYX: torch.Tensor, ctx: TokenContext
    ) -> tuple[torch.Tensor, dict[str, LayerStats]]:
        """Classifies images.

        Args:
            image_BQYX: Images.
            ctx: Their patches' context, row by row.

        Returns:
            Logits (B, N) and each routing's statistics.
        """
        x_BSD = self.positions(self.patches(cut(image_BQYX, self.patch_size)))
        shape = x_BSD.shape[:2]
        width = x_BSD.shape[2]
        x_TD = token_dropout(x_BSD.flatten(0, 1), self.p, ctx.at_layer(0))
        x_TD, stats = self.encoder(x_TD, shape, None, ctx)
        mean_BD = x_TD.view(*shape, width).mean(1)
        return self.head(self.representation(mean_BD).tanh()), stats

    def rows_per_sample(self) -> dict[str, int]:
        """Counts the rows that each matrix multiplies, by its name's prefix."""
        rows = {"patches.": self.num_tokens, "representation.": 1, "head.": 1}
        for name, uses in self.encoder.uses().items():
            rows[f"encoder.{name}"] = self.num_tokens * uses
        return rows


def cut(image_BQYX: torch.Tensor, side: int) -> torch.Tensor:
    """Cuts images into square patches.

    Args:
        image_BQYX: Images whose height and width are multiples of `side`.
        side: A patch's side in pixels.

    Returns:
        The patches in row order, (B, S, Q P P). Its elements have the same order as a
        convolution's weight.
    """
    b, colours, height, width = image_BQYX.shape
    rows, columns = height // side, width // side
    tiles = image_BQYX.view(b, colours, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(b, rows * columns, colours * side**2)
