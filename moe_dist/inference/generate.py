"""Uses a trained run: continues a text, tells what comes next, shows which experts a text visits.

    python -m moe_dist.inference generate RUN --prompt "In the beginning"
    python -m moe_dist.inference generate RUN --prompt "In the beginning" --words 200 --temperature 0.7 --top 100
    python -m moe_dist.inference generate RUN --prompt "In the beginning" --next 10
    python -m moe_dist.inference generate RUN --prompt "In the beginning" --experts
    python -m moe_dist.inference generate RUN --specialisation
    python -m moe_dist.inference generate RUN --specialisation --of book.txt --only 3 17

RUN is a run folder; its newest checkpoint is read, whatever layout and precision wrote it. One process, on CPU, in
float32. A text is read from the start of a line.
"""

# Legend: T words of a text, V vocabulary, N words that may be drawn.

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from moe_dist.config.arg_parser import Parser, path_argument
from moe_dist.data.text import corpus
from moe_dist.data.text.lanes import EOS, EOS_ID, UNK, UNK_ID, Vocabulary, tokenize
from moe_dist.inference.expert_usage import expert_shares, top_contexts
from moe_dist.inference.load import TextModel
from moe_dist.nn import prng
from moe_dist.training.errors import plain_errors

EXPERTS_SHOWN, CONTEXTS_SHOWN = (
    16,
    4,
)  # of a table of --specialisation: the busiest experts, lines of each
SIDE, WORD = 32, 14  # characters of a context on either side of its word, and of a word
PER_LINE = 8  # experts on a line of --experts


@dataclass(frozen=True)
class Text:
    """Words as they were written, and their indices; the first is the `<eos>` of the line before."""

    words: list[str]
    word_T: torch.Tensor


def as_text(lines: list[str], vocabulary: Vocabulary) -> Text:
    """Lines without the end of the last. Says on stderr which words are not in the vocabulary."""
    words = [word for line in lines for word in (*tokenize(line), EOS)][:-1]
    word_T = torch.tensor([EOS_ID, *vocabulary.encode(lines)[:-1]])
    text = Text([EOS, *words], word_T)
    unknown = sorted(
        {w for w, i in zip(text.words, word_T.tolist(), strict=True) if i == UNK_ID and w != UNK}
    )
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        print(
            f"note: not in the vocabulary, read as {UNK}: {', '.join(unknown[:5])}{more}",
            file=sys.stderr,
        )
    return text


def draw(log_probability_V: torch.Tensor, u: float, temperature: float, top: int) -> int:
    """The word that `u`, uniform on [0, 1), draws from p^(1 / temperature) over the `top` most probable words, `<unk>`
    not among them."""
    known_V = log_probability_V.double().index_fill(0, torch.tensor(UNK_ID), -math.inf)
    log_p_N, word_N = known_V.topk(top)
    sum_N = ((log_p_N - log_p_N[0]) / temperature).exp().cumsum(0)
    return int(word_N[torch.searchsorted(sum_N, u * sum_N[-1], right=True)])


NO_SPACE_BEFORE = frozenset([*",.;:!?')]’”", "-", "--", EOS])
NO_SPACE_AFTER = frozenset(["(", "[", "“", "-", "--", EOS])


def written(before: str, word: str) -> str:
    """`word` as it is written after the word `before`: with a space, or without one at punctuation and line ends."""
    space = "" if word in NO_SPACE_BEFORE or before in NO_SPACE_AFTER else " "
    return "\n" if word == EOS else space + word


def show_continuation(reader: TextModel, text: Text, args: argparse.Namespace) -> None:
    top = args.top or len(reader.vocabulary) - 1
    after_prompt = reader.read(text.word_T, reader.initial_state())
    for sample in range(args.samples):
        print("\n" * (sample > 0) + args.prompt, end="", flush=True)
        before, (log_probability_V, state) = text.words[-1], after_prompt
        for u in prng.uniform(args.words, args.seed, "generate", sample).tolist():
            index = draw(log_probability_V, u, args.temperature, top)
            word = reader.vocabulary.words[index]
            print(written(before, word), end="", flush=True)
            before, (log_probability_V, state) = word, reader.read(torch.tensor([index]), state)
        print()


