"""The test for a diverged run: its loss against that of a uniform guess."""

import math
from typing import Any

import pytest
from runs import tiny, tiny_images, tiny_pretraining, tiny_sentences

from moe_dist.tasks.data_fit import DataFit
from moe_dist.tasks.image_classification import ImageClassification
from moe_dist.tasks.language_model import LanguageModel
from moe_dist.tasks.masked_lm import MaskedLM
from moe_dist.tasks.question_answering import QuestionAnswering
from moe_dist.tasks.text_base import TextTask
from moe_dist.tasks.text_classification import TextClassification
from moe_dist.training.nan_detector import divergence_reason


@pytest.mark.parametrize(
    ("values", "uniform", "says"),
    [
        ({"train/loss": math.nan, "test/loss": 3.0}, 4.0, "train/loss is not finite"),
        ({"train/loss": 3.0, "test/loss": math.inf}, 4.0, "test/loss is not finite"),
        ({"train/loss": 0.1, "test/loss": math.nan}, 0.0, "test/loss is not finite"),
        # 2 x 9 = 18 is more than 9 + 5
        (
            {"train/loss": 18.1, "test/loss": 3.0},
            9.0,
            "train/loss is 18.1, and that of a uniform guess 9",
        ),
        (
            {"train/loss": 17.9, "test/loss": 89.0},
            9.0,
            "",
        ),  # a little worse than a guess; learned by heart
        (
            {"test/loss": 90.1, "test/perplexity": math.inf},
            9.0,
            "test/loss is 90.1, and that of a uniform guess 9",
        ),
        # a step of 4 texts, 2 classes: a confident 6 nats for one of them and 0 for three are 1.5
        ({"train/loss": 1.5, "test/loss": 2.0}, math.log(2), ""),
        (
            {"train/loss": (20.0 + 0 + 0 + 0) / 4, "test/loss": 6.9},
            math.log(2),
            "",
        ),  # 0.69 + 5; 10 x 0.69
        (
            {"train/loss": 5.7, "test/loss": 2.0},
            math.log(2),
            "train/loss is 5.7, and that of a uniform guess 0.6931",
        ),
        ({"test/loss": 7.0}, math.log(2), "test/loss is 7, and that of a uniform guess 0.6931"),
        (
            {"train/loss": 5e6},
            math.log(300),
            "train/loss is 5e+06, and that of a uniform guess 5.704",
        ),
        # scores whose labels are all 0, of which a guess of 0 is right
        ({"train/loss": 0.3, "test/loss": 4.9}, 0.0, ""),
        (
            {"train/loss": 5.1, "test/loss": 0.1},
            0.0,
            "train/loss is 5.1, and that of a uniform guess 0",
        ),
        ({"train/loss": -0.1, "test/loss": 0.0}, 4.0, ""),
        ({}, 4.0, ""),
        ({}, 0.0, ""),
    ],
)
def test_run_has_diverged_if_its_loss_is_far_above_a_guess(
    values: dict[str, float], uniform: float, says: str
) -> None:
    assert divergence_reason(values, uniform) == says


@pytest.mark.parametrize(
    ("task", "config", "expected"),
    [
        (LanguageModel, tiny(), math.log(300)),
        (ImageClassification, tiny_images(), math.log(10)),
        (MaskedLM, tiny_pretraining(), math.log(600) + math.log(2)),
        (TextClassification, tiny_sentences("model.num_classes=1"), math.log(2)),
        (QuestionAnswering, tiny_pretraining(), math.log(24)),
    ],
)
def test_each_task_defines_the_loss_of_a_uniform_guess(
    task: Any, config: Any, expected: float
) -> None:
    one = object.__new__(task)
    if issubclass(task, TextTask):
        one.fit = DataFit(config, ())
    else:
        one.config = config
    assert one.uniform_loss == pytest.approx(expected)
