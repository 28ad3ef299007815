"""The optimizer on any layout: weight decay, the skipped step, LAMB."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Run, tiny, tiny_images
from torch import nn

from moe_dist.data.images.torchvision_import import import_torchvision
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.spawn import run_distributed


def state(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Zero weights (e, D, F), rows (e, D), columns (e, F), float64."""
    e, d, f = shape
    return tuple(torch.zeros(s, dtype=torch.float64) for s in ((e, d, f), (e, d), (e, f)))  # type: ignore[return-value]


@pytest.mark.timeout(200)
def test_only_matrices_decay_on_any_layout() -> None:
    """With zero gradients a matrix is multiplied by 1 - 1e-3 x 0.1 and a vector stays the
    same, bit by bit."""
    for rank in run_distributed(decay_alone, 2, timeout=150):
        for (zero, name), (kind, off) in rank.items():
            assert off == 0 if kind == "vector" else off < 1e-6, (zero, name, kind, off)
        for zero in (0, 1, 2, 3):
            kinds = [kind for (stage, _), (kind, _) in rank.items() if stage == zero]
            assert kinds.count("vector") > 20 and kinds.count("matrix") > 8


def decay_alone() -> dict[tuple[int, str], tuple[str, float]]:
    """Returns by ZeRO stage and name: "matrix" or "vector", and its distance from the expected
    value after a step."""
    meshes.init_process_group()
    told = {}
    sets = [
        "optim.weight_decay=0.1",
        "optim.lr=1e-3",
        "optim.warmup_steps=1",
        "batch.global_batch_size=16",
    ]
    for zero in (0, 1, 2, 3):
        run = Run(tiny_images(*sets, f"zero_stage={zero}", "mesh.ep=2"))
        state = {key: t.clone() for key, t in run.engine.dense_state()}
        for name in run.engine.names:  # vectors start at zero, which would not show that they decay
            state[name] += 0.5
        run.engine.load_dense_state(state, 0)
        for stack in run.optimizer.expert_params:
            stack.master.add_(0.5)
            stack.round_master()
        for p in (*run.engine.names.values(), *(stack.p for stack in run.optimizer.expert_params)):
            p.register_hook(torch.zeros_like)
        before = run.weights()
        after = run.steps(0, 1).weights()
        for name, w in before.items():
            vector = w.dim() == 1 or (w.dim() == 3 and w.shape[1] == 1)
            expected = w if vector else w * (1 - 1e-3 * 0.1)
            told[zero, name] = (
                "vector" if vector else "matrix",
                ((after[name] - expected) / w).abs().max().item(),
            )
    meshes.shutdown()
    return told


@pytest.mark.timeout(120)
def test_nonfinite_norm_skips_the_step(small_text: Path) -> None:
    for rank in run_distributed(poison, 2, str(small_text), timeout=100):
        assert rank == {
            (zero, place): True for zero in (0, 1, 2, 3) for place in ("expert", "dense")
        }


def poison(text: str) -> dict[tuple[int, str], bool]:
    """Sets a gradient on rank 1 to infinity before the third update; returns whether all
    weights stayed the same."""
    meshes.init_process_group()
    kept = {}
    for zero in (0, 1, 2, 3):
        for place in ("expert", "dense"):
            run = Run(tiny("mesh.ep=2", f"zero_stage={zero}", f"data.text={text}")).steps(0, 2)
            before, norm = run.weights(), run.norms[-1]
            hooked = (
                next(iter(run.model.experts.values()))
                if place == "expert"
                else run.engine.names["lstm1.weight_hh_l0"]
            )
            handle = (
                hooked.register_hook(lambda g: g * math.inf) if run.mesh.dp.index == 1 else None
            )
            run.steps(2, 3)
            if handle:
                handle.remove()
            after = run.weights()
            untouched = all(torch.equal(before[k], after[k]) for k in before) and not math.isfinite(
                run.norms[-1]
            )
            run.steps(3, 4)  # and it goes on
            kept[zero, place] = untouched and math.isfinite(norm) and math.isfinite(run.norms[-1])
    meshes.shutdown()
    return kept


LAMB = ["optim.lamb=true", "optim.weight_decay=0.1", "optim.expert_optimizer=adam", "optim.lr=1e-2"]


@pytest.mark.timeout(200)
def test_dense_trust_ratios_equal_lamb_on_any_layout(small_text: Path) -> None:
    """One rank takes timm's steps on the same gradients; two ranks at any stage take those of
    one."""
    (expected,) = run_distributed(beside_timm, 1, str(small_text), timeout=100)
    for rank in run_distributed(lamb_on_stages, 2, str(small_text), timeout=100):
        for zero, weights in rank.items():
            for name, w in weights.items():
                off = torch.linalg.vector_norm(w - expected[name]) / torch.linalg.vector_norm(
                    expected[name]
                )
                assert off < 1e-5, (zero, name, off)


def beside_timm(text: str) -> dict[str, torch.Tensor]:
    import_torchvision()
    from timm.optim import Lamb

    meshes.init_process_group()
    run = Run(tiny(*LAMB, f"data.text={text}", "zero_stage=0"))
    ours = run.optimizer.param_groups[0]["params"]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options: dict[str, Any] = dict(betas=(0.9, 0.999), eps=1e-8)
    matrices, vectors = ([p for p in theirs if (p.dim() > 1) == wide] for wide in (True, False))
    lamb = Lamb(matrices, lr=1e-2, max_grad_norm=None, weight_decay=0.1, **options)
    both = [lamb, torch.optim.Adam(vectors, lr=1e-2, **options)]  # no decay of vectors
    honest = torch.optim.AdamW.step

    def step(self: Any, closure: Any = None) -> None:
        if self is run.optimizer:
            for p, q in zip(ours, theirs, strict=True):
                q.grad = p.grad.clone()
            for optimizer in both:
                optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
                optimizer.step()
        honest(self)

    torch.optim.AdamW.step = step  # type: ignore[method-assign]
    run.steps(0, 4)
    for name, p, q in zip(run.engine.names, ours, theirs, strict=True):
        torch.testing.assert_close(
            p.detach(), q.detach(), rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    weights = run.weights()
    meshes.shutdown()
    return weights


def lamb_on_stages(text: str) -> dict[int, dict[str, torch.Tensor]]:
    meshes.init_process_group()
    told = {}
    for zero in (0, 1, 2, 3):
        told[zero] = (
            Run(tiny(*LAMB, f"data.text={text}", f"zero_stage={zero}", "mesh.ep=2"))
            .steps(0, 4)
            .weights()
        )
    meshes.shutdown()
    return told
