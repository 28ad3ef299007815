"""Comparisons of tensors."""

import torch


def deviation(weights: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Returns the largest |difference| / |reference| over all tensors."""
    assert weights.keys() == reference.keys()
    return max(((weights[k] - r).norm() / r.norm()).item() for k, r in reference.items())


def close(actual: torch.Tensor, expected: list, atol: float = 1e-6) -> None:
    torch.testing.assert_close(
        actual.detach(), torch.tensor(expected, dtype=actual.dtype), atol=atol, rtol=0
    )
