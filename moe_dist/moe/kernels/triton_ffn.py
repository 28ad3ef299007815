"""The experts' ReLU networks on a GPU, with Triton kernels that gather tokens while they load them.

No sorted copy of the tokens is made. `triton_kernels` has the kernels; this module has their graph
and the tiles in which they work:

    forward   h_NF = relu(x[token] @ w1)     y_ND = gate (h_NF @ w2)     y_TD = sums of y_ND by
    token backward  dh = dy[token] @ w2.T (never stored)   dgate_N = <dh, h>   dz_NF = gate dh [h >
    0]
              dx_ND = dz_NF @ w1.T           dx_TD = sums of dx_ND by token
              dw2 = (gate h).T @ dy[token]   dw1 = x[token].T @ dz_NF

For backward the tokens are kept, which exist in any case, and h_NF. It is kept without its gate: a
gate may be 0, and then <dh, gate h> / gate is no dgate; it may be negative, and then the sign of
gate h is not that of h; and in float16 small gates would cost digits. So the gate is applied in
float32, before a product is rounded.

Status: off by default (`Experts.use_triton`). Correct in Triton's interpreter; not timed on a GPU.

Legend: T tokens, N assignments sorted by expert, M tiles of consecutive ones of one expert, D
width, F hidden units, K inner size, L rows and C columns of a result, S columns of tiles, e
experts.
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
    """Returns the parameters of a tile.

    Args:
        rows: Rows of the result.
        columns: Columns of the result.
        step: Elements of the inner size that are accumulated at a time.
        stages: Number of steps that are loaded ahead.
        warps: Number of warps.

    Returns:
        The parameters by the names of a kernel launch's keyword arguments.
    """
    return {
        "ROWS": rows,
        "COLUMNS": columns,
        "STEP": step,
        "num_stages": stages,
        "num_warps": warps,
    }


@dataclass(frozen=True)
class Tiles:
    """The tiles of each kind of product; `rows` and `hidden` have equally many rows.

    Attributes:
        rows: Rows times an expert's matrix.
        hidden: Gradients of hidden units. Narrower, because three such tiles are in registers at
            its end.
        weights: Gradients of weights. A row is loaded after its token's number, so half of the
            stages hold tiles.
    """

    rows: Tile
    hidden: Tile
    weights: Tile


# smallest mean number of assignments of an expert -> tiles, for Hopper. Tests show that they fit
# its shared memory and that no register spills; that no others are faster has not been measured.
TILES = {
    64: Tiles(tile(128, 256, 64, 4, 8), tile(128, 128, 64, 4, 8), tile(128, 256, 64, 7, 8)),
    24: Tiles(tile(64, 128, 64, 4, 4), tile(64, 128, 64, 4, 4), tile(128, 256, 64, 7, 8)),
    0: Tiles(tile(16, 256, 128, 3, 4), tile(16, 128, 128, 3, 4), tile(128, 256, 32, 7, 8)),
}
# without tensor cores
TILES_FLOAT32 = Tiles(tile(64, 64, 16, 4, 8), tile(64, 64, 16, 4, 8), tile(64, 64, 32, 5, 4))


def feedforward(
    x_TD: torch.Tensor,
    permutation: TokenPermutation,
    gate_N: torch.Tensor,
    count_e: torch.Tensor,
    w1_eDF: torch.Tensor,
    w2_eFD: torch.Tensor,
    recompute: bool = False,
    defer: DeferGrad | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Computes y_t = sum over the rows n of token t of gate_n * relu(x_t @ w1[i]) @ w2[i].

    Products accumulate in float32 and are rounded once. Equal inputs give equal bits. Rows gathered
    in the load without sorted copies are ScatterMoE's (Tan et al. 2024, arXiv 2403.08245). The
    gates' gradient from hidden units instead of outputs, and sums by token instead of scattered
    stores, are SonicMoE's (Guo et al. 2025, arXiv 2512.14080).

    Args:
        x_TD: Tokens (T, D), bfloat16, float16 or float32, as the matrices.
        permutation: The rows, sorted by expert, at least one.
        gate_N: Gate weight of each row, of any dtype.
        count_e: Rows of each expert, int64.
        w1_eDF: First matrices.
        w2_eFD: Second matrices.
        recompute: Whether hidden units are computed again in backward instead of being kept.
        defer: Takes the functions that compute the weight gradients. None: backward returns them.
        tiles: None: those for this size. It may fail for work that `supported` refuses.

    Returns:
        The sums (T, D).
    """
    if tiles is None:
        tiles = _tiles_for(x_TD.dtype, len(permutation.token_N) / len(count_e))
    work = _Work.listed(permutation.token_N, count_e, tiles)
    return _Feedforward.apply(x_TD, gate_N, w1_eDF, w2_eFD, permutation, work, recompute, defer)


