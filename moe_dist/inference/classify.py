"""Classes of images or sentences by a trained run, with probabilities.

    python -m moe_dist.inference classify runs/NAME pictures/ holiday.png
    python -m moe_dist.inference classify runs/NAME --sentences reviews.txt
    python -m moe_dist.inference classify runs/NAME --text "a fine film" --top 1

Every image or sentence is a token group of its own, so that what others there are does not decide what an expert has
room for.

Legend: B images or sentences, S tokens of each, C classes.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moe_dist.config.arg_parser import Parser, path_argument
from moe_dist.config.schema import ImageDataConfig, VisionConfig
from moe_dist.data.files.messages import columns_of, printable
from moe_dist.data.files.read import read_rows
from moe_dist.data.images.image_files import check_heads, format_left_out, list_images
from moe_dist.data.images.pipeline import read_image
from moe_dist.data.text.sentences import Sentence, Sentences
from moe_dist.data.text.wordpiece import WordPieceTokenizer
from moe_dist.inference.load import open_run
from moe_dist.monitoring import progress_bar
from moe_dist.nn.token_context import TokenContext
from moe_dist.training.errors import plain_errors

AT_ONCE = 32


class Classifier:
    """The model of a run, and what its classes are called."""

    def __init__(self, folder: Path) -> None:
        """Raises what `reader.open_run` does, and ValueError for a run of another task."""
        self.config, self.model, state = open_run(folder)
        tasks = ("image_classification", "text_classification")
        if self.config.task not in tasks:
            raise ValueError(f"{folder}: a run of task={self.config.task}, which has no classes")
        self.of_images = self.config.task == tasks[0]
        self.names: list[str] = state["classes"]
        if not self.names:
            raise ValueError(f"{folder}: a run that gives scores, and has no classes")
        self.pairs = bool(state.get("pairs"))
        self.tokens = None if self.of_images else WordPieceTokenizer.from_json(state["tokens"])

    @torch.no_grad()
    def probabilities(self, items: list[Any]) -> torch.Tensor:
        """Of each class for image files (paths) or sentences: (B, C). Raises ValueError for one that cannot be read."""
        logit_BC = (self._of_images(items) if self.of_images else self._of_sentences(items))[
            :, : len(self.names)
        ]
        return logit_BC.float().softmax(1)

    def _of_images(self, paths: list[Path]) -> torch.Tensor:
        data, model = self.config.data, self.config.model
        assert isinstance(data, ImageDataConfig) and isinstance(model, VisionConfig)
        image_BQYX = torch.stack(
            [read_image(path, data, model.image_size, model.channels) for path in paths]
        )
        valid_BS = torch.ones(len(paths), self.model.num_tokens, dtype=torch.bool)
        return self.model(image_BQYX, _context(valid_BS))[0]

    def _of_sentences(self, sentences: list[str]) -> torch.Tensor:
        assert self.tokens is not None
        pairs = [Sentence(*self._parts(sentence), 0) for sentence in sentences]
        read = Sentences(pairs, self.tokens, self.model.num_tokens, len(sentences))
        token_BS, kind_BS, valid_BS, _ = read.batch(0, range(len(sentences)))
        return self.model(token_BS, kind_BS, _context(valid_BS))[0]

    def _parts(self, sentence: str) -> tuple[str, str | None]:
        """Raises ValueError where it is not what the run was trained on."""
        first, tab, second = sentence.partition("\t")
        if bool(tab) != self.pairs:
            what = (
                "pairs of sentences: put a tab between them"
                if self.pairs
                else "sentences, which have no tab"
            )
            raise ValueError(f"{sentence!r}: the run was trained on {what}")
        return first, second if self.pairs else None


def _context(valid_BS: torch.Tensor) -> TokenContext:
    num, tokens = valid_BS.shape
    sample_T = torch.arange(num).repeat_interleave(tokens)
    return TokenContext(
        sample_T=sample_T,
        position_T=torch.arange(tokens).repeat(num),
        valid_T=valid_BS.flatten(),
        seed=0,
        step=0,
        train=False,
        first_sample=0,
        num_samples=num,
        balance_loss_group_size=num,
        capacity_group_size=1,
    )


def images_of(paths: Iterable[Path]) -> list[Path]:
    """Returns the image files given, and those of the folders given, sorted. What is left out is told on stderr.

    Raises:
        ValueError: for what is not there or cannot be listed, and for no image at all.
    """
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            [files], more = list_images([path])
            found += map(Path, files)
            left_out += more
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder")
    if not found:
        raise ValueError(
            f"no image there ({format_left_out(left_out) or 'the folder is empty'}): give image files"
        )
    if left_out:
        print(f"note: {format_left_out(left_out)}", file=sys.stderr)
    check_heads(progress_bar.with_progress(found, "image files"))
    return found


def _sentences_of(file: str | None, text: str | None) -> list[str]:
    """Returns `text`, or the lines of a file that hold a word; of rows the columns text and text2, with a tab between.

    Raises:
        ValueError: The file cannot be read or holds no word, or something is no text.
    """
    if text is not None:
        found = [text]
    elif file == "-":
        found = [line.strip() for line in sys.stdin]
    else:
        assert file is not None
        try:
            rows = list(read_rows(Path(file), ["text", "text2"]))
        except ValueError as error:
            raise ValueError(f"--sentences {error}") from None
        if rows and not isinstance(rows[0].get("text"), str):
            raise ValueError(
                f"--sentences {file}: no column 'text', only {columns_of(rows[0])}: name it so"
            )
        found = [
            "\t".join(str(row[name]).strip() for name in ("text", "text2") if row.get(name))
            for row in rows
        ]
    if any("\ud800" <= letter <= "\udfff" for sentence in found for letter in sentence):
        raise ValueError("a sentence is not text in this terminal's encoding; give UTF-8")
    if text is None and not any(found):
        raise ValueError(f"--sentences {file}: no line with a word")
    kept = [sentence for sentence in found if sentence or text is not None]
    if empty := len(found) - len(kept):
        print(
            f"note: {empty} of {len(found)} lines or rows have no text and are left out",
            file=sys.stderr,
        )
    return kept


def classify(classifier: Classifier, items: list[Any], top: int) -> Iterator[dict[str, Any]]:
    """{"item", "classes": the `top` most probable with their probabilities, the first one first} of each."""
    with tqdm(total=len(items), unit=classifier.config.task[:5], disable=None, leave=False) as bar:
        for first in range(0, len(items), AT_ONCE):
            some = items[first : first + AT_ONCE]
            value_Bk, class_Bk = classifier.probabilities(some).topk(
                min(top, len(classifier.names))
            )
            for item, values, classes in zip(
                some, value_Bk.tolist(), class_Bk.tolist(), strict=True
            ):
                told = {
                    classifier.names[i]: value for i, value in zip(classes, values, strict=True)
                }
                name = (
                    str(item).encode("utf-8", "backslashreplace").decode()
                )  # a file's name may be no UTF-8
                yield {"item": name, "classes": told}
            bar.update(len(some))


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=path_argument, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "images",
        type=path_argument,
        nargs="*",
        metavar="IMAGE",
        help="image files, and folders of them",
    )
    parser.add_argument(
        "--sentences", metavar="FILE", help="a sentence a line; - is standard input"
    )
    parser.add_argument("--text", help="one sentence")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="most probable classes (3)")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    args = parser.parse_args(argv)
    with plain_errors():
        if args.top < 1:
            raise ValueError(f"--top {args.top}: at least 1")
        if (bool(args.images), args.sentences is not None, args.text is not None).count(True) != 1:
            raise ValueError("give one of: IMAGE ..., --sentences FILE, --text TEXT")
        classifier = Classifier(args.run)
        if classifier.of_images != bool(args.images):
            raise ValueError(
                f"{args.run} classifies {'images' if classifier.of_images else 'sentences'}: give some"
            )
        items: list[Any] = (
            images_of(args.images) if args.images else _sentences_of(args.sentences, args.text)
        )
        for told in classify(classifier, items, args.top):
            best = "  ".join(
                f"{100 * value:5.1f} % {name}" for name, value in told["classes"].items()
            )
            tqdm.write(
                json.dumps(told) if args.json else f"{best}    {printable(told['item'])}",
                file=sys.stdout,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
