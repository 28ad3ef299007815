"""Adam of rows: each row is updated in the steps that touch it."""

from typing import Any

import pytest
import torch
from torch import nn

from moe_dist.config.schema import OptimConfig
from moe_dist.distributed.labels import CommLabel
from moe_dist.optim.row_sparse_adam import RowSparseAdam

# rows


class Alone:
    """An axis of one rank, without a process group."""

    size, index, group = 1, 0, None

    def __init__(self) -> None:
        self.sent: dict[Any, int] = {CommLabel("table", "rows"): 0}

    def record_ring_bytes(self, label: Any, num_bytes: int) -> None:
        self.sent[label] += num_bytes


def test_each_row_has_its_own_adam_and_untouched_rows_wait() -> None:
    config, generator = (
        OptimConfig(beta1=0.8, beta2=0.9, eps=1e-3),
        torch.Generator().manual_seed(0),
    )
    start_VD = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    w_VD, b_V = nn.Parameter(start_VD.clone()), nn.Parameter(start_VD[:, 0].clone())
    rows = RowSparseAdam("table", {"table.w": w_VD, "table.b": b_V}, Alone())  # type: ignore[arg-type]
    reference = [nn.Parameter(row.clone()) for row in start_VD]
    adams = [torch.optim.Adam([row], betas=(0.8, 0.9), eps=1e-3) for row in reference]
    for step, touched in enumerate(([0, 2, 2], [2, 5], [0, 1], [5], [2, 0])):
        id_N = torch.tensor(touched)
        g_ND = torch.randn(len(id_N), 3, generator=generator, dtype=torch.float64)
        rows.clear()
        (nn.functional.embedding(id_N, w_VD, sparse=True) * g_ND).sum().backward()
        (torch.gather(b_V, 0, id_N, sparse_grad=True) * g_ND[:, 0]).sum().backward()
        gradients = rows.reduce()
        g_VD = torch.zeros(6, 3, dtype=torch.float64).index_add(0, id_N, g_ND)
        # the norm of this step: of the matrix and of the vector, whose gradient is the matrix's
        # first column
        assert rows.square(gradients).item() == pytest.approx(
            (g_VD**2).sum().item() + (g_VD[:, 0] ** 2).sum().item()
        )
        rows.update(gradients, 0.5, lr=0.1 * (step + 1), config=config)
        for i in set(touched):
            adams[i].param_groups[0]["lr"] = 0.1 * (step + 1)
            reference[i].grad = 0.5 * g_VD[i]
            adams[i].step()
    torch.testing.assert_close(w_VD.data, torch.stack(list(reference)).data)
    torch.testing.assert_close(b_V.data, w_VD.data[:, 0])
    assert torch.equal(w_VD.data[3:5], start_VD[3:5]), "rows 3 and 4 were never touched"
    assert rows.updates_V.tolist() == [3, 1, 3, 0, 0, 2]
    assert (
        rows.exp_avg["table.w"][3:5].count_nonzero()
        == rows.exp_avg_sq["table.w"][3:5].count_nonzero()
        == 0
    )
