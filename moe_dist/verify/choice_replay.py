"""Records one run's discrete choices and replays them in another run of the same steps.

Two layouts add the same numbers in a different order, so their results differ by rounding (about
1e-7). Almost everywhere the difference stays small. In two places it does not, because a real
number decides between two discrete outcomes:

  ranking    Top-k gating ranks experts by score. If two scores are equal up to rounding, a layout
             may rank them the other way, and the word then visits another expert.
  ReLU sign  If a hidden unit's input is zero up to rounding, one layout may have the unit on, with
             its whole gradient, and the other off, with no gradient.

A comparison between layouts would report such coincidences as faults. So the reference run records
its rankings and its ReLU masks, and each other layout uses the recorded ones in place of its own.
It still computes its own, counts the differences (`rank_flips`, `relu_sign_flips`), and keeps the
widest gap between the decisive numbers (`max_gap`). A real fault changes numbers by more than
rounding and causes a wide gap.

Entries are found by key, not by index, because each layout has its words on other ranks and in
another order. A key is one int64: (sample << BITS | position) << BITS | expert.

Legend: T tokens, E experts, K chosen experts, or k + 1 columns in score order; R rows, F hidden
units, B bytes with 8 units each, e this rank's experts.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_dist.distributed.mesh import Mesh
from moe_dist.models.lstm_lm import FeedForward
from moe_dist.moe.experts import GeluExperts, ReluMaskOverride
from moe_dist.moe.gating.noisy_topk import top_k_plus_one
from moe_dist.moe.hierarchical import ExpertGroups
from moe_dist.moe.layer import MoE
from moe_dist.nn.token_context import TokenContext

BITS = 21  # bits for a position, and for an expert, in a key
LayerCall = tuple[int, int, int]  # a TokenContext's step, layer_call, gate_level


@dataclass
class Recording:
    """A run's discrete choices, by step and layer call.

    Attributes:
        ranked: Keys (int64, one per token), ranked columns (tokens x (k + 1)), and k.
        relu_masks: Keys (int64, one per row), and hidden units as bits (rows x B, uint8, on CPU).
    """

    ranked: dict[LayerCall, tuple[torch.Tensor, torch.Tensor, int]] = field(default_factory=dict)
    relu_masks: dict[LayerCall, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class RecordedChoices:
    """Records the choices of a model's gates and ReLUs, or replays another run's choices.

    A ranking contains the k experts visited by a word, in score order, and the first expert not
    visited: the load loss (Eq. 9) compares each score with the k-th and the (k + 1)-th score, and
    sends gradients to those two experts.

    Attributes:
        replayed: The recording to replay; None for a run that records.
        recorded: This run's choices so far; empty in a replay.
        rank_flips: Words with another ranking in this run than in the recording.
        relu_sign_flips: Hidden units that are on in one run and off in the other.
        max_gap: The widest relative gap over all flips. For a ranking: the distance between two
            scores, divided by the word's largest score. For a ReLU: the distance between the unit's
            input and zero, divided by the row's largest input.
    """

    def __init__(self, replayed: Recording | None = None) -> None:
        """Starts a replay of `replayed`, or a recording if it is None."""
        self.replayed = replayed
        self.recorded = Recording()
        self.rank_flips = 0
        self.relu_sign_flips = 0
        self.max_gap = 0.0
        # keys of the rows with counted hidden units, so a recomputation does not count them twice
        self._counted_rows: dict[LayerCall, torch.Tensor] = {}

    def attach(self, model: nn.Module, mesh: Mesh) -> None:
        """Replaces the expert selection in a model's gates and the masks in its ReLUs.

        Args:
            model: The model, on the mesh.
            mesh: The mesh; it determines this rank's experts.
        """
        for module in model.modules():
            if isinstance(module, FeedForward):
                module.relu_mask_override = self._dense_relu_mask
            if isinstance(module, MoE):
                self._attach_to_layer(module, mesh)

    def _attach_to_layer(self, layer: MoE, mesh: Mesh) -> None:
        """Attaches to a layer's gate, to the gates inside groups, and to its experts."""
        first_expert = mesh.local_experts(layer.gate.num_experts).start
        layer.get_submodule("gate").select = self.select  # type: ignore[assignment]
        experts: Any = layer.experts
        if isinstance(experts, ExpertGroups):
            experts.select = self.select
            first_expert *= experts.experts_per_group
            experts = experts.experts
        if not isinstance(experts, GeluExperts):  # GELU is smooth: it has no sign to flip
            experts.needs_context = True
            experts.relu_mask_override = self._expert_relu_mask(first_expert)

    def select(
        self, score_TE: torch.Tensor, k: int, expert_E: torch.Tensor, ctx: TokenContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Selects experts like `top_k_plus_one`; a replay uses the recorded ranking instead.

        Args:
            score_TE: Scores.
            k: Experts per token.
            expert_E: The experts' global ids, int64, (E,) or (T, E).
            ctx: The tokens' context.

        Returns:
            The first k + 1 experts' scores and columns, both (T, k + 1).
        """
        top_TK, column_TK = top_k_plus_one(score_TE, k, expert_E, ctx)
        # in expert groups a word has one row per chosen group: the group's first expert makes the
        # rows' keys distinct
        key_T = _key(ctx, expert_E[..., 0].expand(len(score_TE)))
        layer_call = _layer_call(ctx)
        if self.replayed is None:
            self._record_ranking(layer_call, key_T, column_TK, k)
            return top_TK, column_TK
        keys, columns, _ = self.replayed.ranked[layer_call]
        recorded_TK = columns.to(key_T.device)[self._find(key_T, keys.to(key_T.device))]
        flipped_T = (recorded_TK != column_TK).any(1) & ctx.valid_T
        self.rank_flips += int(flipped_T.sum())
        replayed_TK = score_TE.gather(1, recorded_TK)
        # at each place in the ranking, the two orders' scores differ by no more than rounding
        distance_T = (top_TK - replayed_TK).abs().amax(1)
        self._widen(distance_T[flipped_T] / score_TE[flipped_T].abs().amax(1))
        return replayed_TK, recorded_TK

    def _record_ranking(
        self, layer_call: LayerCall, key_T: torch.Tensor, column_TK: torch.Tensor, k: int
    ) -> None:
        """Appends one micro-batch's rankings."""
        empty = (key_T[:0], column_TK[:0], k)
        keys, columns, _ = self.recorded.ranked.get(layer_call, empty)
        all_keys = torch.cat([keys, key_T])
        all_columns = torch.cat([columns, column_TK])
        self.recorded.ranked[layer_call] = (all_keys, all_columns, k)

    def relu_mask(
        self, h_RF: torch.Tensor, expert_R: torch.Tensor, ctx_R: TokenContext
    ) -> torch.Tensor:
        """Returns the mask of hidden units that are on: above zero, or as recorded in a replay.

        Args:
            h_RF: The hidden units' inputs.
            expert_R: Each row's expert as a global id, int64.
            ctx_R: The rows' context.

        Returns:
            The mask, (R, F), bool.
        """
        key_R = _key(ctx_R, expert_R)
        layer_call = _layer_call(ctx_R)
        on_RF = h_RF > 0
        counted = self._counted_rows.get(layer_call, key_R[:0])
        new_R = ~torch.isin(key_R, counted)  # False if backward computes the rows again
        self._counted_rows[layer_call] = torch.cat([counted, key_R[new_R]])
        if self.replayed is None:
            self._record_mask(layer_call, key_R[new_R], _pack(on_RF[new_R]))
            return on_RF
        keys, packed = self.replayed.relu_masks[layer_call]
        found_R = self._find(key_R, keys.to(key_R.device)).cpu()
        recorded_RF = _unpack(packed[found_R], on_RF)
        differs_RF = (recorded_RF != on_RF) & new_R[:, None]
        self.relu_sign_flips += int(differs_RF.sum())
        size_RF = h_RF.detach().abs()
        self._widen((size_RF / size_RF.amax(1, keepdim=True))[differs_RF])
        return recorded_RF

    def _record_mask(self, layer_call: LayerCall, key_R: torch.Tensor, on_RB: torch.Tensor) -> None:
        """Appends one micro-batch's packed masks."""
        empty = (key_R[:0], on_RB[:0])
        keys, packed = self.recorded.relu_masks.get(layer_call, empty)
        all_keys = torch.cat([keys, key_R])
        all_packed = torch.cat([packed, on_RB])
        self.recorded.relu_masks[layer_call] = (all_keys, all_packed)

    def _expert_relu_mask(self, first_expert: int) -> ReluMaskOverride:
        """Returns the override for this rank's experts; global ids start at `first_expert`."""

        def mask(h_RF: torch.Tensor, which: torch.Tensor, ctx_R: TokenContext) -> torch.Tensor:
            count_e = which
            expert_e = torch.arange(first_expert, first_expert + len(count_e), device=h_RF.device)
            return self.relu_mask(h_RF, expert_e.repeat_interleave(count_e), ctx_R)

        return mask

    def _dense_relu_mask(self, h_RF: torch.Tensor, which: int, ctx_R: TokenContext) -> torch.Tensor:
        """Masks dense network layer `which`; its keys contain the layer in place of an expert."""
        return self.relu_mask(h_RF, torch.full_like(ctx_R.sample_T, which), ctx_R)

    def _find(self, key_T: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Returns each key's index in `keys`, which are distinct.

        A key is missing if the recorded run did not have this word at this expert. Rounding cannot
        cause this: the gap becomes infinite, and another key's index is returned.
        """
        sorted_keys, order = keys.sort()
        index_T = torch.searchsorted(sorted_keys, key_T).clamp(max=len(keys) - 1)
        if not torch.equal(sorted_keys[index_T], key_T):
            self.max_gap = torch.inf
        return order[index_T]

    def _widen(self, gaps: torch.Tensor) -> None:
        """Raises `max_gap` to the widest gap; NaN counts as infinite."""
        self.max_gap = max([self.max_gap, *gaps.nan_to_num(torch.inf).tolist()])

    def innermost_calls(self) -> list[LayerCall]:
        """Returns the calls that chose experts, not expert groups."""
        last_level = {}
        for step, layer_call, gate_level in sorted(self.recorded.ranked):
            last_level[step, layer_call] = gate_level
        return [(step, call, gate_level) for (step, call), gate_level in last_level.items()]

    def visited_experts(self, layer_call: LayerCall) -> dict[int, set[int]]:
        """Returns the global ids of the experts visited by each word, by the word's key."""
        keys, columns, k = self.recorded.ranked[layer_call]
        experts: dict[int, set[int]] = {}
        for key, chosen in zip(keys.tolist(), columns[:, :k].tolist(), strict=True):
            first_expert = key % 2**BITS
            visited = experts.setdefault(key >> BITS, set())
            visited.update(first_expert + column for column in chosen)
        return experts


def _layer_call(ctx: TokenContext) -> LayerCall:
    """Returns a context's step and layer call."""
    return ctx.step, ctx.layer_call, ctx.gate_level


def _key(ctx: TokenContext, expert_T: torch.Tensor) -> torch.Tensor:
    """Returns the key for each word at its expert: (T,), int64."""
    return (((ctx.sample_T << BITS) + ctx.position_T) << BITS) + expert_T


def _pack(on_RF: torch.Tensor) -> torch.Tensor:
    """Packs eight units into a byte, on CPU: (R, F) bool -> (R, B) uint8.

    A recording of lstm_moe_demo has 40 million units.
    """
    return torch.from_numpy(np.packbits(on_RF.cpu().numpy(), axis=1))


def _unpack(on_RB: torch.Tensor, like_RF: torch.Tensor) -> torch.Tensor:
    """Inverts `_pack`; the result has the shape and the device of `like_RF`."""
    bits_RF = np.unpackbits(on_RB.numpy(), axis=1, count=like_RF.shape[1])
    return torch.from_numpy(bits_RF).bool().to(like_RF.device)
