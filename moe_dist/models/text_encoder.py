"""Text encoders after ALBERT (Lan et al. 2020).

These are ALBERT, BERT with a factorized embedding, and WideNet (Xue et al. 2021). Only their
encoders differ: the first two have post-LN blocks, as published, and WideNet has pre-LN blocks.

    words + kinds + positions (width E) -> LN -> linear (width D) -> encoder -> heads

Layers, activations and biases are in the same places as in ALBERT's published code, except for:
keys have no bias, GELU is exact, not a tanh approximation, LayerNorms' epsilon is 1e-6,
not 1e-12, and embedding dropout comes after the linear layer, not before it.

Legend: B samples, S tokens in each, T = B S tokens, D width, E embedding width, V vocabulary, N
masked tokens, C classes.
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

KINDS = 2  # token kinds: first text, second text
POOLED_CALL = 2**20  # layer call for a classifier's dropout, after any encoder's


class TextEncoder(nn.Module):
    """Embeddings and encoder; subclasses add a task's heads."""

    def __init__(self, config: TextConfig) -> None:
        """Creates the layers.

        Args:
            config: The config's section `model`.

        Raises:
            ValueError: Sizes do not fit together.
        """
        super().__init__()
        width = config.embedding_dim
        dim = config.encoder.dim
        self.p = config.encoder.dropout
        self.num_tokens = config.max_tokens
        self.words = _table(config.vocabulary_size, width)
        self.kinds = _table(KINDS, width)
        self.positions = Positions(config.max_tokens, width)
        self.norm = LayerNorm(width)
        self.widen = linear(width, dim)
        self.encoder = Encoder(config.encoder)

    def read(
        self, token_BS: torch.Tensor, kind_BS: torch.Tensor, ctx: TokenContext
    ) -> tuple[torch.Tensor, dict[str, LayerStats]]:
        """Runs embedding and encoder.

        Args:
            token_BS: Tokens, int64.
            kind_BS: Their kinds, 0 or 1.
            ctx: The tokens' context.

        Returns:
            The encoder's output (T, D) and each routing's statistics.

        Raises:
            ValueError: Samples are longer than `model.max_tokens`.
        """
        num_samples, tokens = token_BS.shape
        if tokens > self.num_tokens:
            raise ValueError(
                f"{tokens} tokens in a sample; at most model.max_tokens={self.num_tokens}"
            )
        x_BSE = self.norm(self.positions(self.words(token_BS) + self.kinds(kind_BS)))
        x_TD = token_dropout(self.widen(x_BSE).flatten(0, 1), self.p, ctx.at_layer(0))
        # padding is visible to itself only: a token without any visible token becomes NaN
        valid_BS = ctx.valid_T.view(num_samples, tokens)
        itself_SS = torch.eye(tokens, dtype=torch.bool, device=x_TD.device)
        mask_BSS = valid_BS[:, None, :] | itself_SS
        return self.encoder(x_TD, (num_samples, tokens), mask_BSS[:, None], ctx)

    def rows_per_sample(self) -> dict[str, int]:
        """Counts the rows that each matrix multiplies, by its name's prefix.

        The sample has `max_tokens` tokens.
        """
        rows = {"widen.": self.num_tokens}
        for name, uses in self.encoder.uses().items():
            rows[f"encoder.{name}"] = self.num_tokens * uses
        return rows


class PretrainingModel(TextEncoder):
    """A text encoder with the pre-training heads: masked words, and the order of two texts."""

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
        """Runs the encoder and both heads.

        Args:
            token_BS: Tokens, int64.
            kind_BS: Their kinds, 0 or 1.
            masked_N: Indices among the T tokens.
            ctx: The tokens' context.

        Returns:
            Logits for the masked words (N, V) and the order (B, 2), and each routing's statistics.
        """
        x_TD, stats = self.read(token_BS, kind_BS, ctx)
        order_B2 = self.order(_pooled(self.pooler, x_TD, token_BS.shape))
        return self.masked(x_TD[masked_N], self.words.weight), order_B2, stats

    def rows_per_sample(self) -> dict[str, int]:
        """Returns the rows for each matrix, with the expected masked words."""
        num_masked = round(MLM_FRACTION * self.num_tokens)
        heads = {"words.": num_masked, "masked.": num_masked, "pooler.": 1, "order.": 1}
        return super().rows_per_sample() | heads


class TextClassifier(TextEncoder):
    """A text encoder that classifies texts or text pairs."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.pooler = linear(config.encoder.dim, config.encoder.dim)
        self.head = linear(config.encoder.dim, config.num_classes)

    def forward(
        self, token_BS: torch.Tensor, kind_BS: torch.Tensor, ctx: TokenContext
    ) -> tuple[torch.Tensor, dict[str, LayerStats]]:
        """Returns logits (B, C) and each routing's statistics; see `read`."""
        x_TD, stats = self.read(token_BS, kind_BS, ctx)
        pooled_BD = _pooled(self.pooler, x_TD, token_BS.shape)
        pooled_BD = token_dropout(pooled_BD, self.p, _sample_context(ctx, token_BS.shape))
        return self.head(pooled_BD), stats

    def rows_per_sample(self) -> dict[str, int]:
        """Returns the rows for each matrix; the heads see one row."""
        return super().rows_per_sample() | {"pooler.": 1, "head.": 1}


class AnswerFinder(TextEncoder):
    """A text encoder that finds an answer's first and last token."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.span = linear(config.encoder.dim, 2)

    def forward(
        self, token_BS: torch.Tensor, kind_BS: torch.Tensor, ctx: TokenContext
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, LayerStats]]:
        """Returns logits (B, S) for first and last token, and the statistics; see `read`."""
        x_TD, stats = self.read(token_BS, kind_BS, ctx)
        start_BS, end_BS = self.span(x_TD).view(*token_BS.shape, 2).unbind(2)
        return start_BS, end_BS, stats

    def rows_per_sample(self) -> dict[str, int]:
        """Returns the rows for each matrix; the head sees all tokens."""
        return super().rows_per_sample() | {"span.": self.num_tokens}


def _pooled(pooler: nn.Module, x_TD: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Returns the tanh layer's output (B, D) for each sample's first token; `shape` is (B, S)."""
    return pooler(x_TD.view(*shape, x_TD.shape[1])[:, 0]).tanh()


def _sample_context(ctx: TokenContext, shape: torch.Size) -> TokenContext:
    """Returns the context of each sample's first token, with its own layer call."""
    first_B = torch.arange(shape[0], device=ctx.sample_T.device) * shape[1]
    return ctx.select(first_B).at_layer(POOLED_CALL)


class MaskedWords(nn.Module):
    """A head from masked tokens (N, D) to logits (N, V); it uses the word embedding (V, E)."""

    def __init__(self, dim: int, width: int, vocabulary_size: int) -> None:
        super().__init__()
        self.narrow = linear(dim, width)
        self.norm = LayerNorm(width)
        self.bias_V = uniform_parameter(vocabulary_size, bound=0.0)

    def forward(self, x_ND: torch.Tensor, w_VE: torch.Tensor) -> torch.Tensor:
        """Returns the logits (N, V)."""
        return self.norm(F.gelu(self.narrow(x_ND))) @ w_VE.t() + self.bias_V


def _table(rows: int, width: int) -> nn.Embedding:
    """Returns an embedding with `rows` entries."""
    # from a tensor: nn.Embedding's initialization takes seconds on the meta device and would be
    # overwritten
    table = nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
    set_init_bound(table.weight, EMBEDDING_BOUND)
    return table
