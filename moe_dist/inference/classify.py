"""Classifies images or sentences with a trained run, and prints probabilities.

    python -m moe_dist.inference classify runs/NAME pictures/ holiday.png
    python -m moe_dist.inference classify runs/NAME --sentences reviews.txt
    python -m moe_dist.inference classify runs/NAME --text "a fine film" --top 1

Expert capacity is counted within each image or sentence, so the result for one does not
depend on the others.

Legend: B images or sentences, S tokens per item, C classes.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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

ITEMS_PER_BATCH = 32
TASKS_WITH_CLASSES = ("image_classification", "text_classification")


@dataclass(frozen=True)
class Classification:
    """An item's most probable classes.

    Attributes:
        item: The image's path, or the sentence.
        classes: Probability by class, the most probable class first.
    """

    item: str
    classes: dict[str, float]


class Classifier:
    """A run's model and its class names.

    Attributes:
        config: The run's config.
        model: The model.
        of_images: True if it classifies images, False if sentences.
        names: Class names.
        pairs: True if the run was trained on sentence pairs.
        tokens: The tokenizer; None for images.
    """

    def __init__(self, folder: Path) -> None:
        """Loads a run.

        Args:
            folder: The run folder.

        Raises:
            ValueError: As `open_run`, or the run has no classes.
        """
        self.config, self.model, state = open_run(folder)
        if self.config.task not in TASKS_WITH_CLASSES:
            raise ValueError(f"{folder}: a run of task={self.config.task}, which has no classes")
        self.of_images = self.config.task == "image_classification"
        self.names: list[str] = state["classes"]
        if not self.names:
            raise ValueError(f"{folder}: a run that predicts scores, and has no classes")
        self.pairs = bool(state.get("pairs"))
        self.tokens = None
        if not self.of_images:
            self.tokens = WordPieceTokenizer.from_json(state["tokens"])

    @torch.no_grad()
    def probabilities(self, items: list[Any]) -> torch.Tensor:
        """Computes each class's probability.

        Args:
            items: Image paths, or sentences.

        Returns:
            Probabilities, (B, C), float32.

        Raises:
            ValueError: An item cannot be read.
        """
        logit_BC = self._image_logits(items) if self.of_images else self._sentence_logits(items)
        # the model may have more outputs than there are classes in the data
        return logit_BC[:, : len(self.names)].float().softmax(1)

    def _image_logits(self, paths: list[Path]) -> torch.Tensor:
        """Returns the model's outputs for image files."""
        data = self.config.data
        model = self.config.model
        assert isinstance(data, ImageDataConfig)
        assert isinstance(model, VisionConfig)
        images = [read_image(path, data, model.image_size, model.channels) for path in paths]
        valid_BS = torch.ones(len(paths), self.model.num_tokens, dtype=torch.bool)
        return self.model(torch.stack(images), _context(valid_BS))[0]

    def _sentence_logits(self, sentences: list[str]) -> torch.Tensor:
        """Returns the model's outputs for sentences."""
        assert self.tokens is not None
        pairs = [Sentence(*self._split_pair(sentence), 0) for sentence in sentences]
        dataset = Sentences(pairs, self.tokens, self.model.num_tokens, len(sentences))
        token_BS, kind_BS, valid_BS, _ = dataset.batch(0, range(len(sentences)))
        return self.model(token_BS, kind_BS, _context(valid_BS))[0]

    def _split_pair(self, sentence: str) -> tuple[str, str | None]:
        """Splits a pair at its tab; ValueError if only the item or only the run is single."""
        first, tab, second = sentence.partition("\t")
        if self.pairs and not tab:
            raise ValueError(
                f"{sentence!r}: the run was trained on pairs of sentences; put a tab between them"
            )
        if tab and not self.pairs:
            raise ValueError(
                f"{sentence!r}: the run was trained on single sentences, which have no tab"
            )
        return first, second if self.pairs else None


def _context(valid_BS: torch.Tensor) -> TokenContext:
    """Returns the context for B samples with S tokens; each sample is a capacity group."""
    num_samples, tokens = valid_BS.shape
    return TokenContext(
        sample_T=torch.arange(num_samples).repeat_interleave(tokens),
        position_T=torch.arange(tokens).repeat(num_samples),
        valid_T=valid_BS.flatten(),
        seed=0,
        step=0,
        train=False,
        first_sample=0,
        num_samples=num_samples,
        balance_loss_group_size=num_samples,
        capacity_group_size=1,
    )


