"""Uses a language model: continues a text, lists probable next words, shows visited experts.

    python -m moe_dist.inference generate RUN --prompt "In the beginning"
    python -m moe_dist.inference generate RUN --words 200 --temperature 0.7 --top 100
    python -m moe_dist.inference generate RUN --prompt "In the beginning" --next 10
    python -m moe_dist.inference generate RUN --prompt "In the beginning" --experts
    python -m moe_dist.inference generate RUN --specialisation
    python -m moe_dist.inference generate RUN --specialisation --of book.txt --only 3 17

RUN is a run folder; its newest checkpoint is loaded, whatever layout and precision wrote it, in one
process, on CPU, in float32. The model reads a text from a line's start.
"""

# Legend: T words in a text, V vocabulary, N words that may be drawn.

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
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

# sizes in a --specialisation table
EXPERTS_SHOWN = 16  # the experts with most visits
CONTEXTS_SHOWN = 4  # lines for each expert
SIDE = 32  # context characters on either side of a word
WORD = 14  # characters per word
EXPERTS_PER_LINE = 8  # in an --experts table


@dataclass(frozen=True)
class Text:
    """A text as model input; the first word is the `<eos>` at the end of the previous line.

    Attributes:
        words: Words in their original spelling.
        word_T: Their vocabulary indices, int64.
    """

    words: list[str]
    word_T: torch.Tensor


def as_text(lines: list[str], vocabulary: Vocabulary) -> Text:
    """Converts lines to words. A note on stderr lists words outside the vocabulary.

    Args:
        lines: Lines, each without its line break.
        vocabulary: The vocabulary.

    Returns:
        The text without its last line end.
    """
    words = [EOS]
    for line in lines:
        words += [*tokenize(line), EOS]
    words.pop()  # the last line continues
    word_T = torch.tensor([EOS_ID, *vocabulary.encode(lines)[:-1]])
    unknown_words = set()
    for word, index in zip(words, word_T.tolist(), strict=True):
        if index == UNK_ID and word != UNK:
            unknown_words.add(word)
    if unknown_words:
        unknown = sorted(unknown_words)
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        print(
            f"note: not in the vocabulary, read as {UNK}: {', '.join(unknown[:5])}{more}",
            file=sys.stderr,
        )
    return Text(words, word_T)


def draw(log_probability_V: torch.Tensor, u: float, temperature: float, top: int) -> int:
    """Draws a word from p^(1 / temperature) over the `top` most probable words, without `<unk>`.

    Args:
        log_probability_V: Log-probabilities, in nats.
        u: A uniform random number in [0, 1).
        temperature: A positive number; below 1, probable words become more probable.
        top: Number of words to draw from.

    Returns:
        The word's index.
    """
    known_V = log_probability_V.double().index_fill(0, torch.tensor(UNK_ID), -math.inf)
    log_p_N, word_N = known_V.topk(top)
    sum_N = ((log_p_N - log_p_N[0]) / temperature).exp().cumsum(0)
    return int(word_N[torch.searchsorted(sum_N, u * sum_N[-1], right=True)])


NO_SPACE_BEFORE = frozenset([*",.;:!?')]’”", "-", "--", EOS])
NO_SPACE_AFTER = frozenset(["(", "[", "“", "-", "--", EOS])


def written(before: str, word: str) -> str:
    """Returns a word with the space or line break needed after the word `before`.

    Words are separated by a space, except at punctuation and line ends; `<eos>` is a line break.
    """
    if word == EOS:
        return "\n"
    if word in NO_SPACE_BEFORE or before in NO_SPACE_AFTER:
        return word
    return " " + word


# Output


def show_continuation(reader: TextModel, text: Text, args: argparse.Namespace) -> None:
    """Prints the prompt with `args.samples` continuations of `args.words` words, word by word."""
    top = args.top or len(reader.vocabulary) - 1
    log_probability_of_prompt_V, state_of_prompt = reader.read(text.word_T, reader.initial_state())
    for sample in range(args.samples):
        if sample > 0:
            print()
        print(args.prompt, end="", flush=True)
        before = text.words[-1]
        log_probability_V = log_probability_of_prompt_V
        state = state_of_prompt
        for u in prng.uniform(args.words, args.seed, "generate", sample).tolist():
            index = draw(log_probability_V, u, args.temperature, top)
            word = reader.vocabulary.words[index]
            print(written(before, word), end="", flush=True)
            before = word
            log_probability_V, state = reader.read(torch.tensor([index]), state)
        print()