def _tiles_for(dtype: torch.dtype, mean_assignments: float) -> Tiles:
    """Returns the tiles for a dtype and a mean number of assignments of an expert."""
    if dtype == torch.float32:
        return TILES_FLOAT32
    return next(tiles for smallest, tiles in TILES.items() if mean_assignments >= smallest)


def supported(
    num_rows: int, x_TD: torch.Tensor, w1_eDF: torch.Tensor, w2_eFD: torch.Tensor
) -> bool:
    """Returns whether `feedforward` can do this work.

    It needs Triton (which needs a C compiler and reports a missing one), compute capability 9
    (Hopper), for whose shared memory the tiles are made, one dtype, and widths that descriptors and
    wide loads allow.
    """
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
    """Returns whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


class _Feedforward(torch.autograd.Function):
    """The graph of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        gate_N: torch.Tensor,
        w1_eDF: torch.Tensor,
        w2_eFD: torch.Tensor,
        permutation: TokenPermutation,
        work: "_Work",
        recompute: bool,
        defer: DeferGrad | None,
    ) -> torch.Tensor:
        """Returns the sums (T, D)."""
        x_TD = x_TD.contiguous()
        gate_N = gate_N.contiguous()
        h_NF = work.times(x_TD, w1_eDF, gathered=True, relu=True)
        ctx.permutation = permutation
        ctx.work = work
        ctx.defer = defer
        ctx.save_for_backward(x_TD, gate_N, w1_eDF, w2_eFD, *([] if recompute else [h_NF]))
        return unpermute_rows(work.times(h_NF, w2_eFD, gate_N=gate_N), permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple:
        """Returns the gradients of tokens, gate weights and, unless they are deferred, matrices."""
        x_TD, gate_N, w1_eDF, w2_eFD, *kept = ctx.saved_tensors
        work = ctx.work
        dy_TD = dy_TD.contiguous()
        h_NF = kept[0] if kept else work.times(x_TD, w1_eDF, gathered=True, relu=True)
        dz_NF, weighted_NF, dgate_N = work.hidden_gradients(dy_TD, w2_eFD, gate_N, h_NF)
        dx_TD = unpermute_rows(work.times(dz_NF, w1_eDF, transposed=True), ctx.permutation)

        def w1_grad(out_eDF: torch.Tensor | None = None) -> torch.Tensor:
            out_eDF = torch.empty_like(w1_eDF) if out_eDF is None else out_eDF
            return work.weights_gradient(x_TD, dz_NF, out_eDF, left_is_gathered=True)

        def w2_grad(out_eFD: torch.Tensor | None = None) -> torch.Tensor:
            out_eFD = torch.empty_like(w2_eFD) if out_eFD is None else out_eFD
            return work.weights_gradient(weighted_NF, dy_TD, out_eFD, left_is_gathered=False)

        if ctx.defer is not None:
            ctx.defer(0, w1_grad)
            ctx.defer(1, w2_grad)
            return dx_TD, dgate_N, *[None] * 6
        return dx_TD, dgate_N, w1_grad(), w2_grad(), *[None] * 4


@dataclass(frozen=True)
class _Work:
    """Products over the assignments; the list of tiles is made on the device, without a wait.

    Attributes:
        token_N: Token of each assignment, int64.
        count_e: Assignments of each expert, int64.
        end_e: End of each expert's assignments, int64.
        tile_M3: Expert, first assignment, and end of the expert's assignments of each tile, int32.
        tiles: Sizes of the tiles.
    """

    token_N: torch.Tensor
    count_e: torch.Tensor
    end_e: torch.Tensor
    tile_M3: torch.Tensor
    tiles: Tiles

    @classmethod
    def listed(cls, token_N: torch.Tensor, count_e: torch.Tensor, tiles: Tiles) -> "_Work":
        """Lists the largest possible number of tiles; a surplus tile begins after its expert."""
        rows = tiles.rows["ROWS"]
        number_e = (count_e + rows - 1) // rows
        end_e = count_e.cumsum(0)
        last_e = number_e.cumsum(0)
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
        """Multiplies each assignment's row by the matrix of its expert.

        Args:
            x: Tokens (T, K) if `gathered`, else rows (N, K).
            w: Matrices (e, K, C), or (e, C, K) if `transposed`.
            gate_N: Factor of each row. None: 1.
            gathered: Whether x has tokens.
            relu: Whether negative products become 0.
            transposed: Whether the matrices are transposed.

        Returns:
            (N, C)
        """
        from moe_dist.moe.kernels.triton_kernels import times_matrix

        t = self.tiles.rows
        k, c = w.shape[:0:-1] if transposed else w.shape[1:]
        rows = (x, self.token_N) if gathered else (_descriptor(x, t["ROWS"], t["STEP"]), None)
        block = (t["COLUMNS"], t["STEP"]) if transposed else (t["STEP"], t["COLUMNS"])
        matrix = _descriptor(w, 1, *block)
        out_NC = x.new_empty(len(self.token_N), c)
        grid = -(-c // t["COLUMNS"]), len(self.tile_M3)
        times_matrix[grid](
            *rows, matrix, gate_N, out_NC, self.tile_M3, k, c, RELU=relu, TRANSPOSED=transposed, **t
        )
        return out_NC

    def hidden_gradients(
        self, dy_TD: torch.Tensor, w2_eFD: torch.Tensor, gate_N: torch.Tensor, h_NF: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns dz (N, F), gate h (N, F) and dgate (N,) of the module's docstring."""
        from moe_dist.moe.kernels.triton_kernels import hidden_gradients

        t = self.tiles.hidden
        f, d = w2_eFD.shape[1:]
        grid = -(-f // t["COLUMNS"]), len(self.tile_M3)
        dz_NF = torch.empty_like(h_NF)
        weighted_NF = torch.empty_like(h_NF)
        dgate_NS = h_NF.new_empty(len(h_NF), grid[0], dtype=torch.float32)
        matrix = _descriptor(w2_eFD, 1, t["COLUMNS"], t["STEP"])
        hidden = _descriptor(h_NF, t["ROWS"], t["COLUMNS"])
        results = (dz_NF, weighted_NF, dgate_NS)
        hidden_gradients[grid](
            dy_TD, self.token_N, matrix, gate_N, hidden, *results, self.tile_M3, d, f, **t
        )
        return dz_NF, weighted_NF, dgate_NS.sum(1).to(gate_N.dtype)

    def weights_gradient(
        self, left: torch.Tensor, right: torch.Tensor, out_eLC: torch.Tensor, left_is_gathered: bool
    ) -> torch.Tensor:
        """Computes left.T @ right over the assignments of each expert.

        Args:
            left: Tokens (T, L) if `left_is_gathered`, else rows (N, L).
            right: Rows (N, C), or tokens (T, C).
            out_eLC: Memory for the result.
            left_is_gathered: Which side has tokens.

        Returns:
            `out_eLC`, filled; zeros for an expert without an assignment.
        """
        from moe_dist.moe.kernels.triton_kernels import weight_gradients

        t = self.tiles.weights
        e, n, c = out_eLC.shape
        if left_is_gathered:
            right = _descriptor(right, t["STEP"], t["COLUMNS"])
        else:
            left = _descriptor(left, t["STEP"], t["ROWS"])
        grid = -(-c // t["COLUMNS"]), -(-n // t["ROWS"]), e
        sides = left, right, self.token_N, out_eLC
        weight_gradients[grid](
            *sides, self.count_e, self.end_e, n, c, LEFT_IS_GATHERED=left_is_gathered, **t
        )
        return out_eLC


def _descriptor(t: torch.Tensor, *block: int) -> Any:
    """Returns a descriptor through which blocks of this size are loaded."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(t, list(block))
