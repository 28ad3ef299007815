"""The Triton kernels of the experts against a loop over assignments, output and every gradient: in
Triton's interpreter without a GPU, compiled for Hopper without running, and on a GPU (make gpu).

Each runs in a process of its own: Triton is told when it is imported that it is to interpret.

Legend: T tokens, N assignments, D width, F hidden units, e experts.
"""

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from moe_dist.distributed.spawn import run_distributed
from moe_dist.moe.delayed_wgrad import GradFn
from moe_dist.moe.experts import Experts
from moe_dist.moe.kernels import triton_ffn
from moe_dist.moe.kernels.triton_ffn import TILES, TILES_FLOAT32, Tiles, feedforward, tile
from moe_dist.moe.permutation import TokenPermutation
from moe_dist.moe.routing import Routing
from moe_dist.nn import prng

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

Told = dict[str, torch.Tensor]
NAMES = ("x", "gate", "w1", "w2")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# of a norm. bf16 rounds what is stored by 2^-9 at most, where the interpreter cuts off 2^-8; fp16
# by 2^-12
ERROR = {"fp32": 2e-6, "bf16": 1.2e-2, "fp16": 1e-3}
SMALL = Tiles(tile(16, 32, 32, 2, 4), tile(16, 16, 16, 2, 4), tile(32, 16, 16, 2, 4))
# tokens, and how many assignments each expert has: more and less than a tile's rows, exactly so
# many, none
CASES = {
    "ragged": (37, [19, 0, 16, 1, 33, 0]),
    "one expert": (20, [20]),
    "all to one of many": (18, [0, 0, 18, 0]),
    "empty at both ends": (5, [0, 3, 0]),
}


def drawn(*shape: int, key: str) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float64).normal_(
        generator=prng.generator("test_kernels_gpu", key)
    )