def show_next(reader: TextModel, text: Text, args: argparse.Namespace) -> None:
    """Prints the `args.next` most probable words after the prompt."""
    log_probability_V, _ = reader.read(text.word_T, reader.initial_state())
    top_N = log_probability_V.topk(args.next)
    print("probability  next word")
    for log_p, index in zip(top_N.values.tolist(), top_N.indices.tolist(), strict=True):
        print(f"{math.exp(log_p):>11.4f}  {reader.vocabulary.words[index]}")


def show_experts(reader: TextModel, text: Text, args: argparse.Namespace) -> None:
    """Prints the experts visited by each word in the prompt, by layer."""
    for name, visits in reader.expert_assignments(text.word_T).items():
        print(f"layer {name}: the experts of each word, and their gate weights")
        rows = zip(text.words, visits.expert_TK.tolist(), visits.weight_TK.tolist(), strict=True)
        for word, expert_K, weight_K in list(rows)[1:]:  # without the line end before it
            cells = []
            for expert, weight in zip(expert_K, weight_K, strict=True):
                cells.append(f"{expert:>6} {weight:.3f}")
            for first in range(0, len(cells), EXPERTS_PER_LINE):
                label = _cut(word, WORD) if first == 0 else ""
                print(f"{label:<{WORD}}" + "".join(cells[first : first + EXPERTS_PER_LINE]))


def show_specialization(reader: TextModel, text: Text, args: argparse.Namespace) -> None:
    """Prints for each expert its words with the largest gate weights, in context.

    The table is like Table 9 in Shazeer et al. 2017.
    """
    for name, visits in reader.expert_assignments(text.word_T).items():
        share_E = expert_shares(visits)
        num_experts = len(share_E)
        num_visited = int((share_E > 0).sum())
        experts = list(dict.fromkeys(args.only or []))  # each once, in the order given
        if not experts:
            experts = share_E.argsort(descending=True, stable=True)[:EXPERTS_SHOWN].tolist()
        print(
            f"layer {name}: {len(text.words):,} words, "
            f"{num_visited} of {num_experts} experts visited"
        )
        print(f"expert   share  weight  {'context (/ is the end of a line)':^{2 * SIDE}}")
        for expert in experts:
            label = f"{expert:>6}{share_E[expert].item():>8.2%}"
            found = top_contexts(visits, expert, CONTEXTS_SHOWN)
            if not found:
                print(f"{label:<14}  no word")
            for weight, position in found:
                print(f"{label:<14}  {weight:>6.3f}  {context(text.words, position)}")
                label = ""
        if len(experts) < num_experts:
            print(f"{num_experts - len(experts)} more experts: --only shows any, by number")


def context(words: list[str], position: int) -> str:
    """Returns a word in brackets with `SIDE` characters of text on either side.

    All lines have their brackets in the same column.

    Args:
        words: The text's words.
        position: The word's index.

    Returns:
        One line; "/" marks a line's end.
    """
    first = max(0, position - SIDE)  # a word takes at least one character
    nearby = ["/" if word == EOS else word for word in words[first : position + 1 + SIDE]]
    spaced = [written(before, word) for before, word in pairwise([EOS, *nearby])]
    index = position - first
    before = "".join(spaced[:index])
    after = "".join(spaced[index + 1 :])
    left = _cut(before[::-1], SIDE)[::-1]  # cut on its left
    return f"{left:>{SIDE}} [{_cut(spaced[index].strip(), WORD)}]{_cut(after, SIDE)}"


def _cut(text: str, width: int) -> str:
    """Returns the text in at most `width` characters, with an ellipsis if it is cut."""
    return text if len(text) <= width else text[: width - 1] + "…"


# The command line


@dataclass(frozen=True)
class Mode:
    """One mode of the command.

    Attributes:
        show: Prints the result.
        options: The mode's options.
    """

    show: Callable[[TextModel, Text, argparse.Namespace], None]
    options: tuple[str, ...]


