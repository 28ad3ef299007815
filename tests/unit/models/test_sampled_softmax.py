"""The sampled softmax against loops and against the whole one."""

import dataclasses
import math

import pytest
import torch

from moe_dist.models import sampled_softmax as softmax_module
from moe_dist.models.sampled_softmax import Softmax, draw_negatives, inclusion_probability
from moe_dist.nn.token_context import TokenContext

V, D, T = 30, 4, 7


def context(step: int = 0, train: bool = True, num_tokens: int = T) -> TokenContext:
    token_T = torch.arange(num_tokens)
    return TokenContext(
        token_T, token_T * 0, token_T != 3, 5, step, train, 0, num_tokens, num_tokens, 1
    )


def softmax(samples: int | None, vocabulary_size: int = V, dim: int = D) -> Softmax:
    layer, generator = (
        Softmax(dim, vocabulary_size, samples).double(),
        torch.Generator().manual_seed(1),
    )
    for p in layer.parameters():
        p.data.normal_(generator=generator)
    return layer


def tokens(dim: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x_TD = torch.randn(T, dim, generator=generator, dtype=torch.float64, requires_grad=True)
    return x_TD, torch.tensor([0, 29, 1, 5, 0, 17, 2])


def test_inclusion_probability_by_hand() -> None:
    # V = 3: q = ln 2 / ln 4, ln 1.5 / ln 4, ln (4/3) / ln 4 = 0.5, 0.29248, 0.20752, which add up
    # to 1 two draws: P = 1 - (1 - q)^2 = 0.75, 1 - 0.70752^2 = 0.49942, 1 - 0.79248^2 = 0.37198
    torch.testing.assert_close(
        inclusion_probability(3, 2),
        torch.tensor([0.75, 0.49942, 0.37198]).double(),
        rtol=0,
        atol=1e-5,
    )


def test_negatives_are_distinct_sorted_and_keyed_by_seed_and_step() -> None:
    word_N, weight_N = draw_negatives(1000, 50, seed=3, step=4)
    assert word_N.tolist() == sorted(set(word_N.tolist())) and set(word_N.tolist()) <= set(
        range(1000)
    )
    assert torch.equal(weight_N, 1 / inclusion_probability(1000, 50)[word_N])
    assert torch.equal(word_N, draw_negatives(1000, 50, 3, 4)[0])
    assert not torch.equal(word_N, draw_negatives(1000, 50, 3, 5)[0]) and not torch.equal(
        word_N, draw_negatives(1000, 50, 4, 4)[0]
    )


def test_negatives_are_drawn_with_their_inclusion_probability() -> None:
    draws, count_V = 4000, torch.zeros(20)
    for step in range(draws):
        count_V[draw_negatives(20, 8, 0, step)[0]] += 1
    p_V = inclusion_probability(20, 8)
    error_V = (p_V * (1 - p_V) / draws).sqrt()
    assert ((count_V / draws - p_V).abs() < 4 * error_V).all()


# V = 3, two draws: P = 0.75, 0.499417, 0.371973 (above). Logits are the biases ln 1, ln 2, ln 3, so
# that exp(s) = exp(l) / P is 1 / 0.75 = 1.333333, 2 / 0.499417 = 4.004668, 3 / 0.371973 = 8.065093.
@pytest.mark.parametrize(
    ("drawn", "target", "nll", "gradient_V"),
    [
        # word 2 is not drawn and a candidate all the same: of 1.333333 + 4.004668 + 8.065093 =
        # 13.403094
        # -ln(8.065093 / 13.403094) = 0.507941; the shares are 0.099480, 0.298787, 0.601733
        ([0, 1], 2, 0.507941, [0.099480, 0.298787, 0.601733 - 1]),
        # word 1 is drawn and counts once: -ln(4.004668 / 5.338001) = 0.287392; shares 0.249781,
        # 0.750219
        ([0, 1], 1, 0.287392, [0.249781, 0.750219 - 1, 0]),
        # -ln(8.065093 / 9.398426) = 0.152996; shares 0.141868, 0.858132
        ([0], 2, 0.152996, [0.141868, 0, 0.858132 - 1]),
        # the only candidate
        ([0], 0, 0.0, [0, 0, 0]),
    ],
)
def test_both_corrections_by_hand(
    drawn: list[int], target: int, nll: float, gradient_V: list[float]
) -> None:
    layer = Softmax(1, 3, 2).double()
    layer.w_VD.data.zero_()
    layer.b_V.data.copy_(torch.tensor([1.0, 2.0, 3.0]).log())
    step = next(step for step in range(100) if draw_negatives(3, 2, 5, step)[0].tolist() == drawn)
    got = layer(
        torch.zeros(1, 1, dtype=torch.float64), torch.tensor([target]), context(step, num_tokens=1)
    )
    assert got.item() == pytest.approx(nll, abs=2e-6)
    got.backward()
    assert layer.b_V.grad is not None
    assert layer.b_V.grad.to_dense().tolist() == pytest.approx(gradient_V, abs=2e-6)


@pytest.mark.parametrize(
    ("samples", "step", "tensorflows", "without_the_targets_correction"),
    [(12, 9, 29.812604786701037, 34.521634), (40, 2, 33.19680654157417, 35.112926)],
)
def test_sampled_loss_equals_tensorflow(
    samples: int, step: int, tensorflows: float, without_the_targets_correction: float
) -> None:
    """The constants are the sums over valid tokens of `tf.nn.sampled_softmax_loss` (TensorFlow
    2.21.0, float64) on the same weights, words and expected counts. The test also repeats its
    arithmetic on whole matrices."""
    x_TD, target_T = tokens()
    layer, expected_count_V = softmax(samples), inclusion_probability(V, samples)
    word_N, _ = draw_negatives(V, samples, 5, step)
    own_T = (x_TD * layer.w_VD[target_T]).sum(1) + layer.b_V[target_T]
    drawn_TN = x_TD @ layer.w_VD[word_N].t() + layer.b_V[word_N] - expected_count_V[word_N].log()
    drawn_TN = drawn_TN.masked_fill(word_N == target_T[:, None], -1e30)  # accidental hits
    valid_T = context().valid_T
    for own_correction_T, constant in (
        (expected_count_V[target_T].log(), tensorflows),
        (torch.zeros_like(own_T), without_the_targets_correction),
    ):
        logit_TN = torch.cat([(own_T - own_correction_T)[:, None], drawn_TN], 1)
        nll_T = torch.nn.functional.cross_entropy(
            logit_TN, torch.zeros_like(target_T), reduction="none"
        )
        assert nll_T[valid_T].sum().item() == pytest.approx(constant, rel=1e-7)
    assert layer(x_TD, target_T, context(step)).item() == pytest.approx(tensorflows, rel=1e-12)


def test_corrections_stay_in_float32_with_bf16_weights() -> None:
    """In bf16, log P of a rare word is off by up to 0.03. All logits are zero, which bf16 holds
    exactly.
    """
    size, samples, target_T = 500_000, 50, torch.tensor([0, 400_000, 123_456])
    layer = Softmax(2, size, samples).bfloat16()
    for p in layer.parameters():
        p.data.zero_()
    got = layer(torch.zeros(3, 2, dtype=torch.bfloat16), target_T, context(num_tokens=3))
    word_N, weight_N = draw_negatives(size, samples, 5, 0)
    expected = 0.0
    for target in target_T.tolist():
        own = 1 / inclusion_probability(size, samples)[target].item()
        others = weight_N[word_N != target].sum().item()
        expected -= math.log(own / (own + others))
    assert got.item() == pytest.approx(expected, rel=1e-6)


def distributions(
    num_contexts: int, vocabulary_size: int, dim: int
) -> tuple[torch.Tensor, Softmax]:
    """Returns contexts (C, D) and a layer that gives each a distribution over words, the first
    ones more likely."""
    generator = torch.Generator().manual_seed(0)
    x_CD = torch.randn(num_contexts, dim, generator=generator)
    true = Softmax(dim, vocabulary_size)
    true.w_VD.data.normal_(generator=generator)
    true.b_V.data = -0.9 * torch.arange(1.0, vocabulary_size + 1).log()
    return x_CD, true


def targets(cumulative_CV: torch.Tensor, each: int, generator: torch.Generator) -> torch.Tensor:
    """Returns `each` words of every context's distribution, context after context."""
    u_Cn = torch.rand(len(cumulative_CV), each, generator=generator, dtype=torch.float64)
    return torch.searchsorted(cumulative_CV, u_Cn).clamp(max=cumulative_CV.shape[1] - 1).flatten()


@pytest.mark.parametrize(("vocabulary_size", "samples"), [(300, 60), (1000, 30)])
def test_expected_gradient_is_zero_at_the_true_distribution(
    vocabulary_size: int, samples: int
) -> None:
    """Within four standard errors: the gradient of each context, and of the biases of words by
    falling frequency."""
    num_contexts, dim, each, steps = 4, 3, 50, 300
    x_CD, true = distributions(num_contexts, vocabulary_size, dim)
    cumulative_CV = true.log_probability(x_CD).detach().double().exp().cumsum(1)
    layer, generator = Softmax(dim, vocabulary_size, samples), torch.Generator().manual_seed(1)
    layer.load_state_dict(true.state_dict())
    x_TD = x_CD.repeat_interleave(each, 0).requires_grad_()
    edge = torch.tensor([0, 1, 3, 10, 30, 100, vocabulary_size])
    rows = []
    for step in range(steps):
        x_TD.grad = layer.b_V.grad = None
        target_T = targets(cumulative_CV, each, generator)
        ctx = dataclasses.replace(
            context(step, num_tokens=len(x_TD)), valid_T=torch.ones(len(x_TD), dtype=torch.bool)
        )
        layer(x_TD, target_T, ctx).backward()
        assert x_TD.grad is not None and layer.b_V.grad is not None
        up_to_V = torch.cat([torch.zeros(1), layer.b_V.grad.to_dense().cumsum(0)])
        rows.append(
            torch.cat(
                [x_TD.grad.view(num_contexts, each, dim).sum(1).flatten(), up_to_V[edge].diff()]
            )
        )
    told = torch.stack(rows).double()
    error = told.std(0) / steps**0.5
    assert (told.mean(0).abs() < 4 * error).all(), (told.mean(0) / error).tolist()


def test_sampled_loss_fits_known_distributions() -> None:
    """2,000 words; the exact cross-entropy learned with 200 draws a step, next to that of the
    full softmax."""
    num_contexts, dim, each, steps, lr = 8, 8, 16, 400, 0.02
    x_CD, true = distributions(num_contexts, 2000, dim)
    log_p_CV = true.log_probability(x_CD).detach().double()
    x_TD = x_CD.repeat_interleave(each, 0)
    told = {}
    for samples in (None, 200):
        layer, generator = Softmax(dim, 2000, samples), torch.Generator().manual_seed(1)
        for p in layer.parameters():
            p.data.zero_()
        adam = torch.optim.Adam(layer.parameters())
        for step in range(steps):
            adam.param_groups[0]["lr"] = lr * (1 - step / steps)
            target_T = targets(log_p_CV.exp().cumsum(1), each, generator)
            ctx = context(step, num_tokens=len(x_TD))
            (layer(x_TD, target_T, ctx) / len(x_TD)).backward()
            for p in layer.parameters():
                assert p.grad is not None
                p.grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
            adam.step()
            adam.zero_grad()
        told[samples] = (
            -(log_p_CV.exp() * layer.log_probability(x_CD).detach()).sum(1).mean().item()
        )
    entropy = -(log_p_CV.exp() * log_p_CV).sum(1).mean().item()
    assert entropy < told[None] < 1.05 * entropy
    assert told[200] < 1.03 * told[None], told


def test_gradients_converge_to_those_of_the_full_softmax() -> None:
    """Away from the true distribution the mean gradient differs from the full one: ten times
    the draws reduce the difference, and drawing every word removes it."""
    errors = []
    expected = gradients(softmax(None), 0)
    for samples in (10, 100, 10_000):
        steps = 1 if samples == 10_000 else 300
        each = [gradients(softmax(samples), step) for step in range(steps)]
        mean = [torch.stack(g).mean(0) for g in zip(*each, strict=True)]
        errors.append(
            [((m - e).norm() / e.norm()).item() for m, e in zip(mean, expected, strict=True)]
        )
    assert all(few > 2 * more for few, more in zip(errors[0], errors[1], strict=True))
    assert max(errors[2]) < 1e-12


def gradients(layer: Softmax, step: int) -> list[torch.Tensor]:
    """Returns the whole gradients of x, w and b."""
    x_TD, target_T = tokens()
    layer(x_TD, target_T, context(step)).backward()
    return [
        g.to_dense() if g.is_sparse else g for g in (x_TD.grad, layer.w_VD.grad, layer.b_V.grad)
    ]  # type: ignore[union-attr]


@pytest.mark.parametrize("per_chunk", [64, 3])
def test_sampled_loss_and_gradients_equal_loops(
    per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven tokens, in one chunk or in three."""
    monkeypatch.setattr(softmax_module, "TOKENS_PER_CHUNK", per_chunk)
    monkeypatch.setattr(softmax_module, "LOGITS_PER_CHUNK", 1)
    samples, step = 12, 9
    x_TD, target_T = tokens()
    layer = softmax(samples)
    nll = layer(x_TD, target_T, context(step))
    (3 * nll).backward()

    u_TD, w_VD, b_V = (t.detach().clone().requires_grad_() for t in (x_TD, layer.w_VD, layer.b_V))
    word_N, weight_N = draw_negatives(V, samples, 5, step)
    assert set(word_N.tolist()) & set(target_T.tolist()), "an accidental hit"
    expected = torch.zeros((), dtype=torch.float64)
    for t, target in enumerate(target_T.tolist()):
        if t != 3:  # padding
            own = (
                w_VD[target] @ u_TD[t]
                + b_V[target]
                - inclusion_probability(V, samples)[target].log()
            )
            z = own.exp()
            for word, weight in zip(word_N.tolist(), weight_N.tolist(), strict=True):
                if word != target:
                    z = z + weight * (w_VD[word] @ u_TD[t] + b_V[word]).exp()
            expected = expected - (own - z.log())
    (3 * expected).backward()
    torch.testing.assert_close(nll, expected, rtol=1e-12, atol=0)
    for got, want in ((x_TD, u_TD), (layer.w_VD, w_VD), (layer.b_V, b_V)):
        assert got.grad is not None and want.grad is not None
        grad = got.grad.to_dense() if got.grad.is_sparse else got.grad
        torch.testing.assert_close(grad, want.grad, rtol=1e-10, atol=1e-12)
    assert layer.w_VD.grad is not None and layer.w_VD.grad.is_sparse
    touched = set(word_N.tolist()) | set(target_T.tolist())
    assert set(layer.w_VD.grad.coalesce().indices()[0].tolist()) == touched


def test_evaluation_uses_the_full_softmax() -> None:
    x_TD, target_T = tokens()
    expected = softmax(None)(x_TD, target_T, context(train=False))
    torch.testing.assert_close(
        softmax(3)(x_TD, target_T, context(train=False)), expected, rtol=0, atol=0
    )
    log_p_T = softmax(3).log_probability(x_TD)[torch.arange(T), target_T]
    torch.testing.assert_close(-(log_p_T * context().valid_T).sum(), expected)
