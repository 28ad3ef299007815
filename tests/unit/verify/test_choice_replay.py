"""Choices within rounding are counted, and the recorded ones are taken."""

import dataclasses
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from moe_dist.models.lstm_lm import FeedForward
from moe_dist.moe.experts import Experts
from moe_dist.moe.gating.noisy_topk import NoisyTopK
from moe_dist.moe.layer import MoE
from moe_dist.moe.routing import Routing
from moe_dist.nn.token_context import TokenContext
from moe_dist.verify.choice_replay import RecordedChoices


def test_rank_flip_within_rounding_is_counted_and_the_recording_wins() -> None:
    word_T = torch.arange(3)
    ctx = TokenContext(word_T, word_T * 0, word_T >= 0, 0, 0, True, 0, 3, 3, 1)
    recorder = RecordedChoices()
    recorder.select(
        torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 1.0 + 4e-6, 0.0]]),
        1,
        torch.arange(3),
        ctx,
    )
    replayer = RecordedChoices(recorder.recorded)
    # word 2 ranks experts 0 and 1 the other way, 4e-6 of its largest score apart; words lie
    # elsewhere on this layout
    after = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0 + 4e-6, 1.0, 0.0]])
    order = torch.tensor([2, 0, 1])
    top, column = replayer.select(after[order], 1, torch.arange(3), ctx.select(order))
    assert column.tolist() == [[1, 0], [2, 1], [0, 1]]
    torch.testing.assert_close(top[0], torch.tensor([1.0, 1.0 + 4e-6]), rtol=0, atol=0)
    assert replayer.rank_flips == 1 and 3e-6 < replayer.max_gap < 5e-6
    # word 0 ranks them 3, 2, 1 where 1, 2, 3 is recorded: its first is 2 / 3 of the largest score
    # off
    replayer.select(
        torch.tensor([[3.0, 2.0, 1.0]]), 1, torch.arange(3), ctx.select(torch.tensor([0]))
    )
    assert replayer.rank_flips == 2 and replayer.max_gap == pytest.approx(2 / 3)
    # a word that the recorded run did not have there
    elsewhere = dataclasses.replace(ctx.select(torch.tensor([0])), position_T=torch.tensor([7]))
    replayer.select(torch.tensor([[1.0, 2.0, 3.0]]), 1, torch.arange(3), elsewhere)
    assert replayer.max_gap == torch.inf


def hidden(
    experts: Experts, choices: RecordedChoices, x_RD: list[list[float]], ctx_R: TokenContext
) -> tuple[Any, Any]:
    """Returns the sum of each row's active hidden units, and the mask from the gradient. All
    rows are expert 7's, the second of a rank whose first is 6."""
    choices.attach(MoE(NoisyTopK(3, 2, 1), experts), Mock(local_experts=lambda n: range(6, 6 + n)))
    x = torch.tensor(x_RD, requires_grad=True)
    y_R = experts(
        x, Routing(torch.arange(len(x)), torch.ones(len(x)), torch.tensor([0, len(x)])), ctx_R
    )[0][:, 0]
    y_R.sum().backward()
    assert x.grad is not None
    return y_R.tolist(), x.grad.tolist()


@pytest.mark.parametrize("recompute", [False, True])
def test_sign_flip_within_rounding_is_counted_once_and_the_recording_wins(recompute: bool) -> None:
    experts = Experts(2, 3, 3, recompute)
    with torch.no_grad():
        experts.w1_eDF.copy_(torch.eye(3).expand(2, 3, 3))  # hidden units are the row itself
        experts.w2_eFD.fill_(1.0)
    word_T = torch.arange(2)
    ctx = TokenContext(word_T, word_T * 0, word_T >= 0, 0, 0, True, 0, 2, 2, 1)
    recorder = RecordedChoices()
    sums, on = hidden(experts, recorder, [[1.0, 0.0, -2.0], [2.0, 4e-6, -1.0]], ctx)
    assert sums == pytest.approx([1, 2 + 4e-6]) and on == [[1, 0, 0], [1, 1, 0]]
    (keys, _), *others = recorder.recorded.relu_masks.values()
    assert keys.tolist() == [7, (1 << 42) + 7] and not others
    # word 1's second unit is off here, 2e-6 of the row's largest from zero; words lie elsewhere on
    # this layout
    replayer = RecordedChoices(recorder.recorded)
    sums, on = hidden(
        experts, replayer, [[2.0, -4e-6, -1.0], [1.0, 0.0, -2.0]], ctx.select(torch.tensor([1, 0]))
    )
    assert sums == pytest.approx([2 - 4e-6, 1]) and on == [[1, 1, 0], [1, 0, 0]]
    assert replayer.relu_sign_flips == 1 and replayer.max_gap == pytest.approx(2e-6)
    # word 0's first unit was on and is off, a quarter of the row's largest from zero
    replayer = RecordedChoices(recorder.recorded)
    sums, on = hidden(experts, replayer, [[-0.5, 0.0, -2.0]], ctx.select(torch.tensor([0])))
    assert sums == [-0.5] and on == [[1, 0, 0]]
    assert replayer.relu_sign_flips == 1 and replayer.max_gap == 0.25


def test_signs_of_a_dense_network_are_replayed_layer_by_layer() -> None:
    network = FeedForward(2, 2, num_layers=2)
    with torch.no_grad():
        for w in (network.w1_DF, *network.inner_FF):
            w.copy_(torch.eye(2))
        network.w2_FD.fill_(1.0)
    ctx = TokenContext(
        torch.tensor([5]), torch.tensor([0]), torch.tensor([True]), 0, 0, True, 0, 8, 8, 1
    )
    recorder = RecordedChoices()
    recorder.attach(network, Mock())
    assert network(torch.tensor([[2.0, 4e-6]]), ctx)[0][0, 0].item() == pytest.approx(2 + 4e-6)
    replayer = RecordedChoices(recorder.recorded)
    replayer.attach(network, Mock())
    # the second unit of either layer was on
    assert network(torch.tensor([[2.0, -4e-6]]), ctx)[0][0, 0].item() == pytest.approx(2 - 4e-6)
    assert replayer.relu_sign_flips == 2 and replayer.max_gap == pytest.approx(2e-6)
