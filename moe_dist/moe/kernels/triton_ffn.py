"""Experts on a GPU: products that gather the rows of tokens while they load them, so that no sorted copy is made.
`gpu_kernels` has the kernels, written in Triton; here are their graph and the tiles that they work in:

    forward   h_NF = relu(x[token] @ w1)    y_ND = gate (h_NF @ w2)     y_TD = sums of y_ND by token
    backward  dh = dy[token] @ w2ᵀ, never stored: dgate_N = <dh, h>     dz_NF = gate dh [h > 0]
              dx_ND = dz_NF @ w1ᵀ           dx_TD = sums of dx_ND by token
              dw2 = (gate h)ᵀ @ dy[token]   dw1 = x[token]ᵀ @ dz_NF

Kept for backward are the tokens, which live anyway, and h_NF. It is kept without its gate: gates may be 0, where <dh,
gate h> / gate says nothing of dgate; they may be negative, where the sign of gate h is not that of h; and in float16
small ones would take digits away. So the gate comes in float32 where a product is about to be rounded anyway.

Legend: T tokens, N assignments sorted by expert, M tiles of consecutive ones of one expert, D width, F hidden units,
K what a product sums over, L rows and C columns of its result, S columns of tiles, e experts.
"""

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moe_dist.moe.delayed_wgrad import DeferGrad
from moe_dist.moe.permutation import TokenPermutation, unpermute_rows

Tile = dict[str, int]


def tile(rows: int, columns: int, step: int, stages: int, warps: int) -> Tile:
    """Of a result; how much is added up at a time, and how many of those are on their way; by how many warps."""
    return {
        "ROWS": rows,
        "COLUMNS": columns,
        "STEP": step,
        "num_stages": stages,
        "num_warps": warps,
    }


@dataclass(frozen=True)
class Tiles:
    """For each kind of product. `rows` and `hidden` have equally many rows."""

    rows: Tile  # rows times an expert's matrix
    hidden: Tile  # gradients of hidden units: narrower, for three such tiles are in registers at its end
    weights: Tile  # gradients of weights: a row waits for its token's number, so stages hold half of the tiles


# from this mean number of assignments to an expert on. For Hopper: they fit its shared memory and no register spills,
# both of which are tested; that none is faster is not
TILES = {
    64: Tiles(tile(128, 256, 64, 4, 8), tile(128, 128, 64, 4, 8), tile(128, 256, 64, 7, 8)),
    24: Tiles(tile(64, 128, 64, 4, 4), tile(64, 128, 64, 4, 4), tile(128, 256, 64, 7, 8)),
    0: Tiles(tile(16, 256, 128, 3, 4), tile(16, 128, 128, 3, 4), tile(128, 256, 32, 7, 8)),
}
TILES_FLOAT32 = Tiles(
    tile(64, 64, 16, 4, 8), tile(64, 64, 16, 4, 8), tile(64, 64, 32, 5, 4)
)  # no tensor cores