def show_next(reader: TextModel, text: Text, args: argparse.Namespace) -> None:
    log_probability_V, _ = reader.read(text.word_T, reader.initial_state())
    top_N = log_probability_V.topk(args.next)
    print("probability  next word")
    for log_p, index in zip(top_N.values.tolist(), top_N.indices.tolist(), strict=True):
        print(f"{math.exp(log_p):>11.4f}  {reader.vocabulary.words[index]}")


def show_experts(reader: TextModel, text: Text, args: argparse.Namespace) -> None:
    for name, visits in reader.expert_assignments(text.word_T).items():
        print(f"layer {name}: the experts of each word, and their gate weights")
        rows = zip(text.words, visits.expert_TK.tolist(), visits.weight_TK.tolist(), strict=True)
        for word, expert_K, weight_K in list(rows)[1:]:  # the prompt has not the line end before it
            cells = [
                f"{expert:>6} {weight:.3f}"
                for expert, weight in zip(expert_K, weight_K, strict=True)
            ]
            for i in range(0, len(cells), PER_LINE):
                print(
                    f"{_cut(word, WORD) if i == 0 else '':<{WORD}}"
                    + "".join(cells[i : i + PER_LINE])
                )


def show_specialization(reader: TextModel, text: Text, args: argparse.Namespace) -> None:
    """Shazeer et al. 2017, Table 9: words in order of falling gate weight, with the words around them."""
    for name, visits in reader.expert_assignments(text.word_T).items():
        share_E = expert_shares(visits)
        shown = (
            list(dict.fromkeys(args.only or []))
            or share_E.argsort(descending=True, stable=True)[:EXPERTS_SHOWN].tolist()
        )
        print(
            f"layer {name}: {len(text.words):,} words, {int((share_E > 0).sum())} of {len(share_E)} experts visited"
        )
        print(f"expert   share  weight  {'context (/ is the end of a line)':^{2 * SIDE}}")
        for expert in shown:
            labels = [f"{expert:>6}{share_E[expert].item():>8.2%}"] + [""] * CONTEXTS_SHOWN
            found = top_contexts(visits, expert, CONTEXTS_SHOWN)
            lines = [
                f"{weight:>6.3f}  {context(text.words, position)}" for weight, position in found
            ] or ["no word"]
            for label, line in zip(labels, lines, strict=False):
                print(f"{label:<14}  {line}")
        if len(shown) < len(share_E):
            print(f"{len(share_E) - len(shown)} more experts: --only shows any, by number")


def context(words: list[str], position: int) -> str:
    """A word in brackets amid the text around it, `SIDE` characters on either side, the brackets in one column."""
    first = max(0, position - SIDE)  # a word takes a character at least
    near = ["/" if word == EOS else word for word in words[first : position + 1 + SIDE]]
    spaced = [written(*pair) for pair in pairwise([EOS, *near])]
    at = position - first
    before, after = "".join(spaced[:at]), "".join(spaced[at + 1 :])
    return f"{_cut(before[::-1], SIDE)[::-1]:>{SIDE}} [{_cut(spaced[at].strip(), WORD)}]{_cut(after, SIDE)}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


# what is shown -> how, and the options that it takes
MODES = {
    "continuation": (
        show_continuation,
        ("prompt", "words", "temperature", "top", "seed", "samples"),
    ),
    "next": (show_next, ("prompt",)),
    "experts": (show_experts, ("prompt",)),
    "specialisation": (show_specialization, ("of", "read", "only")),
}
DEFAULTS: dict[str, Any] = {
    "prompt": "",
    "words": 50,
    "temperature": 1.0,
    "top": None,
    "seed": 0,
    "samples": 1,
    "of": None,
    "read": 10_000,
    "only": None,
}


