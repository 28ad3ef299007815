"""Token context: each token's sample and position, for noise, balance groups, capacity groups.

A token's context travels with its rows to other ranks. Samples are counted over all ranks, so the
context does not depend on the layout.

Legend: T tokens, N rows (copies of tokens), R received rows.
"""

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenContext:
    """The context of T tokens in one micro-batch.

    Attributes:
        sample_T: Each token's sample, an index in the step's global batch (a language model's
            lane), int64.
        position_T: Position within the sample, int64.
        valid_T: False for padding, bool.
        seed: The run's seed.
        step: Optimizer steps before this one.
        train: True in training, which has noise and dropout.
        first_sample: The micro-batch's first sample over all ranks, an index like `sample_T`.
        num_samples: Samples in the micro-batch over all ranks.
        balance_loss_group_size: Consecutive samples per balance group.
        capacity_group_size: Consecutive samples per capacity group.
        layer_call: Index of the layer call in the model's forward.
        gate_level: 0 for a layer's gate, 1 for a gate inside an expert group.
    """

    sample_T: torch.Tensor
    position_T: torch.Tensor
    valid_T: torch.Tensor
    seed: int
    step: int
    train: bool
    first_sample: int
    num_samples: int
    balance_loss_group_size: int
    capacity_group_size: int
    layer_call: int = 0
    gate_level: int = 0

    def at_layer(self, layer_call: int) -> "TokenContext":
        """Returns the same tokens' context at another layer call."""
        return dataclasses.replace(self, layer_call=layer_call)

    def select(self, token_N: torch.Tensor) -> "TokenContext":
        """Returns the context of N rows; row n is a copy of token `token_N[n]` (int64)."""
        return self.with_tokens(
            self.sample_T[token_N], self.position_T[token_N], self.valid_T[token_N]
        )

    def with_tokens(
        self, sample_R: torch.Tensor, position_R: torch.Tensor, valid_R: torch.Tensor
    ) -> "TokenContext":
        """Returns the context of R rows from any rank of the same micro-batch."""
        return dataclasses.replace(self, sample_T=sample_R, position_T=position_R, valid_T=valid_R)

    @property
    def num_balance_groups(self) -> int:
        """Returns how many balance groups the micro-batch has over all ranks."""
        return self.num_samples // self.balance_loss_group_size

    @property
    def balance_group_T(self) -> torch.Tensor:
        """Returns each token's balance group in the micro-batch over all ranks; int64."""
        return (self.sample_T - self.first_sample) // self.balance_loss_group_size

    @property
    def num_capacity_groups(self) -> int:
        """Returns how many capacity groups the micro-batch has over all ranks."""
        return -(-self.num_samples // self.capacity_group_size)

    @property
    def capacity_group_T(self) -> torch.Tensor:
        """Returns each token's capacity group in the micro-batch over all ranks; int64."""
        return (self.sample_T - self.first_sample) // self.capacity_group_size