def images_of(paths: Iterable[Path]) -> list[Path]:
    """Returns image files. A note on stderr lists a folder's other files, which are left out.

    Args:
        paths: Image files, and folders with image files.

    Returns:
        The files in the order of `paths`; a folder's files are sorted.

    Raises:
        ValueError: A path does not exist or cannot be listed, or no file is an image.
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
        reason = format_left_out(left_out) or "the folder is empty"
        raise ValueError(f"no image there ({reason}): give image files")
    if left_out:
        print(f"note: {format_left_out(left_out)}", file=sys.stderr)
    check_heads(progress_bar.with_progress(found, "image files"))
    return found


def _sentences_of(file: str | None, text: str | None) -> list[str]:
    """Returns the sentences from --sentences or --text, without a file's empty lines.

    Raises ValueError if the file cannot be read or has no word, or if a sentence is not text.
    """
    if text is not None:
        _check_encoding([text])
        return [text]
    assert file is not None
    sentences = [line.strip() for line in sys.stdin] if file == "-" else _read_sentences(file)
    _check_encoding(sentences)
    if not any(sentences):
        raise ValueError(f"--sentences {file}: no line with a word")
    kept = [sentence for sentence in sentences if sentence]
    num_empty = len(sentences) - len(kept)
    if num_empty:
        print(
            f"note: {num_empty} of {len(sentences)} lines or rows have no text and are left out",
            file=sys.stderr,
        )
    return kept


def _read_sentences(file: str) -> list[str]:
    """Reads a file's lines, or for a table each row's text and text2 with a tab between."""
    try:
        rows = list(read_rows(Path(file), ["text", "text2"]))
    except ValueError as error:
        raise ValueError(f"--sentences {error}") from None
    if rows and not isinstance(rows[0].get("text"), str):
        raise ValueError(
            f"--sentences {file}: no column 'text', only {columns_of(rows[0])}; "
            "rename a column to 'text'"
        )
    sentences = []
    for row in rows:
        parts = [str(row[name]).strip() for name in ("text", "text2") if row.get(name)]
        sentences.append("\t".join(parts))
    return sentences


def _check_encoding(sentences: list[str]) -> None:
    """Raises ValueError for surrogates, which stand for bytes that cannot be decoded."""
    for sentence in sentences:
        if any("\ud800" <= letter <= "\udfff" for letter in sentence):
            raise ValueError("a sentence is not text in this terminal's encoding; give UTF-8")


def classify(classifier: Classifier, items: list[Any], top: int) -> Iterator[Classification]:
    """Classifies items in batches, with a progress bar.

    Args:
        classifier: The classifier.
        items: Image paths, or sentences.
        top: Number of classes to return per item.

    Yields:
        One result per item, in order.
    """
    num_classes = min(top, len(classifier.names))
    with tqdm(total=len(items), unit=classifier.config.task[:5], disable=None, leave=False) as bar:
        for first in range(0, len(items), ITEMS_PER_BATCH):
            batch = items[first : first + ITEMS_PER_BATCH]
            value_Bk, class_Bk = classifier.probabilities(batch).topk(num_classes)
            for item, values, classes in zip(
                batch, value_Bk.tolist(), class_Bk.tolist(), strict=True
            ):
                names = [classifier.names[index] for index in classes]
                # a file's name may contain bytes outside UTF-8
                printable_item = str(item).encode("utf-8", "backslashreplace").decode()
                yield Classification(printable_item, dict(zip(names, values, strict=True)))
            bar.update(len(batch))


def _parser() -> Parser:
    """Returns the command line's parser."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", type=path_argument, metavar="RUN", help="folder of the run")
    add(
        "images",
        type=path_argument,
        nargs="*",
        metavar="IMAGE",
        help="image files, and folders of image files",
    )
    add("--sentences", metavar="FILE", help="a file with one sentence a line; - is standard input")
    add("--text", help="one sentence")
    add("--top", type=int, default=3, metavar="K", help="number of classes to print (3)")
    add("--json", action="store_true", help="prints one JSON object a line")
    return parser


def _check_args(args: argparse.Namespace) -> None:
    """Raises ValueError for options out of range or incompatible options."""
    if args.top < 1:
        raise ValueError(f"--top {args.top} is out of range; use at least 1")
    inputs = [bool(args.images), args.sentences is not None, args.text is not None]
    if inputs.count(True) != 1:
        raise ValueError("give one of: IMAGE ..., --sentences FILE, --text TEXT")


def main(argv: list[str]) -> None:
    """Runs the command with the arguments after its name."""
    args = _parser().parse_args(argv)
    with plain_errors():
        _check_args(args)
        classifier = Classifier(args.run)
        if classifier.of_images != bool(args.images):
            kind = "images" if classifier.of_images else "sentences"
            raise ValueError(f"{args.run} classifies {kind}; give {kind}")
        for result in classify(classifier, _items(args), args.top):
            tqdm.write(_format(result, args.json), file=sys.stdout)


def _items(args: argparse.Namespace) -> list[Any]:
    """Returns the image files or the sentences given on the command line."""
    if args.images:
        return images_of(args.images)
    return _sentences_of(args.sentences, args.text)


def _format(result: Classification, as_json: bool) -> str:
    """Returns an item's output line."""
    if as_json:
        return json.dumps({"item": result.item, "classes": result.classes})
    classes = [f"{100 * value:5.1f} % {name}" for name, value in result.classes.items()]
    return f"{'  '.join(classes)}    {printable(result.item)}"


if __name__ == "__main__":
    main(sys.argv[1:])
