"""Text encoders after ALBERT (Lan et al. 2020): ALBERT, BERT with its factorised embedding and WideNet (Xue et al.
2021), which differ in their encoder alone. Blocks are pre-LN, as WideNet's are; ALBERT's own are post-LN.

    (words + kinds + positions) of width E -> LN -> width D -> encoder -> heads of pre-training: masked words, and
    whether two texts are in order

Legend: B samples, S tokens of each, T = B S tokens, D width of the encoder, E of the embedding, V vocabulary, N masked
tokens.
"""

import torch
import torch.nn.functional as F
from torch import nn

from moe_dist.config import TextConfig
from moe_dist.context import Context
from moe_dist.keyed import dropout
from moe_dist.layer import LayerStats
from moe_dist.models.transformer import EMBEDDING_BOUND, Encoder, LayerNorm, Positions, linear
from moe_dist.parameters import parameter, with_bound


class TextEncoder(nn.Module):
    """Tokens to masked words and the order of sentences."""

    def __init__(self, config: TextConfig) -> None:
        """Raises ValueError for numbers that do not fit together."""
        super().__init__()
        width, dim = config.embedding_dim, config.encoder.dim
        self.p, self.max_tokens = config.encoder.dropout, config.max_tokens
        self.words = _table(config.vocabulary_size, width)
        self.kinds = _table(config.num_kinds, width)
        self.positions = Positions(config.max_tokens, width)
        self.norm = LayerNorm(width)
        self.widen = linear(width, dim)
        self.encoder = Encoder(config.encoder)
        self.masked = MaskedWords(dim, width, config.vocabulary_size)
        self.pooler = linear(dim, dim)
        self.order = linear(dim, 2)

    def forward(
        self, token_BS: torch.Tensor, kind_BS: torch.Tensor, masked_N: torch.Tensor, ctx: Context
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, LayerStats]]:
        """Tokens, their kinds, and which of the T tokens are to be told -> logits of those words (N, V), of the order
        (B, 2), and the statistics of each routing."""
        x_TD, stats = self.read(token_BS, kind_BS, ctx)
        first_BD = x_TD.view(*token_BS.shape, x_TD.shape[1])[:, 0]
        order_B2 = self.order(self.pooler(first_BD).tanh())
        return self.masked(x_TD[masked_N], self.words.weight), order_B2, stats

    def read(
        self, token_BS: torch.Tensor, kind_BS: torch.Tensor, ctx: Context
    ) -> tuple[torch.Tensor, dict[str, LayerStats]]:
        """Tokens -> what the heads see (T, D), statistics. Raises ValueError for samples that are too long."""
        num_samples, tokens = token_BS.shape
        if tokens > self.max_tokens:
            raise ValueError(f"{tokens} tokens in a sample: at most text.max_tokens={self.max_tokens}")
        x_BSE = self.norm(self.positions(self.words(token_BS) + self.kinds(kind_BS)))
        x_TD = dropout(self.widen(x_BSE).flatten(0, 1), self.p, ctx.at(0))
        # padding is not seen, but by itself: a token that saw nothing would be no number
        valid_BS = ctx.valid_T.view(num_samples, tokens)
        mask_B1SS = (valid_BS[:, None, :] | torch.eye(tokens, dtype=torch.bool, device=x_TD.device))[:, None]
        return self.encoder(x_TD, (num_samples, tokens), mask_B1SS, ctx)


class MaskedWords(nn.Module):
    """(N, D) -> logits (N, V), by the words' own embedding."""

    def __init__(self, dim: int, width: int, vocabulary_size: int) -> None:
        super().__init__()
        self.narrow = linear(dim, width)
        self.norm = LayerNorm(width)
        self.bias_V = parameter(vocabulary_size, bound=0.0)

    def forward(self, x_ND: torch.Tensor, w_VE: torch.Tensor) -> torch.Tensor:
        return self.norm(F.gelu(self.narrow(x_ND))) @ w_VE.t() + self.bias_V


def _table(rows: int, width: int) -> nn.Embedding:
    # from a tensor: nn.Embedding's own initialisation costs seconds on the meta device, and ours follows
    table = nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
    with_bound(table.weight, EMBEDDING_BOUND)
    return table
