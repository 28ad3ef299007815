"""Experts with several replicas: each is updated by one owner. And the update within backward,
against the usual one."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from runs import Run, tiny

from moe_dist.config.overrides import override
from moe_dist.config.schema import OptimConfig
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.collectives import all_reduce_sum
from moe_dist.distributed.spawn import run_distributed
from moe_dist.moe.experts import Experts
from moe_dist.moe.routing import build_routing
from moe_dist.nn.init import init_bounds, init_parameter
from moe_dist.nn.token_context import TokenContext
from moe_dist.optim.expert_state import ShardedExpertParam
from moe_dist.optim.optimizer import Optimizer, ReducedGradient

UNEVEN = [
    "model.moe.num_experts=6"
]  # on four ranks at ep 1 the owners have 2, 2, 2 and none; at ep 2 two and one
PREVIOUS = ["optim.clip_norm_source=previous"]
FREE = [*PREVIOUS, "optim.fuse_expert_update_in_backward=true"]


ALONE: Any = meshes.Axis(1, 0, None)  # type: ignore[arg-type]  # says nothing to anyone


@pytest.mark.timeout(300)
def test_sharded_update_equals_replicated_update(small_text: Path, tmp_path: Path) -> None:
    """Four ranks with uneven and empty parts. The slow reference sums gradients over all
    replicas by hand and updates the whole stack. A checkpoint resumes bit by bit, also on
    another layout."""
    by_rank = run_distributed(own, 4, str(small_text), tmp_path, timeout=280)
    for told in by_rank:
        for case, each in told.items():
            assert all(each["same"].values()), (case, each["same"])
        # two matrices of six experts of 16 x 24 float32: gradients go to owners and weights come
        # back, each from 3 of 4
        assert told["factored 1"]["sent"] == dict.fromkeys(
            ("gradients", "weights"), 2 * 6 * 16 * 24 * 4 * 3 // 4
        )
    assert [told["factored 1"]["owned"] for told in by_rank] == [2, 2, 2, 0]
    assert [told["adam 2"]["owned"] for told in by_rank] == [2, 2, 1, 1]


def own(text: str, folder: Path) -> dict[str, Any]:
    meshes.init_process_group()
    told = {}
    for form, ep, ds in (("factored", 1, "fp32"), ("adam", 2, "bf16")):
        sets = [
            f"mesh.ep={ep}",
            f"ds_config={ds}",
            f"data.text={text}",
            f"optim.expert_optimizer={FORM[form]}",
        ]
        config = tiny(*UNEVEN, *sets)
        run = Run(config).steps(0, 1)
        sent = {
            key.direction: num_bytes
            for key, num_bytes in run.mesh.expert_dp.bytes_sent.items()
            if key.place == "experts"
        }
        waiting = step_by_hand(run)
        run.steps(1, 2)
        states = run.optimizer.experts.items()
        same = {name: close(state.whole_master(), waiting[name]) for name, state in states}
        same |= {
            f"{name} rounded": torch.equal(s.p, s.whole_master().to(s.p.dtype))
            for name, s in states
        }
        run.save(folder / form, 2)
        again = Run(config)
        again.load(folder / form)
        moved = Run(override(config, [f"mesh.ep={2 // ep}"]))
        moved.load(folder / form)
        run.steps(2, 4), again.steps(2, 4), moved.steps(2, 4)
        expected, got, elsewhere = run.weights(), again.weights(), moved.weights()
        same |= {f"{k} after resume": torch.equal(expected[k], got[k]) for k in expected}
        same |= {f"{k} moved": close(elsewhere[k], expected[k]) for k in expected if ds == "fp32"}
        owned = [len(state.master) for _, state in states]
        told[f"{form} {ep}"] = {"same": same, "sent": sent, "owned": owned[0]}
    meshes.shutdown()
    return told


FORM = {"factored": "factored_adam", "adam": "adam"}


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).norm() <= 1e-5 * expected.norm())


def step_by_hand(run: Run) -> dict[str, torch.Tensor]:
    """Returns the masters after the next step if each replica updates the whole stack. The
    next step fills them in, because it provides the clip factor."""
    expected: dict[str, torch.Tensor] = {}
    optimizer = run.optimizer
    reduce_honestly = Optimizer._reduce_and_square

    def reduce(self: Optimizer, state: ShardedExpertParam) -> ReducedGradient:
        whole = all_reduce_sum(state.local_gradient().clone(), run.mesh.expert_dp)
        name = next((n for n, s in optimizer.experts.items() if s is state), None)
        reduced = reduce_honestly(self, state)
        if name:
            expected[name] = whole
        return reduced

    def update(
        self: Optimizer, state: ShardedExpertParam, gradient: ReducedGradient, factor: float
    ) -> None:
        name = next((n for n, s in optimizer.experts.items() if s is state), None)
        if name:
            reference = type(state)(torch.nn.Parameter(state.whole_master()), ALONE)  # type: ignore[arg-type]
            before = state.tensors(optimizer.updates)
            for ending, t in reference.tensors(optimizer.updates).items():
                whole = t.new_zeros(t.shape)
                whole[state.owned] = before[ending]
                t.copy_(all_reduce_sum(whole, run.mesh.expert_dp))
            reference.p.grad = expected[name]
            whole = reference.reduce()
            _, statistics = reference.square(whole)
            scale, lr = factor / run.mesh.dp.size, optimizer.param_groups[0]["lr"]
            step = optimizer.updates + 1
            reference.update(whole, statistics, scale, lr, step, optimizer.config)
            expected[name] = reference.master
        update_honestly(self, state, gradient, factor)

    update_honestly = Optimizer._update
    optimizer._reduce_and_square = reduce.__get__(optimizer)  # type: ignore[method-assign]
    optimizer._update = update.__get__(optimizer)  # type: ignore[method-assign]
    return expected


# freed within backward


@pytest.mark.timeout(300)
def test_fused_update_in_backward_equals_separate_update(small_text: Path) -> None:
    """On two ranks at ep 1 and 2. A step that cannot be skipped is an error on both."""
    for told in run_distributed(free, 2, str(small_text), timeout=280):
        for case, same in told.pop("same").items():
            assert all(same.values()), (case, same)
        assert len(told["said"]) == 5
        for text in told["said"].values():
            assert (
                text.startswith("after 2 updates the gradient is not finite") and "--resume" in text
            )


CASES = [
    (1, "factored_adam", "fp32"),
    (1, "factored_adam_t2t", "bf16"),
    (2, "factored_adam", "bf16"),
    (2, "adam", "fp32"),
    (1, "adam", "fp32"),
]


def free(text: str) -> dict[str, Any]:
    meshes.init_process_group()
    told = {}
    for ep, form, ds in CASES:
        more = HIERARCHICAL if form == "factored_adam_t2t" else []
        sets = [
            f"mesh.ep={ep}",
            f"data.text={text}",
            f"optim.expert_optimizer={form}",
            f"ds_config={ds}",
            *more,
        ]
        now, later = Run(tiny(*sets, *FREE)), Run(tiny(*sets, *PREVIOUS))
        alive: list[bool] = []
        for p in now.model.experts.values():
            p.register_post_accumulate_grad_hook(
                lambda p, alive=alive: alive.append(p.grad is not None)
            )
        now.steps(0, 4), later.steps(0, 4)
        expected, got = later.weights(), now.weights()
        told[ep, form] = {
            "norms": now.norms == later.norms,
            "losses": now.losses == later.losses,
            "weights": all(torch.equal(got[k], w) for k, w in expected.items()),
            "freed": alive == [False] * 4 * len(now.model.experts),
            "clipped by the norm before": now.optimizer.previous_norm == now.norms[-1] > 0.3,
        }
    said = spoil(text)
    meshes.shutdown()
    return {"same": told, "said": said}


def spoil(text: str) -> dict[tuple[int, str], str]:
    """Returns the error of every rank for an infinite gradient on rank 1 in the third step."""
    said = {}
    for zero, place in ((0, "dense"), (0, "expert"), (1, "expert"), (2, "expert"), (3, "dense")):
        run = Run(tiny("mesh.ep=2", f"zero_stage={zero}", f"data.text={text}", *FREE)).steps(0, 2)
        expert = next(iter(run.model.experts.values()))
        hooked = expert if place == "expert" else run.engine.names["lstm1.weight_hh_l0"]
        if run.mesh.dp.index == 1:
            hooked.register_hook(lambda g: g * math.inf)
        with pytest.raises(FloatingPointError) as error:
            run.steps(2, 3)
        said[zero, place] = str(error.value)
    return said


HIERARCHICAL = ["model.moe.num_experts=16", "model.moe.num_groups=4"]


@pytest.mark.timeout(220)
def test_fused_update_peaks_at_four_bytes_per_parameter() -> None:
    """Four layers of experts, 144 MB each: at the peak their weights, and one layer's gradient."""
    done = subprocess.run(
        [sys.executable, __file__, "optim.fuse_expert_update_in_backward=true"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    parameters, peak = map(int, done.stdout.split()[-2:])
    assert parameters == 4 * 2 * 18 * 10**6
    assert peak <= 4.1 * parameters + 4 * parameters / 4, (
        f"{peak / parameters:.2f} bytes a parameter"
    )


def measure(sets: list[str]) -> None:
    """Prints the number of expert parameters, and the peak memory of two steps above the
    memory before. One-time memory, such as compiled loops and libraries, is allocated before."""
    import psutil

    torch.set_num_threads(1)
    mesh, process = meshes.init_distributed(ep=1), psutil.Process()
    config = override(tiny(), ["optim.clip_norm_source=previous", *sets]).optim
    two_steps(1, mesh, config)
    before = process.memory_info().rss
    number = two_steps(150, mesh, config)
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    print(number, peak - before)
    meshes.shutdown()


def two_steps(num_experts: int, mesh: meshes.Mesh, config: OptimConfig) -> int:
    """Trains four layers of experts of 400 x 300 for two steps. Returns the number of
    parameters."""
    from torch import nn

    with torch.device("meta"):
        layers = [Experts(num_experts, 400, 300) for _ in range(4)]
    stacks: dict[str, nn.Parameter] = {}
    for i, layer in enumerate(layers):
        bounds = init_bounds(layer)
        layer.to_empty(device="cpu")
        for name, p in layer.named_parameters():
            init_parameter(p, name, bounds[name], i, range(num_experts))
            stacks[f"{i}.{name}"] = p
    optimizer = Optimizer([nn.Parameter(torch.ones(1))], stacks, {}, {}, config, mesh, zero_stage=0)
    token_T = torch.arange(64)
    ctx = TokenContext(token_T, token_T, token_T >= 0, 0, 0, True, 0, 64, 64, 1)
    expert_T1 = (token_T % num_experts)[:, None]
    for _ in range(2):
        optimizer.start_step(1e-3)
        y_TD = torch.ones(64, 400).requires_grad_()
        for layer in layers:
            y_TD = layer(
                y_TD, build_routing(expert_T1, torch.ones(64, 1), expert_T1 >= 0, num_experts), ctx
            )[0]
        y_TD.sum().backward()
        optimizer.step()
    return sum(p.numel() for p in stacks.values())


if __name__ == "__main__":
    measure(sys.argv[1:])
