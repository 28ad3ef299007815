"""Vision transformers: ViT, ViT-MoE and WideNet (Xue et al. 2021), which differ in their encoder alone.

    patches -> + positions -> encoder -> mean over patches -> tanh layer -> classes

Legend: B images, S patches of each, T = B S tokens, D width, N classes, Q colours, Y and X pixels, P side of a patch.
"""

import torch
from torch import nn

from moe_dist.config.schema import VisionConfig
from moe_dist.models.transformer import Encoder, Positions, linear
from moe_dist.moe.layer import LayerStats
from moe_dist.nn.token_context import TokenContext
from moe_dist.nn.token_noise import token_dropout


class VisionTransformer(nn.Module):
    """Images to classes. There is no class token: the mean takes its place (the authors' code keeps it among the tokens
    that it counts capacity from)."""

    def __init__(self, config: VisionConfig) -> None:
        """Raises ValueError for numbers that do not fit together."""
        super().__init__()
        size, patch, dim = config.image_size, config.patch_size, config.encoder.dim
        if size % patch:
            raise ValueError(
                f"model.image_size={size} is not a multiple of model.patch_size={patch}"
            )
        self.p, self.patch_size, self.num_tokens = (
            config.encoder.dropout,
            patch,
            (size // patch) ** 2,
        )
        self.patches = linear(config.channels * patch**2, dim)
        self.positions = Positions(self.num_tokens, dim)
        self.encoder = Encoder(config.encoder)
        self.representation = linear(dim, dim)
        self.head = linear(dim, config.num_classes, bound=0.0)

    def forward(
        self, image_BQYX: torch.Tensor, ctx: TokenContext
    ) -> tuple[torch.Tensor, dict[str, LayerStats]]:
        """Images -> logits (B, N), and the statistics of each routing. `ctx` is of the patches, row by row."""
        x_BSD = self.positions(self.patches(cut(image_BQYX, self.patch_size)))
        shape, width = x_BSD.shape[:2], x_BSD.shape[2]
        x_TD = token_dropout(x_BSD.flatten(0, 1), self.p, ctx.at_layer(0))
        x_TD, stats = self.encoder(x_TD, shape, None, ctx)
        mean_BD = x_TD.view(*shape, width).mean(1)
        return self.head(self.representation(mean_BD).tanh()), stats

    def rows_per_sample(self) -> dict[str, int]:
        """How many rows each matrix meets, by the beginning of its name."""
        of_encoder = {
            f"encoder.{name}": self.num_tokens * uses for name, uses in self.encoder.uses().items()
        }
        return of_encoder | {"patches.": self.num_tokens, "representation.": 1, "head.": 1}


def cut(image_BQYX: torch.Tensor, side: int) -> torch.Tensor:
    """Square patches as rows, row by row: (B, S, Q P P), each as a convolution's weight lies."""
    b, colours, height, width = image_BQYX.shape
    rows, columns = height // side, width // side
    tiles = image_BQYX.view(b, colours, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(b, rows * columns, colours * side**2)