def feedforward(
    x_TD: torch.Tensor,
    copies: TokenPermutation,
    gate_N: torch.Tensor,
    count_e: torch.Tensor,
    w1_eDF: torch.Tensor,
    w2_eFD: torch.Tensor,
    recompute: bool = False,
    defer: DeferGrad | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """y_t = sum over the copies n of token t of gate_n * relu(x_t @ w1[i]) @ w2[i]: (T, D). Copies lie sorted by
    expert, count_e[i] of them for expert i, and there is at least one.

    Tokens and weights are of one dtype, bfloat16, float16 or float32, gates of any. Products add up in float32 and are
    rounded once. Equal inputs give equal bits. `recompute`: hidden units are not kept; `defer` takes what forms the
    gradients of w1 and w2, which then come later; `tiles` in place of those for this size. Where `supported` says no,
    it may fail.

    Rows gathered in the load and no sorted copies: ScatterMoE (Tan et al. 2024, arXiv 2403.08245). The gradient of
    gates from hidden units in place of outputs, and sums by token in place of scattered stores: SonicMoE (Guo et al.
    2025, arXiv 2512.14080).
    """
    if tiles is None:
        mean = len(copies.token_N) / len(count_e)
        tiles = (
            TILES_FLOAT32
            if x_TD.dtype == torch.float32
            else next(t for n, t in TILES.items() if mean >= n)
        )
    work = _Work.listed(copies.token_N, count_e, tiles)
    return _Feedforward.apply(x_TD, gate_N, w1_eDF, w2_eFD, copies, work, recompute, defer)


def supported(
    num_rows: int, x_TD: torch.Tensor, w1_eDF: torch.Tensor, w2_eFD: torch.Tensor
) -> bool:
    """Whether `feedforward` may be used: Triton is there (it wants a C compiler as well, and says so) and the device is
    of compute capability 9 (Hopper), for whose shared memory the tiles are made; one dtype; widths that descriptors and
    wide loads allow."""
    return (
        x_TD.is_cuda
        and num_rows > 0
        and torch.cuda.get_device_capability(x_TD.device)[0] == 9
        and x_TD.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and x_TD.dtype == w1_eDF.dtype == w2_eFD.dtype
        and all(size % 16 == 0 for size in w1_eDF.shape[1:])
        and w1_eDF.is_contiguous()
        and w2_eFD.is_contiguous()
        and _has_triton()
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class _Feedforward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        gate_N: torch.Tensor,
        w1_eDF: torch.Tensor,
        w2_eFD: torch.Tensor,
        copies: TokenPermutation,
        work: "_Work",
        recompute: bool,
        defer: DeferGrad | None,
    ) -> torch.Tensor:
        x_TD, gate_N = x_TD.contiguous(), gate_N.contiguous()
        h_NF = work.times(x_TD, w1_eDF, gathered=True, relu=True)
        ctx.copies, ctx.work, ctx.defer = copies, work, defer
        ctx.save_for_backward(x_TD, gate_N, w1_eDF, w2_eFD, *([] if recompute else [h_NF]))
        return unpermute_rows(work.times(h_NF, w2_eFD, gate_N=gate_N), copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple:
        x_TD, gate_N, w1_eDF, w2_eFD, *kept = ctx.saved_tensors
        work, dy_TD = ctx.work, dy_TD.contiguous()
        h_NF = kept[0] if kept else work.times(x_TD, w1_eDF, gathered=True, relu=True)
        dz_NF, weighted_NF, dgate_N = work.hidden_gradients(dy_TD, w2_eFD, gate_N, h_NF)
        dx_TD = unpermute_rows(work.times(dz_NF, w1_eDF, transposed=True), ctx.copies)

        def of_w1(out_eDF: torch.Tensor | None = None) -> torch.Tensor:
            out_eDF = torch.empty_like(w1_eDF) if out_eDF is None else out_eDF
            return work.weights_gradient(x_TD, dz_NF, out_eDF, left_is_gathered=True)

        def of_w2(out_eFD: torch.Tensor | None = None) -> torch.Tensor:
            out_eFD = torch.empty_like(w2_eFD) if out_eFD is None else out_eFD
            return work.weights_gradient(weighted_NF, dy_TD, out_eFD, left_is_gathered=False)

        if ctx.defer is not None:
            ctx.defer(0, of_w1)
            ctx.defer(1, of_w2)
            return dx_TD, dgate_N, *[None] * 6
        return dx_TD, dgate_N, of_w1(), of_w2(), *[None] * 4


@dataclass(frozen=True)
class _Work:
    """Products over the assignments, whose list of tiles is made where they are: nothing waits for the device."""

    token_N: torch.Tensor
    count_e: torch.Tensor
    end_e: torch.Tensor
    tile_M3: torch.Tensor  # int32: expert, first assignment, where the expert's end
    tiles: Tiles

    @classmethod
    def listed(cls, token_N: torch.Tensor, count_e: torch.Tensor, tiles: Tiles) -> "_Work":
        """As many tiles as there may be at most; those left over begin where their expert's assignments end, or
        after."""
        rows = tiles.rows["ROWS"]
        number_e = (count_e + rows - 1) // rows
        end_e, last_e = count_e.cumsum(0), number_e.cumsum(0)
        m_M = torch.arange(len(token_N) // rows + len(count_e), device=token_N.device)
        i_M = torch.searchsorted(last_e, m_M, right=True).clamp(max=len(count_e) - 1)
        first_M = (end_e - count_e)[i_M] + rows * (m_M - (last_e - number_e)[i_M])
        return cls(token_N, count_e, end_e, torch.stack([i_M, first_M, end_e[i_M]], 1).int(), tiles)

    def times(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        gate_N: torch.Tensor | None = None,
        gathered: bool = False,
        relu: bool = False,
        transposed: bool = False,
    ) -> torch.Tensor:
        """Of tokens (`gathered`) or rows (N, K), by w (e, K, C), `transposed` (e, C, K): (N, C)."""
        from moe_dist.moe.kernels.triton_kernels import times_matrix

        t, (k, c) = self.tiles.rows, (w.shape[:0:-1] if transposed else w.shape[1:])
        rows = (x, self.token_N) if gathered else (_in_order(x, t["ROWS"], t["STEP"]), None)
        matrix = _in_order(
            w, 1, *((t["COLUMNS"], t["STEP"]) if transposed else (t["STEP"], t["COLUMNS"]))
        )
        out_NC = x.new_empty(len(self.token_N), c)
        grid = -(-c // t["COLUMNS"]), len(self.tile_M3)
        times_matrix[grid](
            *rows, matrix, gate_N, out_NC, self.tile_M3, k, c, RELU=relu, TRANSPOSED=transposed, **t
        )
        return out_NC

    def hidden_gradients(
        self, dy_TD: torch.Tensor, w2_eFD: torch.Tensor, gate_N: torch.Tensor, h_NF: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dz_NF, gate h (N, F), dgate_N."""
        from moe_dist.moe.kernels.triton_kernels import hidden_gradients

        t, (f, d) = self.tiles.hidden, w2_eFD.shape[1:]
        grid = -(-f // t["COLUMNS"]), len(self.tile_M3)
        dz_NF, weighted_NF = torch.empty_like(h_NF), torch.empty_like(h_NF)
        dgate_NS = h_NF.new_empty(len(h_NF), grid[0], dtype=torch.float32)
        matrix, hidden = (
            _in_order(w2_eFD, 1, t["COLUMNS"], t["STEP"]),
            _in_order(h_NF, t["ROWS"], t["COLUMNS"]),
        )
        results = dz_NF, weighted_NF, dgate_NS
        hidden_gradients[grid](
            dy_TD, self.token_N, matrix, gate_N, hidden, *results, self.tile_M3, d, f, **t
        )
        return dz_NF, weighted_NF, dgate_NS.sum(1).to(gate_N.dtype)

    def weights_gradient(
        self, left: torch.Tensor, right: torch.Tensor, out_eLC: torch.Tensor, left_is_gathered: bool
    ) -> torch.Tensor:
        """`out_eLC`, filled. Tokens on one side, rows in order on the other."""
        from moe_dist.moe.kernels.triton_kernels import of_weights

        t, (e, n, c) = self.tiles.weights, out_eLC.shape
        if left_is_gathered:
            right = _in_order(right, t["STEP"], t["COLUMNS"])
        else:
            left = _in_order(left, t["STEP"], t["ROWS"])
        grid = -(-c // t["COLUMNS"]), -(-n // t["ROWS"]), e
        sides = left, right, self.token_N, out_eLC
        of_weights[grid](
            *sides, self.count_e, self.end_e, n, c, LEFT_IS_GATHERED=left_is_gathered, **t
        )
        return out_eLC


def _in_order(t: torch.Tensor, *block: int) -> Any:
    """A descriptor, through which blocks of that size are loaded."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(t, list(block))
