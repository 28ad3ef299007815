"""Draws docs/architecture.svg: one MoE layer on three ranks, from the gate to the experts and back.

    .venv/bin/python docs/architecture.py

The picture has a background of its own, so that it reads well on white and on dark pages.
"""

from html import escape
from pathlib import Path

FILE = Path(__file__).with_name("architecture.svg")

WIDTH = 980
HEIGHT = 640
LEFT = 176  # where the first rank's column begins
COLUMN = 252  # width of a rank's column
GAP = 12  # between columns
TOKEN = 18  # side of a token's square

INK = "#1c2733"
GREY = "#5b6b7f"
CARD = "#f6f8fb"
BOX = "#ffffff"
LINE = "#c3cedb"
BAND = "#e4ebf5"
RANKS = ("#2f6fb7", "#c2571a", "#2e8b57")  # colour of a rank's tokens

# the experts that each token of each rank visits; experts 0 and 1 are on rank 0, and so on
CHOICES = (
    ((0, 3), (1, 4), (3, 5)),
    ((3, 2), (0, 3), (3, 4)),
    ((5, 0), (3, 1), (4, 0)),
)
EXPERTS_PER_RANK = 2

TOKENS_Y = 84
GATE_Y = 124
DISPATCH_Y = 196
EXPERTS_Y = 330
COMBINE_Y = 436
OUTPUT_Y = 510
OPTIMIZER_Y = 560


def column_x(rank: int) -> float:
    """Returns the left edge of a rank's column."""
    return LEFT + rank * (COLUMN + GAP)


def token_x(rank: int, token: int) -> float:
    """Returns the middle of a token's square."""
    return column_x(rank) + COLUMN / 2 + (token - 1) * 46


def expert_x(expert: int) -> float:
    """Returns the middle of an expert's box."""
    rank, local = divmod(expert, EXPERTS_PER_RANK)
    return column_x(rank) + COLUMN / 2 + (local - 0.5) * 122


