"""Routing recorded in one run and replayed in another, so that rounding may not send a word to another expert.

Legend: T tokens, E experts, K chosen, or k + 1 columns in order of their scores.
"""

import torch
from torch import nn

from moe_dist.context import Context
from moe_dist.gating.topk import highest
from moe_dist.hierarchical import Groups
from moe_dist.layer import MoE

BITS = 21  # of a position, and of an expert, in a word's key
Place = tuple[int, int, int]  # step, site, level


class Choices:
    """Which experts each word visits at each step and use of a layer, in order of their scores, and the first that it
    does not visit: recorded in one run, replayed in the others.

    The order counts, for the loads are measured against the last expert that wins and the first that does not (Eq. 9),
    and send gradients to those two.
    """

    def __init__(self, recorded: dict | None = None) -> None:
        """`recorded`: of the reference, by place; None records."""
        self.replayed = recorded
        self.recorded: dict[Place, tuple[torch.Tensor, torch.Tensor, int]] = {}
        self.flips = 0
        self.widest_gap = 0.0  # between the scores of a flip, over their size

    def watch(self, model: nn.Module) -> None:
        """From now on all gates of the model pick here."""
        for layer in (module for module in model.modules() if isinstance(module, MoE)):
            layer.gate.pick = self.pick
            if isinstance(layer.experts, Groups):
                layer.experts.pick = self.pick

    def pick(
        self, score_TE: torch.Tensor, k: int, expert_E: torch.Tensor, ctx: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `gating.topk.highest`, but the recorded experts win."""
        top_TK, column_TK = highest(score_TE, k, expert_E, ctx)
        # a word is there once for each group that it chose; the group's first expert tells them apart
        first = expert_E[..., 0].expand(len(score_TE))
        key_T = (((ctx.sample_T << BITS) + ctx.position_T) << BITS) + first
        place = (ctx.step, ctx.site, ctx.level)
        if self.replayed is None:
            keys, columns, _ = self.recorded.get(place, (key_T[:0], column_TK[:0], k))
            self.recorded[place] = torch.cat([keys, key_T]), torch.cat([columns, column_TK]), k
            return top_TK, column_TK
        keys, columns, _ = self.replayed[place]
        recorded_TK = columns.to(key_T.device)[_find(key_T, keys.to(key_T.device))]
        flipped_T = (recorded_TK != column_TK).any(1) & ctx.valid_T
        self.flips += int(flipped_T.sum())
        replayed_TK = score_TE.gather(1, recorded_TK)
        # a rank's score under the recorded order falls short of the rank's own by no more than rounding
        gap_T = (top_TK - replayed_TK).abs().amax(1)[flipped_T] / score_TE[flipped_T].abs().amax(1)
        self.widest_gap = max([self.widest_gap, *gap_T.nan_to_num(torch.inf).tolist()])
        return replayed_TK, recorded_TK

    def places(self) -> list[Place]:
        """Where experts were chosen, not groups of them: the innermost level of each use of a layer."""
        level = {(step, site): level for step, site, level in sorted(self.recorded)}
        return [(step, site, level) for (step, site), level in level.items()]

    def visits(self, place: Place) -> dict[int, set[int]]:
        """The experts of each word there."""
        keys, columns, k = self.recorded[place]
        experts: dict[int, set[int]] = {}
        for key, chosen in zip(keys.tolist(), columns[:, :k].tolist(), strict=True):
            experts.setdefault(key >> BITS, set()).update((key % 2**BITS) + column for column in chosen)
        return experts


def _find(key_T: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Where each of `key_T` is in `keys`, which hold it once."""
    ordered, order = keys.sort()
    return order[torch.searchsorted(ordered, key_T)]
