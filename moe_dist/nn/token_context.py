"""The context of tokens: sample and position, for noise, balance groups and capacity groups.

It travels with the rows of a token, to whichever rank they go. Samples are counted over all ranks,
so nothing in it depends on the layout.

Legend: T tokens, N rows that are copies of tokens, R rows that have arrived.
"""

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenContext:
    """The context of T tokens of one micro-batch.

    Attributes:
        sample_T: Index of the token's sample in the step's global batch (a language model's lane),
            int64.
        position_T: Position within the sample, int64.
        valid_T: False for padding, bool.
        seed: Seed of the run.
        step: Number of optimizer steps before this one.
        train: Whether this is training, with noise and dropout.
        first_sample: Index of the micro-batch's first sample over all ranks.
        num_samples: Samples of the micro-batch over all ranks.
        balance_loss_group_size: Consecutive samples over which a balance loss is formed.
        capacity_group_size: Consecutive samples within which capacity is counted.
        layer_call: Number of the layer's call in the model.
        gate_level: 0 for gates of the model, 1 for gates inside a group of experts.
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
        """Returns the context of the same tokens at another call of a layer."""
        return dataclasses.replace(self, layer_call=layer_call)

    def select(self, token_N: torch.Tensor) -> "TokenContext":
        """Returns the context of N rows that are copies of the tokens `token_N` (int64)."""
        return self.with_tokens(
            self.sample_T[token_N], self.position_T[token_N], self.valid_T[token_N]
        )

    def with_tokens(
        self, sample_R: torch.Tensor, position_R: torch.Tensor, valid_R: torch.Tensor
    ) -> "TokenContext":
        """Returns the context of R rows that came from anywhere in the micro-batch."""
        return dataclasses.replace(self, sample_T=sample_R, position_T=position_R, valid_T=valid_R)

    @property
    def num_balance_groups(self) -> int:
        """Returns the number of balance groups in the micro-batch over all ranks."""
        return self.num_samples // self.balance_loss_group_size

    @property
    def balance_group_T(self) -> torch.Tensor:
        """Returns each token's balance group, counted in the micro-batch over all ranks; int64."""
        return (self.sample_T - self.first_sample) // self.balance_loss_group_size

    @property
    def num_capacity_groups(self) -> int:
        """Returns the number of capacity groups in the micro-batch over all ranks."""
        return -(-self.num_samples // self.capacity_group_size)

    @property
    def capacity_group_T(self) -> torch.Tensor:
        """Returns each token's capacity group, counted in the micro-batch over all ranks; int64."""
        return (self.sample_T - self.first_sample) // self.capacity_group_size