def box(
    x: float, y: float, width: float, height: float, fill: str = BOX, stroke: str = LINE
) -> str:
    """Returns a rounded rectangle."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" '
        f'fill="{fill}" stroke="{stroke}"/>'
    )


def label(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 14,
    fill: str = INK,
    bold: bool = False,
    anchor: str = "middle",
) -> str:
    """Returns a line of text, `anchor`ed at x."""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" '
        f'text-anchor="{anchor}"{weight}>{escape(text)}</text>'
    )


def square(x: float, y: float, rank: int, side: float = TOKEN) -> str:
    """Returns the square of a token of `rank`, with its middle at x."""
    return (
        f'<rect x="{x - side / 2:g}" y="{y:g}" width="{side:g}" height="{side:g}" rx="3" '
        f'fill="{RANKS[rank]}"/>'
    )


def curve(x: float, y: float, to_x: float, to_y: float, rank: int) -> str:
    """Returns the way of a row between two points."""
    middle = (y + to_y) / 2
    return (
        f'<path d="M{x:g} {y:g} C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y:g}" '
        f'fill="none" stroke="{RANKS[rank]}" stroke-width="1.8" stroke-opacity="0.75"/>'
    )


def row_places() -> dict[tuple[int, int, int], tuple[float, int]]:
    """Returns x and position of each row inside its expert, by (rank, token, expert)."""
    rows: dict[int, list[tuple[int, int]]] = {}
    for rank, tokens in enumerate(CHOICES):
        for token, experts in enumerate(tokens):
            for expert in experts:
                rows.setdefault(expert, []).append((rank, token))
    places = {}
    for expert, visitors in rows.items():
        for position, (rank, token) in enumerate(visitors):
            x = expert_x(expert) + (position - (len(visitors) - 1) / 2) * 16
            places[rank, token, expert] = (x, position)
    return places


def draw() -> str:
    """Returns the picture as SVG text."""
    right = column_x(2) + COLUMN
    places = row_places()
    parts = [box(1, 1, WIDTH - 2, HEIGHT - 2, CARD, "#d5dde7")]
    for rank in range(3):
        x = column_x(rank)
        parts.append(box(x, 18, COLUMN, OUTPUT_Y + 16, "#fbfcfe", LINE))
        parts.append(
            label(x + COLUMN / 2, 42, f"rank {rank}", size=16, fill=RANKS[rank], bold=True)
        )
        parts.append(label(x + COLUMN / 2, 62, "the same dense weights", size=12, fill=GREY))
        parts.append(box(x + 14, GATE_Y, COLUMN - 28, 34))
        parts.append(label(x + COLUMN / 2, GATE_Y + 22, "gate", bold=True))
    for y in (DISPATCH_Y, COMBINE_Y):
        height = 92 if y == DISPATCH_Y else 46
        parts.append(box(LEFT - 6, y, right - LEFT + 12, height, BAND, "#b4c4da"))
    for (rank, token, _), (x, _) in places.items():
        start = token_x(rank, token)
        parts.append(curve(start, GATE_Y + 34, x, EXPERTS_Y, rank))
        parts.append(curve(x, EXPERTS_Y + 82, start, OUTPUT_Y, rank))
    for expert in range(3 * EXPERTS_PER_RANK):
        x = expert_x(expert)
        parts.append(box(x - 56, EXPERTS_Y, 112, 82))
        parts.append(label(x, EXPERTS_Y + 20, f"expert {expert}", size=13, bold=True))
    for (rank, _, _), (x, _) in places.items():
        parts.append(square(x, EXPERTS_Y + 31, rank, 13))
    for expert in range(3 * EXPERTS_PER_RANK):
        count = sum(key[2] == expert for key in places)
        text = f"{count} row" + ("s" if count > 1 else "")
        parts.append(label(expert_x(expert), EXPERTS_Y + 66, text, size=12, fill=GREY))
    for rank, tokens in enumerate(CHOICES):
        for token in range(len(tokens)):
            x = token_x(rank, token)
            parts.append(square(x, TOKENS_Y, rank))
            parts.append(square(x, OUTPUT_Y - 2, rank))
    parts += _captions(right)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, DejaVu Sans, sans-serif">\n'
        "<title>One mixture-of-experts layer on three ranks: gate, dispatcher, experts</title>\n"
        f"{body}\n</svg>\n"
    )


def _captions(right: float) -> list[str]:
    """Returns the texts at the left, and the optimizer's band."""
    x = 18
    rows = (
        (TOKENS_Y + 6, "tokens", "this rank's samples"),
        (GATE_Y + 14, "gate", "chooses k experts,\nmoves nothing"),
        (
            DISPATCH_Y + 36,
            "dispatcher",
            "counts, then rows in\nexact sizes: nothing\npadded or dropped",
        ),
        (EXPERTS_Y + 32, "experts", "each rank holds\nits own"),
        (COMBINE_Y + 20, "dispatcher", "rows return"),
        (OUTPUT_Y + 2, "output", "weighted sum\nby token"),
    )
    parts = []
    for y, title, text in rows:
        parts.append(label(x, y, title, bold=True, anchor="start"))
        for i, line in enumerate(text.split("\n")):
            parts.append(label(x, y + 17 + 15 * i, line, size=12, fill=GREY, anchor="start"))
    parts.append(box(18, OPTIMIZER_Y, right + 6 - 18, 62, BOX, "#b4c4da"))
    parts.append(
        label(WIDTH / 2, OPTIMIZER_Y + 26, "one optimizer, one gradient norm, one clip", bold=True)
    )
    parts.append(
        label(
            WIDTH / 2,
            OPTIMIZER_Y + 47,
            "dense parameters: AdamW under DeepSpeed ZeRO 0 to 3   ·   "
            "experts: factored Adam, state on one owner each",
            size=12,
            fill=GREY,
        )
    )
    return parts


if __name__ == "__main__":
    FILE.write_text(draw())
    print(FILE.name)
