"""What may be known of a token beside its value. It travels with the token's rows, whichever rank they go to."""

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenContext:
    """T tokens of one micro-batch. Samples are counted globally, so nothing here depends on the layout."""

    sample_T: torch.Tensor  # int64, global index within the step's batch (a language model's lane)
    position_T: torch.Tensor  # int64, position within the sample
    valid_T: torch.Tensor  # bool, False for padding
    seed: int
    step: int  # optimizer steps before this one
    train: bool
    first_sample: int  # of the micro-batch over all ranks
    num_samples: int  # of the micro-batch over all ranks
    balance_loss_group_size: int
    capacity_group_size: int
    layer_call: int = 0  # which use of a layer in the model
    gate_level: int = 0  # 0: gates of the model; 1: gates inside a group of experts

    def at_layer(self, layer_call: int) -> "TokenContext":
        """The same tokens at another use of a layer."""
        return dataclasses.replace(self, layer_call=layer_call)

    def select(self, token_N: torch.Tensor) -> "TokenContext":
        """The context of N rows that are copies of tokens `token_N` (int64 indices)."""
        return self.with_tokens(
            self.sample_T[token_N], self.position_T[token_N], self.valid_T[token_N]
        )

    def with_tokens(
        self, sample_R: torch.Tensor, position_R: torch.Tensor, valid_R: torch.Tensor
    ) -> "TokenContext":
        """The context of R rows that came from anywhere in the micro-batch."""
        return dataclasses.replace(self, sample_T=sample_R, position_T=position_R, valid_T=valid_R)

    @property
    def num_balance_groups(self) -> int:
        """In the micro-batch over all ranks."""
        return self.num_samples // self.balance_loss_group_size

    @property
    def balance_group_T(self) -> torch.Tensor:
        return (self.sample_T - self.first_sample) // self.balance_loss_group_size

    @property
    def num_capacity_groups(self) -> int:
        """In the micro-batch over all ranks."""
        return -(-self.num_samples // self.capacity_group_size)

    @property
    def capacity_group_T(self) -> torch.Tensor:
        return (self.sample_T - self.first_sample) // self.capacity_group_size
