"""Sampling of words, and how contexts are shown."""

import math

import torch

from moe_dist.data.text.lanes import EOS, UNK_ID
from moe_dist.inference import generate
from moe_dist.inference.generate import context, draw
from moe_dist.nn import prng


def test_sampling_follows_the_probabilities() -> None:
    p = [0.3, 0.05, 0.25, 0.2, 0.15, 0.05]  # of which <unk>, word 0, is never drawn
    log_p_V = torch.tensor(p).log()
    u_N = prng.uniform(20_000, 3, "draws").tolist()
    for temperature, top in ((1.0, 5), (0.5, 5), (2.0, 3)):
        drawn = [draw(log_p_V, u, temperature, top) for u in u_N]
        weight = {
            i: p[i] ** (1 / temperature) for i in sorted(range(1, 6), key=lambda i: -p[i])[:top]
        }
        assert set(drawn) <= weight.keys() and UNK_ID not in drawn
        for i, w in weight.items():
            q = w / sum(weight.values())
            sigma = math.sqrt(q * (1 - q) / len(drawn))
            assert abs(drawn.count(i) / len(drawn) - q) < 4 * sigma, (temperature, top, i)
    assert {draw(log_p_V, u, 1e-6, 5) for u in (0.0, 0.5, 1 - 2**-53)} == {2}, "cold, the likeliest"


def test_context_is_cut_on_both_sides_and_aligned() -> None:
    words = [
        EOS,
        "He",
        "said",
        ",",
        "(",
        "go",
        ")",
        ";",
        EOS,
        "and",
        *["far"] * 50,
        "incomprehensibilities",
        ".",
    ]
    lines = [context(words, position) for position in range(len(words))]
    assert {line.index(" [") for line in lines} == {generate.SIDE}
    assert lines[3].strip() == "/ He said [,] (go); / and far far far far fa…"
    assert lines[8].strip() == "/ He said, (go); [/] and far far far far far far fa…"
    assert lines[-2].strip() == "…far far far far far far far far [incomprehensi…]."
    assert max(map(len, lines)) <= 2 * generate.SIDE + generate.WORD + 3
