"""Tests for a CUDA device (make gpu): its fast path and its random bits equal those of the CPU."""

from pathlib import Path

import pytest
import torch
from runs import Run, tiny

from moe_dist.distributed import mesh as meshes
from moe_dist.moe.experts import grouped_matmul
from moe_dist.moe.kernels.grouped_mm import has_grouped_mm
from moe_dist.monitoring.step_timer import StepTimer
from moe_dist.nn import token_noise
from moe_dist.nn.token_context import TokenContext

pytestmark = pytest.mark.gpu


def test_native_grouped_matmul_equals_portable() -> None:
    generator = torch.Generator().manual_seed(0)
    x_RD, w_eDF = (
        torch.randn(*s, generator=generator, dtype=torch.bfloat16)
        for s in ((300, 64), (5, 64, 128))
    )
    dy_RF = torch.randn(300, 128, generator=generator, dtype=torch.bfloat16)
    count_e = torch.tensor([100, 0, 7, 193, 0])
    results = []
    for device in ("cpu", "cuda"):
        x, w = x_RD.to(device).requires_grad_(), w_eDF.to(device).requires_grad_()
        assert has_grouped_mm(x, w) == (device == "cuda")
        y = grouped_matmul(x, w, count_e.to(device))
        y.backward(dy_RF.to(device))
        assert x.grad is not None and w.grad is not None
        results.append([t.float().cpu() for t in (y.detach(), x.grad, w.grad)])
    for cpu, cuda in zip(*results, strict=True):
        assert (cuda - cpu).norm() / cpu.norm() < 0.005  # bf16's rounding, 2^-8 of each element
    assert results[1][2][1].count_nonzero() == 0, "an expert without rows has a zero gradient"


def test_zero_rows_give_zero_gradients() -> None:
    x_RD = torch.zeros(0, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    w_eDF = torch.ones(5, 64, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    y_RF = grouped_matmul(x_RD, w_eDF, torch.zeros(5, dtype=torch.int64, device="cuda"))
    y_RF.sum().backward()
    assert y_RF.shape == (0, 128)
    assert w_eDF.grad is not None and w_eDF.grad.count_nonzero() == 0


def test_noise_bits_on_cuda_equal_cpu() -> None:
    def normal(device: str) -> torch.Tensor:
        sample_T = torch.arange(50, device=device)
        ctx = TokenContext(
            sample_T, sample_T % 7, sample_T >= 0, 3, 5, True, 0, 50, 50, 1, layer_call=2
        )
        return token_noise.token_normal(
            ctx, "gate", torch.arange(33, device=device), torch.float64
        ).cpu()

    torch.testing.assert_close(normal("cuda"), normal("cpu"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ds", ["fp32", "bf16"])
def test_steps_agree_on_every_zero_stage(ds: str, small_text: Path) -> None:
    if not torch.distributed.is_initialized():
        meshes.init_process_group()
    norms = [
        Run(tiny(f"ds_config={ds}", f"zero_stage={z}", f"data.text={small_text}")).steps(0, 5).norms
        for z in range(4)
    ]
    for other in norms[1:]:
        assert other == pytest.approx(norms[0], rel=1e-5 if ds == "fp32" else 0.02)


def test_step_timer_measures_stream_time() -> None:
    """20 products of 2 x 4096³ operations take time on any device, even if Python has already
    returned."""
    clock, x = StepTimer(torch.device("cuda")), torch.ones(4096, 4096, device="cuda")
    for _ in range(2):  # the first one loads kernels
        clock.read_and_reset()
        with clock.step(), clock.range("experts"):
            for _ in range(20):
                x @ x
    seconds = clock.read_and_reset()
    assert (
        seconds["experts"] > 20 * 2 * 4096**3 / 2e15 and seconds["rest"] < seconds["experts"] / 10
    )