MODES = {
    "continuation": Mode(
        show_continuation, ("prompt", "words", "temperature", "top", "seed", "samples")
    ),
    "next": Mode(show_next, ("prompt",)),
    "experts": Mode(show_experts, ("prompt",)),
    "specialisation": Mode(show_specialization, ("of", "read", "only")),
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
    """Parses and checks the command line.

    Args:
        argv: Command-line arguments.

    Returns:
        The options, with defaults, and `mode`, a key of `MODES`.

    Raises:
        ValueError: A number is out of range, or options are incompatible.
    """
    given = vars(_parser().parse_args(argv))
    modes = [mode for mode in MODES if mode in given] or ["continuation"]
    if len(modes) > 1:
        raise ValueError(f"--{modes[0]} and --{modes[1]}: give one of them")
    mode = modes[0]
    for name in DEFAULTS:
        if name in given and name not in MODES[mode].options:
            others = [other for other in MODES if name in MODES[other].options]
            raise ValueError(f"--{name}: an option of {' and '.join(others)}, not of {mode}")
    args = argparse.Namespace(**DEFAULTS | given, mode=mode)
    for name in ("words", "top", "samples", "next", "read"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} is out of range; use at least 1")
    if any("\ud800" <= letter <= "\udfff" for letter in args.prompt):
        raise ValueError(
            f"--prompt {args.prompt!a}: not text in this terminal's encoding; give UTF-8"
        )
    if not 0 < args.temperature < math.inf:
        raise ValueError(
            f"--temperature {args.temperature:g} is out of range; use a positive number"
        )
    return args


def _parser() -> Parser:
    """Returns the command line's parser. The result contains only the given options."""
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
        help="the text to read first (default: nothing, the start of a line)",
    )
    add = parser.add_argument_group("continue the prompt (default)").add_argument
    add("--words", type=int, metavar="N", help="number of words (default 50)")
    add(
        "--temperature",
        type=float,
        metavar="X",
        help="below 1 more probable words, above 1 rarer ones (default 1)",
    )
    add(
        "--top",
        type=int,
        metavar="N",
        help="draws from the N most probable words alone (default: from all)",
    )
    add("--seed", type=int, metavar="N", help="another seed gives another text (default 0)")
    add("--samples", type=int, metavar="N", help="number of continuations (default 1)")
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
        help="for each expert the words in context with its largest gate weights",
    )
    add = parser.add_argument_group("with --specialisation").add_argument
    add(
        "--of",
        type=path_argument,
        metavar="FILE",
        help="the text to use (default: the test split of the run)",
    )
    add(
        "--read",
        type=int,
        metavar="N",
        help="its first N words, to the end of a line (default 10000)",
    )
    add(
        "--only",
        type=int,
        nargs="+",
        metavar="I",
        help="these experts (default: those with most visits)",
    )
    return parser


def open_text(reader: TextModel, args: argparse.Namespace) -> Text:
    """Checks the options against the run, and returns the mode's input text.

    Args:
        reader: The model.
        args: The options, from `command_line`.

    Returns:
        The prompt, or the text for --specialisation.

    Raises:
        ValueError: The text cannot be read, or an option does not fit the run.
    """
    _check_against_run(reader, args)
    if args.mode != "specialisation":
        text = as_text(args.prompt.split("\n"), reader.vocabulary)
        if args.mode == "experts" and len(text.words) == 1:
            raise ValueError("--experts: give a --prompt of at least one word")
        return text
    if args.of is None:
        lines = corpus.open_text(reader.data.text, streamed=True)["test"]
    else:
        lines = _lines_of(args.of)
    return as_text(list(_first_lines(args.read, lines)), reader.vocabulary)


def _check_against_run(reader: TextModel, args: argparse.Namespace) -> None:
    """Raises ValueError if an option does not fit the run's vocabulary or experts."""
    num_words = len(reader.vocabulary)
    num_experts = reader.layers.moe.num_experts
    if args.mode == "next" and args.next > num_words:
        raise ValueError(f"--next {args.next}: the vocabulary has {num_words} words; use fewer")
    if args.top is not None and args.top >= num_words:
        raise ValueError(
            f"--top {args.top} is out of range; use at most {num_words - 1}, "
            f"the vocabulary without {UNK}"
        )
    if args.mode in ("experts", "specialisation") and not reader.recorders:
        raise ValueError(
            f"--{args.mode}: {args.run} has no experts "
            f"(model.middle_layer={reader.layers.middle_layer!r})"
        )
    for expert in args.only or []:
        if not 0 <= expert < num_experts:
            raise ValueError(
                f"--only {' '.join(map(str, args.only))}: experts are 0 to {num_experts - 1}"
            )


def _lines_of(path: Path) -> list[str]:
    """Returns a file's lines with at least one word. Raises ValueError if there are none."""
    lines = [line for line in corpus.read_lines("--of", str(path), [path]) if tokenize(line)]
    if not lines:
        raise ValueError(f"--of {path}: contains no word")
    return lines


def _first_lines(num_words: int, lines: Iterable[str]) -> Iterator[str]:
    """Yields lines until they have at least `num_words` words; a line's end counts as a word."""
    words = 0
    for line in lines:
        if words >= num_words:
            return
        yield line
        words += len(tokenize(line)) + 1


def main(argv: list[str]) -> None:
    """Runs the command with the arguments after its name."""
    with plain_errors():
        args = command_line(argv)
        reader = TextModel(args.run)
        text = open_text(reader, args)
    MODES[args.mode].show(reader, text, args)


if __name__ == "__main__":
    main(sys.argv[1:])
