"""Permute and unpermute against loops; each is the gradient of the other."""

import pytest
import torch

from moe_dist.moe.permutation import TokenPermutation

TOKEN_N = torch.tensor(
    [3, 0, 3, 1, 3, 0]
)  # of 5 tokens: three copies of 3, two of 0, none of 2 and 4


def test_permute_and_unpermute_by_hand() -> None:
    copies = TokenPermutation(TOKEN_N, 5)
    x_TD = torch.arange(5.0)[:, None].expand(5, 2).clone().requires_grad_()
    y_ND = copies.permute(x_TD)
    assert y_ND[:, 0].tolist() == [3, 0, 3, 1, 3, 0]
    y_ND.backward(torch.arange(12.0).view(6, 2))  # first column 0, 2, 4, 6, 8, 10
    assert x_TD.grad is not None and x_TD.grad[:, 0].tolist() == [2 + 10, 6, 0, 0 + 4 + 8, 0]
    y_ND = torch.arange(12.0).view(6, 2).requires_grad_()
    z_TD = copies.unpermute(y_ND)
    assert z_TD[:, 0].tolist() == [12, 6, 0, 12, 0]
    z_TD.backward(torch.arange(10.0).view(5, 2))  # first column 0, 2, 4, 6, 8
    assert y_ND.grad is not None and y_ND.grad[:, 0].tolist() == [6, 0, 6, 2, 6, 0]


@pytest.mark.parametrize("num_tokens, num_copies", [(0, 0), (4, 0), (4, 9)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_permute_any_number_of_rows(num_tokens: int, num_copies: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    token_N = torch.randint(max(num_tokens, 1), (num_copies,), generator=generator)
    y_ND = torch.randn(num_copies, 3, generator=generator).to(dtype)
    expected = torch.zeros(num_tokens, 3, dtype=torch.promote_types(dtype, torch.float32))
    for n, token in enumerate(token_N.tolist()):
        expected[token] += y_ND[n]
    # in the same order, and in bf16 rounded once at the end, half of a unit either way
    actual = TokenPermutation(token_N, num_tokens).unpermute(y_ND)
    assert actual.dtype == dtype
    assert ((actual - expected).abs() <= (expected.to(dtype) - expected).abs()).all()
