"""What rounding may decide, recorded in one run and replayed in another: which experts a word visits, and which of
their hidden units are on.

Legend: T tokens, E experts, K chosen, or k + 1 columns in order of their scores; R rows, F hidden units, B bytes of 8
units each, e experts of this rank.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from moe_dist.distributed.mesh import Mesh
from moe_dist.models.lstm_lm import FeedForward
from moe_dist.moe.experts import GeluExperts, ReluMask
from moe_dist.moe.gating.noisy_topk import top_k_plus_one
from moe_dist.moe.hierarchical import ExpertGroups
from moe_dist.moe.layer import MoE
from moe_dist.nn.token_context import TokenContext

BITS = 21  # of a position, and of an expert, in a word's key
LayerCall = tuple[int, int, int]  # step, site, level


class RecordedChoices:
    """Which experts each word visits at each step and use of a layer, in order of their scores, and the first that it
    does not visit; and which hidden units of those experts are on. Recorded in one run, replayed in the others.

    The order counts, for the loads are measured against the last expert that wins and the first that does not (Eq. 9),
    and send gradients to those two. A unit that is zero to rounding adds nothing either way, but its gradient is whole
    or none.
    """

    def __init__(self, replayed: dict[str, Any] | None = None) -> None:
        """`replayed`: what the reference recorded; None records."""
        self.replayed = replayed
        self.ranked: dict[
            LayerCall, tuple[torch.Tensor, torch.Tensor, int]
        ] = {}  # keys, columns, k
        self.relu_masks: dict[
            LayerCall, tuple[torch.Tensor, torch.Tensor]
        ] = {}  # keys, hidden units in bits
        self.counted_rows: dict[
            LayerCall, torch.Tensor
        ] = {}  # keys of the rows whose hidden units were counted
        self.rank_flips = 0  # words ranked otherwise
        self.relu_sign_flips = 0  # hidden units on in one run and off in the other
        self.max_gap = (
            0.0  # between the scores of a flip, or from zero to such a unit, over their size
        )

    @property
    def recorded(self) -> dict[str, Any]:
        """To be replayed."""
        return {"ranked": self.ranked, "on": self.relu_masks}

    def attach(self, model: nn.Module, mesh: Mesh) -> None:
        """From now on all gates of the model pick here, and all hidden units are switched here."""
        for module in model.modules():
            if isinstance(module, FeedForward):
                module.relu_mask_override = self._of_layers
            if isinstance(module, MoE):
                first = mesh.local_experts(module.gate.num_experts).start
                experts: Any = module.experts
                module.get_submodule("gate").select = self.select  # type: ignore[assignment]
                if isinstance(experts, ExpertGroups):
                    experts.select = self.select
                    first *= experts.experts_per_group
                    experts = experts.experts
                if not isinstance(experts, GeluExperts):  # which have no sign to flip
                    experts.needs_context = True
                    experts.relu_mask_override = self._of_experts(first)

    def select(
        self, score_TE: torch.Tensor, k: int, expert_E: torch.Tensor, ctx: TokenContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `gating.topk.highest`, but the recorded experts win."""
        top_TK, column_TK = top_k_plus_one(score_TE, k, expert_E, ctx)
        # a word is there once for each group that it chose; the group's first expert tells them apart
        key_T = _key(ctx, expert_E[..., 0].expand(len(score_TE)))
        place = _place(ctx)
        if self.replayed is None:
            keys, columns, _ = self.ranked.get(place, (key_T[:0], column_TK[:0], k))
            self.ranked[place] = torch.cat([keys, key_T]), torch.cat([columns, column_TK]), k
            return top_TK, column_TK
        keys, columns, _ = self.replayed["ranked"][place]
        recorded_TK = columns.to(key_T.device)[self._find(key_T, keys.to(key_T.device))]
        flipped_T = (recorded_TK != column_TK).any(1) & ctx.valid_T
        self.rank_flips += int(flipped_T.sum())
        replayed_TK = score_TE.gather(1, recorded_TK)
        # a rank's score under the recorded order falls short of the rank's own by no more than rounding
        self._widen(
            (top_TK - replayed_TK).abs().amax(1)[flipped_T] / score_TE[flipped_T].abs().amax(1)
        )
        return replayed_TK, recorded_TK

    def relu_mask(
        self, h_RF: torch.Tensor, expert_R: torch.Tensor, ctx_R: TokenContext
    ) -> torch.Tensor:
        """Those above zero, or those that are recorded as on. `expert_R`: global ids."""
        key_R, place, on_RF = _key(ctx_R, expert_R), _place(ctx_R), h_RF > 0
        told = self.counted_rows.get(place, key_R[:0])
        new_R = ~torch.isin(key_R, told)  # not so where backward computes the rows again
        self.counted_rows[place] = torch.cat([told, key_R[new_R]])
        if self.replayed is None:
            new_RB = _pack(on_RF[new_R])
            keys, on = self.relu_masks.get(place, (key_R[:0], new_RB[:0]))
            self.relu_masks[place] = torch.cat([keys, key_R[new_R]]), torch.cat([on, new_RB])
            return on_RF
        keys, on = self.replayed["on"][place]
        recorded_RF = _unpack(on[self._find(key_R, keys.to(key_R.device)).cpu()], on_RF)
        differs_RF = (recorded_RF != on_RF) & new_R[:, None]
        self.relu_sign_flips += int(differs_RF.sum())
        size_RF = h_RF.detach().abs()
        self._widen((size_RF / size_RF.amax(1, keepdim=True))[differs_RF])
        return recorded_RF

    def _of_experts(self, first: int) -> ReluMask:
        """Of experts from global id `first` on."""

        def on(h_RF: torch.Tensor, which: torch.Tensor, ctx_R: TokenContext) -> torch.Tensor:
            expert_e = torch.arange(first, first + len(which), device=h_RF.device)
            return self.relu_mask(h_RF, expert_e.repeat_interleave(which), ctx_R)

        return on

    def _of_layers(self, h_RF: torch.Tensor, which: int, ctx_R: TokenContext) -> torch.Tensor:
        """Of a dense network, which every word visits: its layers take the place of experts."""
        return self.relu_mask(h_RF, torch.full_like(ctx_R.sample_T, which), ctx_R)

    def _find(self, key_T: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Where each of `key_T` is in `keys`, which hold it once. A word that never was at that expert is no rounding:
        its gap is infinite, and it takes what another recorded."""
        ordered, order = keys.sort()
        at_T = torch.searchsorted(ordered, key_T).clamp(max=len(keys) - 1)
        if not torch.equal(ordered[at_T], key_T):
            self.max_gap = torch.inf
        return order[at_T]

    def _widen(self, gaps: torch.Tensor) -> None:
        self.max_gap = max([self.max_gap, *gaps.nan_to_num(torch.inf).tolist()])

    def places(self) -> list[LayerCall]:
        """Where experts were chosen, not groups of them: the innermost level of each use of a layer."""
        level = {(step, site): level for step, site, level in sorted(self.ranked)}
        return [(step, site, level) for (step, site), level in level.items()]

    def visited_experts(self, place: LayerCall) -> dict[int, set[int]]:
        """The experts of each word there."""
        keys, columns, k = self.ranked[place]
        experts: dict[int, set[int]] = {}
        for key, chosen in zip(keys.tolist(), columns[:, :k].tolist(), strict=True):
            experts.setdefault(key >> BITS, set()).update(
                (key % 2**BITS) + column for column in chosen
            )
        return experts


def _place(ctx: TokenContext) -> LayerCall:
    return ctx.step, ctx.layer_call, ctx.gate_level


def _key(ctx: TokenContext, expert_T: torch.Tensor) -> torch.Tensor:
    """Of a word at an expert: int64."""
    return (((ctx.sample_T << BITS) + ctx.position_T) << BITS) + expert_T


def _pack(on_RF: torch.Tensor) -> torch.Tensor:
    """Eight to a byte, on CPU: (R, F) -> (R, B). A recorded run of the demo has 40 million units."""
    return torch.from_numpy(np.packbits(on_RF.cpu().numpy(), axis=1))


def _unpack(on_RB: torch.Tensor, like_RF: torch.Tensor) -> torch.Tensor:
    """Inverse of `_pack`, of the shape and on the device of `like_RF`."""
    return (
        torch.from_numpy(np.unpackbits(on_RB.numpy(), axis=1, count=like_RF.shape[1]))
        .bool()
        .to(like_RF.device)
    )