def leaves(
    case: str, dim: int, hidden: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns tokens, gates and weights, with two gates zero or below; the tokens of the
    assignments, and counts. Some tokens have no assignment, some one in each expert."""
    num_tokens, count_e = CASES[case]
    token_N = [
        drawn(num_tokens, key=f"{case} {i}").argsort()[:n].sort().values
        for i, n in enumerate(count_e)
    ]
    gate_N = drawn(sum(count_e), key="gate").abs().float()
    gate_N[0], gate_N[-1] = 0, -0.5
    weights = [
        drawn(len(count_e), *shape, key="w") / shape[0] ** 0.5
        for shape in ((dim, hidden), (hidden, dim))
    ]
    leaf = [drawn(num_tokens, dim, key="x").to(dtype), gate_N, *(w.to(dtype) for w in weights)]
    return leaf, [torch.cat(token_N), torch.tensor(count_e)]


def told(y_TD: torch.Tensor, leaf: list[torch.Tensor]) -> Told:
    y_TD.backward(drawn(*y_TD.shape, key="dy").bfloat16().to(y_TD))
    grads = {name: p.grad for name, p in zip(NAMES, leaf, strict=True) if p.grad is not None}
    return {"y": y_TD.detach()} | grads


def expected(case: str, dim: int, hidden: int, dtype: torch.dtype) -> Told:
    """Computes a loop over assignments, in float64."""
    leaf, (token_N, count_e) = leaves(case, dim, hidden, dtype)
    x_TD, gate_N, w1_eDF, w2_eFD = leaf = [t.double().requires_grad_() for t in leaf]
    expert_N = torch.arange(len(count_e)).repeat_interleave(count_e)
    x_D, w1_DF, w2_FD = x_TD.unbind(), w1_eDF.unbind(), w2_eFD.unbind()
    y_D = [torch.zeros(dim, dtype=torch.float64) for _ in x_D]
    for t, i, gate in zip(token_N, expert_N, gate_N, strict=True):
        y_D[t] = y_D[t] + gate * (torch.relu(x_D[t] @ w1_DF[i]) @ w2_FD[i])
    return told(torch.stack(y_D), leaf)


def ours(
    case: str, dim: int, hidden: int, dtype: torch.dtype, device: str = "cpu", **options: Any
) -> Told:
    leaf, (token_N, count_e) = leaves(case, dim, hidden, dtype)
    x_TD, gate_N, w1_eDF, w2_eFD = leaf = [t.to(device).requires_grad_() for t in leaf]
    copies = TokenPermutation(token_N.to(device), len(x_TD))
    return told(
        feedforward(x_TD, copies, gate_N, count_e.to(device), w1_eDF, w2_eFD, **options), leaf
    )


def assert_close(actual: Told, right: Told, dtype: str, case: str) -> None:
    assert actual.keys() == right.keys()
    for name, wanted in right.items():
        assert actual[name].dtype == (torch.float32 if name == "gate" else DTYPES[dtype])
        error = (actual[name].double().cpu() - wanted).norm() / wanted.norm()
        assert error < ERROR[dtype], f"{case}, {name}: {error:.1e}"


def interpret() -> None:
    """Switches Triton to its interpreter; must run before Triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """NumPy has no bfloat16, and the interpreter's would multiply its bits as integers."""
        a, b = (self.cast_impl(t, float32) if t.dtype.scalar == bfloat16 else t for t in (a, b))
        return dot(self, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot


def every_case(dtype: str) -> None:
    interpret()
    for case, (_, count_e) in CASES.items():
        args = case, 40, 24, DTYPES[dtype]  # no multiples of the tiles' sizes
        actual = ours(*args, tiles=SMALL)
        assert_close(actual, expected(*args), dtype, case)
        for i, count in enumerate(count_e):
            assert actual["w1"][i].any() == actual["w2"][i].any() == (count > 0), (
                f"{case}: weights of expert {i}"
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_equal_a_loop(dtype: str) -> None:
    run_distributed(every_case, 1, dtype)


def with_options() -> None:
    interpret()
    args = "ragged", 16, 48, torch.bfloat16
    plain, kept, forms = ours(*args, tiles=SMALL), [], dict[int, GradFn]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        recomputed = ours(*args, tiles=SMALL, recompute=True, defer=forms.__setitem__)
    assert recomputed.keys() == plain.keys() - {"w1", "w2"}, (
        "gradients that are put off are not returned"
    )
    recomputed |= {"w1": forms[0](torch.full_like(plain["w1"], torch.nan)), "w2": forms[1](None)}
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain), "the same bits"
    assert (sum(CASES["ragged"][1]), 48) not in kept, "no hidden units"


def test_recompute_and_delayed_wgrad_options() -> None:
    run_distributed(with_options, 1)


def compiled(cache: Path) -> None:
    """Compiles the kernels of a step for a device of compute capability 9."""
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Hopper:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    run, kernels = JITFunction.run, list[Any]()
    driver.set_active(Hopper())  # type: ignore[arg-type]
    JITFunction.run = lambda *args, warmup, **kwargs: kernels.append(
        run(*args, warmup=True, **kwargs)
    )
    for dtype, tiles in [*(("bf16", tiles) for tiles in TILES.values()), ("fp32", TILES_FLOAT32)]:
        kernels.clear()
        ours("ragged", 64, 128, DTYPES[dtype], tiles=tiles)
        assert len(kernels) == 6
        for kernel in kernels:
            about = f"{kernel.name}, {dtype}, {tiles}"
            assert kernel.metadata.shared <= 227 * 1024, about
            assert "cp.async.bulk.tensor" in kernel.asm["ptx"], about  # TMA
            # 64 rows are what the tensor cores of a group of four warps take
            wide = dtype == "bf16" and (
                tiles.rows["ROWS"] >= 64 or kernel.name == "weight_gradients"
            )
            assert ("wgmma.mma_async" in kernel.asm["ptx"]) == wide, about
            cubin = cache / "cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
            usage = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
            assert " STACK:0 " in usage, f"{about}: registers spill"


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    run_distributed(compiled, 1, tmp_path)


def of_experts(
    triton: bool, device: str, dtype: torch.dtype, recompute: bool, pieces: list[int]
) -> Told:
    """`chunks`: how many experts are in each; none: all at once."""
    (x_TD, gate_N, *weights), (token_N, count_e) = (
        [t.to(device) for t in ts] for ts in leaves("ragged", 48, 80, dtype)
    )
    experts = Experts(len(count_e), 48, 80, recompute)
    experts.w1_eDF, experts.w2_eFD = (torch.nn.Parameter(w) for w in weights)
    experts.use_triton = triton
    leaf, ctx = (
        [x_TD.requires_grad_(), gate_N.requires_grad_(), *experts.parameters()],
        cast(Any, None),
    )
    if not pieces:
        return told(experts(x_TD, Routing(token_N, gate_N, count_e), ctx)[0], leaf)
    by_piece = count_e.split(pieces)
    rows = [int(c.sum()) for c in by_piece]
    routings = [
        Routing(*of) for of in zip(token_N.split(rows), gate_N.split(rows), by_piece, strict=True)
    ]
    outputs = [
        part(x_TD, routing, ctx)[0]
        for part, routing in zip(experts.split_experts(pieces), routings, strict=True)
    ]
    return told(sum(outputs, torch.zeros_like(x_TD)), leaf)


def experts_with_and_without(device: str, dtype: str) -> None:
    for recompute in (False, True):
        for pieces in ([], [2, 4], [1, 1, 4]):  # expert 1, alone in a piece, has no rows
            off, on = (
                of_experts(triton, device, DTYPES[dtype], recompute, pieces)
                for triton in (False, True)
            )
            assert_close(
                on,
                {name: t.double().cpu() for name, t in off.items()},
                dtype,
                f"{recompute}, {pieces}",
            )
            assert not torch.equal(on["y"], off["y"]), "the same bits would be the same path"


def interpreted_experts() -> None:
    interpret()
    triton_ffn.supported = lambda num_rows, *_: num_rows > 0
    experts_with_and_without("cpu", "bf16")


def test_triton_experts_equal_other_experts() -> None:
    run_distributed(interpreted_experts, 1)


def skip_unless_hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernels' tiles are for a Hopper GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [4, 20, 60])
def test_kernels_on_a_gpu_equal_a_loop_and_repeat(
    mean: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tiles for each size: there are 11 / 7 of `mean` assignments to an expert."""
    skip_unless_hopper()
    monkeypatch.setitem(CASES, "large", (5 * mean, [mean, 0, 4 * mean, 1, 5 * mean, mean - 1, 0]))
    args = "large", 144, 272, DTYPES[dtype]
    actual, again = (ours(*args, device="cuda") for _ in range(2))
    assert_close(actual, expected(*args), dtype, "large")
    assert all(torch.equal(actual[name], again[name]) for name in actual)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_triton_experts_on_a_gpu_equal_other_experts(dtype: str) -> None:
    skip_unless_hopper()
    experts_with_and_without("cuda", dtype)
