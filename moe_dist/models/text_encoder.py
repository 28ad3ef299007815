"""Text encoders after ALBERT (Lan et al. 2020): ALBERT, BERT with its factorised embedding and WideNet (Xue et al.
2021), which differ in their encoder alone: the blocks of the first two are post-LN, as published, WideNet's pre-LN.

    (words + kinds + positions) of width E -> LN -> width D -> encoder -> heads of pre-training: masked words, and
    whether two texts are in order

Layers, activations and biases are where ALBERT's published code has them, but that keys have no bias, GELU is exact
instead of approximated by tanh, the epsilon of LayerNorms is 1e-6 instead of 1e-12, and dropout of embeddings comes
after width D instead of before.

Legend: B samples, S tokens of each, T = B S tokens, D width of the encoder, E of the embedding, V vocabulary, N masked
tokens.
"""

import torch
import torch.nn.functional as F
from torch import nn

from moe_dist.config.schema import TextConfig
from moe_dist.data.text.masked_lm import MLM_FRACTION
from moe_dist.models.transformer import EMBEDDING_BOUND, Encoder, LayerNorm, Positions, linear
from moe_dist.moe.layer import LayerStats
from moe_dist.nn.init import set_init_bound, uniform_parameter
from moe_dist.nn.token_context import TokenContext
from moe_dist.nn.token_noise import token_dropout

KINDS = 2  # of tokens: those of a first and of a second text
POOLED = 2**20  # the site of a classifier's dropout, behind those of any encoder


class TextEncoder(nn.Module):
    """What all of them share; the heads that a task needs are in those below."""

    def __init__(self, config: TextConfig) -> None:
        """Raises ValueError for numbers that do not fit together."""
        super().__init__()
        width, dim = config.embedding_dim, config.encoder.dim
        self.p, self.num_tokens = config.encoder.dropout, config.max_tokens
        self.words = _table(config.vocabulary_size, width)
        self.kinds = _table(KINDS, width)
        self.positions = Positions(config.max_tokens, width)
        self.norm = LayerNorm(width)
        self.widen = linear(width, dim)
        self.encoder = Encoder(config.encoder)

    def read(
        self, token_BS: torch.Tensor, kind_BS: torch.Tensor, ctx: TokenContext
    ) -> tuple[torch.Tensor, dict[str, LayerStats]]:
        """Tokens -> what the heads see (T, D), statistics. Raises ValueError for samples that are too long."""
        num_samples, tokens = token_BS.shape
        if tokens > self.num_tokens:
            raise ValueError(
                f"{tokens} tokens in a sample: at most model.max_tokens={self.num_tokens}"
            )
        x_BSE = self.norm(self.positions(self.words(token_BS) + self.kinds(kind_BS)))
        x_TD = token_dropout(self.widen(x_BSE).flatten(0, 1), self.p, ctx.at_layer(0))
        # padding is not seen, but by itself: a token that saw nothing would be no number
        valid_BS = ctx.valid_T.view(num_samples, tokens)
        mask_B1SS = (
            valid_BS[:, None, :] | torch.eye(tokens, dtype=torch.bool, device=x_TD.device)
        )[:, None]
        return self.encoder(x_TD, (num_samples, tokens), mask_B1SS, ctx)

    def rows_per_sample(self) -> dict[str, int]:
        """How many rows each matrix meets in a sample of `max_tokens`, by the beginning of its name."""
        of_encoder = {
            f"encoder.{name}": self.num_tokens * uses for name, uses in self.encoder.uses().items()
        }
        return of_encoder | {"widen.": self.num_tokens}


class PretrainingModel(TextEncoder):
    """Tokens to masked words and the order of sentences."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        dim = config.encoder.dim
        self.masked = MaskedWords(dim, config.embedding_dim, config.vocabulary_size)
        self.pooler = linear(dim, dim)
        self.order = linear(dim, 2)

    def forward(
        self,
        token_BS: torch.Tensor,
        kind_BS: torch.Tensor,
        masked_N: torch.Tensor,
        ctx: TokenContext,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, LayerStats]]:
        """Tokens, their kinds, and which of the T tokens are to be told -> logits of those words (N, V), of the order
        (B, 2), and the statistics of each routing."""
        x_TD, stats = self.read(token_BS, kind_BS, ctx)
        order_B2 = self.order(_pooled(self.pooler, x_TD, token_BS.shape))
        return self.masked(x_TD[masked_N], self.words.weight), order_B2, stats

    def rows_per_sample(self) -> dict[str, int]:
        told = round(MLM_FRACTION * self.num_tokens)
        return super().rows_per_sample() | {
            "words.": told,
            "masked.": told,
            "pooler.": 1,
            "order.": 1,
        }


class TextClassifier(TextEncoder):
    """Texts, or pairs of them, to classes."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.pooler = linear(config.encoder.dim, config.encoder.dim)
        self.head = linear(config.encoder.dim, config.num_classes)

    def forward(
        self, token_BS: torch.Tensor, kind_BS: torch.Tensor, ctx: TokenContext
    ) -> tuple[torch.Tensor, dict[str, LayerStats]]:
        """Tokens and their kinds -> logits of classes (B, C), and the statistics of each routing."""
        x_TD, stats = self.read(token_BS, kind_BS, ctx)
        pooled_BD = token_dropout(
            _pooled(self.pooler, x_TD, token_BS.shape), self.p, _of_samples(ctx, token_BS.shape)
        )
        return self.head(pooled_BD), stats

    def rows_per_sample(self) -> dict[str, int]:
        return super().rows_per_sample() | {"pooler.": 1, "head.": 1}


class AnswerFinder(TextEncoder):
    """A question and a text to the first and the last token of the answer."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.span = linear(config.encoder.dim, 2)

    def forward(
        self, token_BS: torch.Tensor, kind_BS: torch.Tensor, ctx: TokenContext
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, LayerStats]]:
        """Tokens and their kinds -> logits of the first token (B, S), of the last one, and the statistics of each
        routing."""
        x_TD, stats = self.read(token_BS, kind_BS, ctx)
        start_BS, end_BS = self.span(x_TD).view(*token_BS.shape, 2).unbind(2)
        return start_BS, end_BS, stats

    def rows_per_sample(self) -> dict[str, int]:
        return super().rows_per_sample() | {"span.": self.num_tokens}


def _pooled(pooler: nn.Module, x_TD: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """(T, D) -> (B, D), of each sample's first token. `shape`: (B, S)."""
    return pooler(x_TD.view(*shape, x_TD.shape[1])[:, 0]).tanh()


def _of_samples(ctx: TokenContext, shape: torch.Size) -> TokenContext:
    """The context of each sample's first token, at a use of its own."""
    first_B = torch.arange(shape[0], device=ctx.sample_T.device) * shape[1]
    return ctx.select(first_B).at_layer(POOLED)


class MaskedWords(nn.Module):
    """(N, D) -> logits (N, V), by the words' own embedding."""

    def __init__(self, dim: int, width: int, vocabulary_size: int) -> None:
        super().__init__()
        self.narrow = linear(dim, width)
        self.norm = LayerNorm(width)
        self.bias_V = uniform_parameter(vocabulary_size, bound=0.0)

    def forward(self, x_ND: torch.Tensor, w_VE: torch.Tensor) -> torch.Tensor:
        return self.norm(F.gelu(self.narrow(x_ND))) @ w_VE.t() + self.bias_V


def _table(rows: int, width: int) -> nn.Embedding:
    # from a tensor: nn.Embedding's own initialisation costs seconds on the meta device, and ours follows
    table = nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
    set_init_bound(table.weight, EMBEDDING_BOUND)
    return table
