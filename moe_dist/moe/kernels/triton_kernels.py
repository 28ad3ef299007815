"""The Triton kernels of `gpu`. Every product is of one expert's rows or for one expert's weights, and a program makes
one tile of it, ROWS x COLUMNS, adding up STEP at a time in float32.

Rows of tokens are gathered by pointers as they are loaded; what lies in order comes by descriptors (TMA on Hopper),
which give zeros past a tensor's end. Nothing is added up by atomics: every result has one writer and one order.

Legend: N assignments sorted by expert, M tiles of consecutive ones of one expert, each an expert, its first assignment
and where that expert's end; T tokens, D width, F hidden units, K what a product sums over, L rows and C columns of its
result, S columns of tiles, e experts.
"""

import triton
import triton.language as tl


@triton.jit
def times_matrix(
    x,
    token_N,
    w_eKC,
    gate_N,
    out_NC,
    tile_M3,
    K,
    C,
    RELU: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """out[n] = gate_N[n] relu(x[token_N[n]] @ w[i]). Without `token_N`, x is a descriptor of rows (N, K); without
    `gate_N` it is 1; TRANSPOSED: w is (e, C, K)."""
    m, c = _tile()
    i, first, end = (
        tl.load(tile_M3 + 3 * m),
        tl.load(tile_M3 + 3 * m + 1),
        tl.load(tile_M3 + 3 * m + 2),
    )
    if first < end:
        out = _product(
            x, token_N, w_eKC, i, first, end, c * COLUMNS, K, TRANSPOSED, ROWS, COLUMNS, STEP
        )
        row, corner, place, inside = _places(first, end, c * COLUMNS, C, ROWS, COLUMNS)
        if RELU:
            out = tl.maximum(out, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if gate_N is not None:
            out *= tl.load(gate_N + row, mask=row < end, other=0.0).to(tl.float32)[:, None]
        tl.store(out_NC + corner + place, out.to(out_NC.dtype.element_ty), mask=inside)


@triton.jit
def hidden_gradients(
    dy_TD,
    token_N,
    w2_eFD,
    gate_N,
    h_NF,
    dz_NF,
    weighted_NF,
    dgate_NS,
    tile_M3,
    D,
    F,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """From dh = dy[token_N[n]] @ w2[i]ᵀ, the gradient of hidden units before the gate: that of what ReLU got, this
    tile's part of the gate's, and beside them the hidden units times the gate, which w2's will want."""
    m, c = _tile()
    i, first, end = (
        tl.load(tile_M3 + 3 * m),
        tl.load(tile_M3 + 3 * m + 1),
        tl.load(tile_M3 + 3 * m + 2),
    )
    if first < end:
        dh = _product(
            dy_TD, token_N, w2_eFD, i, first, end, c * COLUMNS, D, True, ROWS, COLUMNS, STEP
        )
        row, corner, place, inside = _places(first, end, c * COLUMNS, F, ROWS, COLUMNS)
        h = h_NF.load([first, c * COLUMNS]).to(tl.float32)
        gate = tl.load(gate_N + row, mask=row < end, other=0.0).to(tl.float32)[:, None]
        tl.store(dgate_NS + row * tl.num_programs(0) + c, tl.sum(dh * h, 1), mask=row < end)
        tl.store(
            dz_NF + corner + place,
            tl.where(h <= 0, 0.0, dh * gate).to(dz_NF.dtype.element_ty),
            mask=inside,
        )
        tl.store(
            weighted_NF + corner + place, (h * gate).to(weighted_NF.dtype.element_ty), mask=inside
        )


@triton.jit
def of_weights(
    left,
    right,
    token_N,
    out_eLC,
    count_e,
    end_e,
    L,
    C,
    LEFT_IS_GATHERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """out[i] = the sum over the assignments n of expert i of left[n]ᵀ right[n], zeros where there are none. One side
    is of tokens and gathered, the other a descriptor of rows that lie in order."""
    l, c = _tile()  # noqa: E741
    i = tl.program_id(2)
    end = tl.load(end_e + i).to(tl.int32)
    line, column = l * ROWS + tl.arange(0, ROWS), c * COLUMNS + tl.arange(0, COLUMNS)
    out = tl.zeros((ROWS, COLUMNS), tl.float32)
    for n in range(end - tl.load(count_e + i).to(tl.int32), end, STEP):
        row = n + tl.arange(0, STEP)
        mine = (row < end)[
            :, None
        ]  # on the gathered side alone: what the next expert has on the other is times 0
        token = tl.load(token_N + row, mask=row < end, other=0).to(tl.int64)[:, None]
        if LEFT_IS_GATHERED:
            a = tl.load(
                left + token * L + line[None, :], mask=mine & (line < L)[None, :], other=0.0
            )
            b = right.load([n, c * COLUMNS])
        else:
            a = left.load([n, l * ROWS])
            b = tl.load(
                right + token * C + column[None, :], mask=mine & (column < C)[None, :], other=0.0
            )
        out = tl.dot(a.T, b, out, input_precision="ieee")
    place = (i.to(tl.int64) * L + line)[:, None] * C + column[None, :]
    tl.store(
        out_eLC + place,
        out.to(out_eLC.dtype.element_ty),
        mask=(line < L)[:, None] & (column < C)[None, :],
    )


@triton.jit
def _product(
    x,
    token_N,
    w,
    i,
    first,
    end,
    column,
    K,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """ROWS of x from `first` on @ COLUMNS of w[i] from `column` on. Rows after `end` are another expert's, and not to
    be stored."""
    if token_N is not None:
        row = first + tl.arange(0, ROWS)
        token = tl.load(token_N + row, mask=row < end, other=0).to(tl.int64)
        x += token[:, None] * K
    out = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, K, STEP):
        if token_N is not None:
            step = k + tl.arange(0, STEP)[None, :]
            a = tl.load(x + step, mask=step < K, other=0.0)
        else:
            a = x.load([first, k])
        if TRANSPOSED:
            b = w.load([i, column, k]).reshape(COLUMNS, STEP).T
        else:
            b = w.load([i, k, column]).reshape(STEP, COLUMNS)
        out = tl.dot(a, b, out, input_precision="ieee")  # float32 is multiplied as float32
    return out


@triton.jit
def _tile():
    """Row and column of this program's tile. Programs start in order of their first number: eight rows of tiles have
    one column before they have the next, so that what they share stays in the L2 cache."""
    return tl.swizzle2d(
        tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), 8
    )


@triton.jit
def _places(first, end, column, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a tile: its rows; where in an (N, C) tensor it begins, and its elements from there on, for which 32 bits will
    do; and which of them are inside."""
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (first + r < end)[:, None] & (column + c < C)[None, :]
    return (
        (first + r).to(tl.int64),
        first.to(tl.int64) * C + column,
        r[:, None] * C + c[None, :],
        inside,
    )
