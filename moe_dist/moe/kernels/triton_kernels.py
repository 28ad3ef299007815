"""The Triton kernels for `triton_ffn`.

Every product belongs to one expert: its rows or its weight gradient. A program computes one tile,
ROWS x COLUMNS, and accumulates STEP elements at a time in float32. Token rows are gathered by
pointers while loading. Rows in order are loaded by descriptors (TMA on Hopper), which return zeros
past a tensor's end. There are no atomics: every result has one writer and one order of summation.

Status: correct in Triton's interpreter; compiled for Hopper, not timed on a GPU.

Legend: N assignments sorted by expert, M tiles (expert, first assignment, the expert's end), T
tokens, D width, F hidden units, K inner size, L rows and C columns in a result, S tile columns, e
experts.
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
    """Computes out[n] = gate_N[n] * relu(x[token_N[n]] @ w[i]).

    If `token_N` is None, x is a descriptor for rows (N, K). If `gate_N` is None, gates are 1. If
    TRANSPOSED, w is (e, C, K). Without RELU, there is no relu.
    """
    m, c = _tile()
    i = tl.load(tile_M3 + 3 * m)
    first = tl.load(tile_M3 + 3 * m + 1)
    end = tl.load(tile_M3 + 3 * m + 2)
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
    """Computes dh = dy[token_N[n]] @ w2[i].T and, from it, ReLU's input gradient dz.

    dh is the hidden units' gradient before the gate. The kernel also stores this tile's addend to
    the gate gradient, and the hidden units times the gate, which w2's gradient needs.
    """
    m, c = _tile()
    i = tl.load(tile_M3 + 3 * m)
    first = tl.load(tile_M3 + 3 * m + 1)
    end = tl.load(tile_M3 + 3 * m + 2)
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
def weight_gradients(
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
    """Computes out[i] = sum of left[n].T right[n] over expert i's assignments n, or zeros.

    One side is gathered from tokens, the other is a descriptor for rows in order.
    """
    l, c = _tile()  # noqa: E741
    i = tl.program_id(2)
    end = tl.load(end_e + i).to(tl.int32)
    line = l * ROWS + tl.arange(0, ROWS)
    column = c * COLUMNS + tl.arange(0, COLUMNS)
    out = tl.zeros((ROWS, COLUMNS), tl.float32)
    for n in range(end - tl.load(count_e + i).to(tl.int32), end, STEP):
        row = n + tl.arange(0, STEP)
        # only the gathered side is masked: its zeros cancel the next expert's rows on the other
        # side
        is_own = (row < end)[:, None]
        token = tl.load(token_N + row, mask=row < end, other=0).to(tl.int64)[:, None]
        if LEFT_IS_GATHERED:
            a = tl.load(
                left + token * L + line[None, :], mask=is_own & (line < L)[None, :], other=0.0
            )
            b = right.load([n, c * COLUMNS])
        else:
            a = left.load([n, l * ROWS])
            b = tl.load(
                right + token * C + column[None, :], mask=is_own & (column < C)[None, :], other=0.0
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
    """Returns (ROWS rows of x from `first` on) @ (COLUMNS columns of w[i] from `column` on).

    Rows from `end` on belong to another expert and must not be stored.
    """
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
    """Returns this program's tile row and tile column.

    Programs start with program id 0 varying fastest. The swizzle groups eight tile rows: all eight
    run column c before column c + 1, so the matrix they share stays in the L2 cache.
    """
    return tl.swizzle2d(
        tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), 8
    )


@triton.jit
def _places(first, end, column, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns a tile's rows, its first element in an (N, C) tensor, offsets from it, and a mask.

    The offsets fit in 32 bits, because they are relative to the tile's first element.
    """
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    inside = (first + r < end)[:, None] & (column + c < C)[None, :]
    return (
        (first + r).to(tl.int64),
        first.to(tl.int64) * C + column,
        r[:, None] * C + c[None, :],
        inside,
    )