def command_line(argv: list[str]) -> argparse.Namespace:
    """With `mode`, a key of MODES. Raises ValueError for numbers out of range, or options that do not go together."""
    parser = Parser(
        prog="python -m moe_dist.inference generate",
        description=__doc__,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("run", type=path_argument, metavar="RUN", help="a run folder")
    add(
        "--prompt",
        metavar="TEXT",
        help="what to read first (default: nothing, the start of a line)",
    )
    add = parser.add_argument_group(
        "the prompt's continuation, if nothing else is asked for"
    ).add_argument
    add("--words", type=int, metavar="N", help="so many words (default 50)")
    add(
        "--temperature",
        type=float,
        metavar="X",
        help="below 1 likelier words, above 1 rarer ones (default 1)",
    )
    add(
        "--top",
        type=int,
        metavar="N",
        help="draws from the N most probable words alone (default: from all)",
    )
    add("--seed", type=int, metavar="N", help="another seed, another text (default 0)")
    add("--samples", type=int, metavar="N", help="so many continuations (default 1)")
    add = parser.add_argument_group("or one of").add_argument
    add("--next", type=int, metavar="N", help="the N most probable next words, with probabilities")
    add(
        "--experts",
        action="store_true",
        help="the experts that each word of the prompt visits, with gate weights",
    )
    add(
        "--specialisation",
        action="store_true",
        help="for each expert the words in context with its highest weights",
    )
    add = parser.add_argument_group("with --specialisation").add_argument
    add(
        "--of",
        type=path_argument,
        metavar="FILE",
        help="over this text (default: the test split of the run)",
    )
    add(
        "--read",
        type=int,
        metavar="N",
        help="over its first N words, to the end of a line (default 10000)",
    )
    add("--only", type=int, nargs="+", metavar="I", help="these experts (default: the busiest)")
    given = vars(parser.parse_args(argv))
    modes = [mode for mode in MODES if mode in given] or ["continuation"]
    if len(modes) > 1:
        raise ValueError(f"--{modes[0]} and --{modes[1]}: give one of them")
    for name in (name for name in DEFAULTS if name in given):
        takers = [mode for mode, (_, options) in MODES.items() if name in options]
        if modes[0] not in takers:
            raise ValueError(f"--{name}: an option of {' and '.join(takers)}, not of {modes[0]}")
    args = argparse.Namespace(**DEFAULTS | given, mode=modes[0])
    for name in ("words", "top", "samples", "next", "read"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: at least 1")
    if any("\ud800" <= letter <= "\udfff" for letter in args.prompt):
        raise ValueError(f"--prompt {args.prompt!a}: not text in this terminal's encoding")
    if not 0 < args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature:g}: a positive number")
    return args


def open_text(reader: TextModel, args: argparse.Namespace) -> Text:
    """What is to be read. Raises ValueError where it cannot be, or the run has not what is asked of it."""
    num_words, num_experts = len(reader.vocabulary), reader.layers.moe.num_experts
    if args.mode == "next" and args.next > num_words:
        raise ValueError(f"--next {args.next}: the vocabulary has {num_words} words")
    if args.top is not None and args.top >= num_words:
        raise ValueError(f"--top {args.top}: at most {num_words - 1}, the vocabulary without {UNK}")
    if args.mode in ("experts", "specialisation") and not reader.recorders:
        raise ValueError(
            f"--{args.mode}: {args.run} has no experts (model.middle_layer={reader.layers.middle_layer!r})"
        )
    if args.only and not all(0 <= expert < num_experts for expert in args.only):
        raise ValueError(
            f"--only {' '.join(map(str, args.only))}: experts are 0 to {num_experts - 1}"
        )
    if args.mode != "specialisation":
        text = as_text(args.prompt.split("\n"), reader.vocabulary)
        if args.mode == "experts" and len(text.words) == 1:
            raise ValueError("--experts: give a --prompt of a word or more")
        return text
    of_run = reader.data.text
    lines = (
        corpus.open_text(of_run, streamed=True)["test"] if args.of is None else _lines_of(args.of)
    )
    return as_text(list(_first(args.read, lines)), reader.vocabulary)


def _lines_of(path: Path) -> list[str]:
    lines = [line for line in corpus.read_lines("--of", str(path), [path]) if tokenize(line)]
    if not lines:
        raise ValueError(f"--of {path}: holds no word")
    return lines


def _first(num_words: int, lines: Iterable[str]) -> Iterator[str]:
    """Lines until they hold `num_words` words."""
    words = 0
    for line in lines:
        if words >= num_words:
            return
        yield line
        words += len(tokenize(line)) + 1


def main(argv: list[str]) -> None:
    with plain_errors():
        args = command_line(argv)
        reader = TextModel(args.run)
        text = open_text(reader, args)
    show, _ = MODES[args.mode]
    show(reader, text, args)


if __name__ == "__main__":
    main(sys.argv[1:])
