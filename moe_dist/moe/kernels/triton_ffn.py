"""The experts' ReLU networks on a GPU, with Triton kernels that gather tokens while loading them.

They make no sorted copy of the tokens. `triton_kernels` has the kernels; this module has the
autograd graph and the tile sizes:

    forward
      h_NF = relu(x[token] @ w1)
      y_ND = gate (h @ w2)
      y_TD = y_ND summed by token

    backward
      dh = dy[token] @ w2.T                never stored
      dgate_N = <dh, h>
      dz_NF = gate dh [h > 0]
      dx_ND = dz @ w1.T
      dx_TD = dx_ND summed by token
      dw2 = (gate h).T @ dy[token]
      dw1 = x[token].T @ dz

Forward saves the tokens (which exist anyway) and h_NF for backward. It saves h, not gate h, for
three reasons: a gate can be 0, and then <dh, gate h> / gate is undefined; a gate can be negative,
and then gate h has the wrong sign for [h > 0]; and in float16, small gates would cost digits. So
the gate is applied in float32, before a product is rounded.

Status: off by default (`Experts.use_triton`). Correct in Triton's interpreter; not timed on a GPU.

Legend: T tokens, N assignments sorted by expert, M tiles (consecutive assignments to one expert), D
width, F hidden units, K inner size, L rows and C columns in a result, S tile columns, e experts.
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
    """Returns a tile's parameters as keyword arguments for a kernel launch.

    Args:
        rows: Result rows per tile.
        columns: Result columns per tile.
        step: Elements along the inner size, accumulated at a time.
        stages: Steps to load ahead.
        warps: Number of warps.

    Returns:
        The parameters by keyword.
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
    """The tile for each kind of product; `rows` and `hidden` have equally many rows.

    Attributes:
        rows: For rows times an expert's matrix.
        hidden: For hidden gradients. Narrower, because the kernel ends with three such tiles in
            registers.
        weights: For weight gradients. A row's load must wait for its token's index, so only half of
            the stages hold tiles.
    """

    rows: Tile
    hidden: Tile
    weights: Tile


# smallest mean assignments per expert -> tiles, for Hopper. Tests show: they fit its shared memory
# and no register spills. Not measured: whether other tiles are faster.
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

    It may fail for inputs for which `supported` returns False.

    Products accumulate in float32 and are rounded once. Equal inputs give equal bits. From
    ScatterMoE (Tan et al. 2024, arXiv 2403.08245): rows are gathered while loading, without sorted
    copies. From SonicMoE (Guo et al. 2025, arXiv 2512.14080): the gate gradient is computed from
    hidden units instead of outputs, and sums by token replace scattered stores.

    Args:
        x_TD: Tokens (T, D), bfloat16, float16 or float32, like the matrices.
        permutation: The rows, sorted by expert, at least one.
        gate_N: Gate weight per row, any dtype.
        count_e: Rows per expert, int64.
        w1_eDF: First matrices.
        w2_eFD: Second matrices.
        recompute: If True, recomputes hidden units in backward instead of keeping them.
        defer: Registers the functions to compute the weight gradients later. None: backward returns
            these gradients.
        tiles: Tile sizes. None: those for this problem size.

    Returns:
        The sums (T, D).
    """
    if tiles is None:
        tiles = _tiles_for(x_TD.dtype, len(permutation.token_N) / len(count_e))
    work = _Work.listed(permutation.token_N, count_e, tiles)
    return _Feedforward.apply(x_TD, gate_N, w1_eDF, w2_eFD, permutation, work, recompute, defer)


def _tiles_for(dtype: torch.dtype, mean_assignments: float) -> Tiles:
    """Returns the tiles for a dtype and mean assignments per expert."""
    if dtype == torch.float32:
        return TILES_FLOAT32
    return next(tiles for smallest, tiles in TILES.items() if mean_assignments >= smallest)


def supported(
    num_rows: int, x_TD: torch.Tensor, w1_eDF: torch.Tensor, w2_eFD: torch.Tensor
) -> bool:
    """Returns True if `feedforward` supports these inputs.

    It needs Triton (which needs a C compiler and reports a missing one); compute capability 9
    (Hopper), because the tiles are made for its shared memory; one dtype; and widths for which
    descriptors and wide loads work.
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
    """Returns True if Triton is installed."""
    return importlib.util.find_spec("triton") is not None


class _Feedforward(torch.autograd.Function):
    """The graph in the module's docstring."""

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
        """Returns the gradients of tokens, gate weights and, unless deferred, matrices."""
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
    """Products over the assignments; the tile list is made on the device, without a host wait.

    Attributes:
        token_N: Each assignment's token, int64.
        count_e: Assignments per expert, int64.
        end_e: Each expert's end in the assignments, int64.
        tile_M3: For each tile: its expert, its first assignment, and the expert's end, int32.
        tiles: Tile sizes.
    """

    token_N: torch.Tensor
    count_e: torch.Tensor
    end_e: torch.Tensor
    tile_M3: torch.Tensor
    tiles: Tiles

    @classmethod
    def listed(cls, token_N: torch.Tensor, count_e: torch.Tensor, tiles: Tiles) -> "_Work":
        """Lists as many tiles as can be needed; a surplus tile begins past its expert's rows."""
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
        """Multiplies each assignment's row by its expert's matrix.

        Args:
            x: Tokens (T, K) if `gathered`, else rows (N, K).
            w: Matrices (e, K, C), or (e, C, K) if `transposed`.
            gate_N: Factor per row. None: 1.
            gathered: If True, x has tokens, which are gathered into rows.
            relu: If True, negative products become 0.
            transposed: If True, multiplies by the transposed matrices.

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
        """Returns dz (N, F), gate h (N, F) and dgate (N,), as in the module's docstring."""
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
        """Computes left.T @ right over each expert's assignments.

        Args:
            left: Tokens (T, L) if `left_is_gathered`, else rows (N, L).
            right: Rows (N, C) if `left_is_gathered`, else tokens (T, C).
            out_eLC: Memory for the result.
            left_is_gathered: If True, `left` has tokens, else `right`.

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
    """Returns a tensor descriptor to load blocks of this size."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(t, list(block))
