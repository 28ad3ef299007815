"""GLUE scores by hand, and their text format."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.data.text import sentences
from moe_dist.data.text.sentences import open_sentences
from moe_dist.monitoring.metric_format import format_metric, primary_metric
from moe_dist.tasks import text_classification
from moe_dist.tasks.scores import f1, matthews, pearson, spearman
from moe_dist.training.evaluate import evaluate_test


def test_matthews_and_f1_by_hand() -> None:
    # of 20: 6 right positives, 2 too many, 1 missed, 11 right negatives
    # (6 x 11 - 2 x 1) / sqrt(8 x 7 x 13 x 12) = 64 / sqrt(8736) = 64 / 93.4666
    assert matthews(6, 2, 1, 11) == pytest.approx(64 / 93.46657, rel=1e-6)
    # the example of scikit-learn's documentation: true + + + -, said + - + +: tp 2, fp 1, fn 1, tn
    # 0
    assert matthews(2, 1, 1, 0) == pytest.approx(-1 / 3)
    assert matthews(5, 0, 0, 4) == 1 and matthews(0, 5, 4, 0) == -1
    assert matthews(7, 3, 0, 0) == 0, "one class is said of all"
    # precision 6/8, recall 6/7: 2 x 6 / (12 + 3)
    assert f1(6, 2, 1) == pytest.approx(0.8)
    assert f1(0, 0, 0) == f1(0, 3, 2) == 0


def test_correlations_by_hand() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 6.0])
    # deviations -1.5 -0.5 0.5 1.5 and -2 0 -1 3: 7 / sqrt(5 x 14)
    assert pearson(x, y) == pytest.approx(7 / 70**0.5)
    # ranks 1 2 3 4 and 1 3 2 4: 1 - 6 (0 + 1 + 1 + 0) / (4 x 15)
    assert spearman(x, y) == pytest.approx(0.8)
    # a tie has the mean of its ranks, 1.5 1.5 3 4: 4.5 / sqrt(5 x 4.5)
    assert spearman(x, np.array([2.0, 2.0, 5.0, 9.0])) == pytest.approx(4.5 / 22.5**0.5)
    assert spearman(x, -(x**3)) == pytest.approx(-1) and pearson(x, 7 * x - 2) == pytest.approx(1)
    assert pearson(x, np.full(4, 3.0)) == spearman(np.zeros(4), x) == 0, "constant"


def test_scores_have_one_text_format() -> None:
    assert format_metric("accuracy", 0.40625) == "40.62 %" and format_metric("f1", 0.5) == "50.00 %"
    assert (
        format_metric("matthews", -0.12345) == "-0.1235" and format_metric("pearson", 1) == "1.0000"
    )
    assert (
        format_metric("loss", 1.2345678) == "1.235"
        and format_metric("perplexity", float("inf"), ".2f") == "inf"
    )
    keys = ["valid/accuracy", "valid/f1", "train/accuracy", "test/loss"]
    assert [primary_metric(keys, split) for split in ("valid", "train", "test")] == [
        "f1",
        "accuracy",
        None,
    ]


def test_mnli_has_two_test_splits() -> None:
    class Task:
        test_splits = ("test", "mismatched")

    asked = []

    def told(engine: Any, task: Any, split: str, mesh: Any) -> dict[str, float]:
        asked.append(split)
        return {f"{split}/accuracy": 0.5}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_dist.training.evaluate.evaluate", told)
        result = evaluate_test(None, Task(), None)  # type: ignore[arg-type]
    assert result == {"test/accuracy": 0.5, "mismatched/accuracy": 0.5} and asked == [
        "test",
        "mismatched",
    ]
    task = object.__new__(text_classification.TextClassification)
    task.has_scores = False
    line = task.format_result(result | {"test/accuracy": 0.825, "test/loss": 0.5})
    assert line == "test accuracy 82.50 %    mismatched 50.00 %    loss 0.5000 nats per text"


@pytest.mark.parametrize("label", ['"high"', "true", "1e300", "NaN", "null"])
def test_invalid_scores_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    source = str(tmp_path / "x.jsonl")
    monkeypatch.setattr(sentences, "REGRESSION_TASKS", (source,))
    (tmp_path / "x.jsonl").write_text(
        '{"text": "a", "label": 1.5}\n' + f'{{"text": "b", "label": {label}}}\n'
    )
    with pytest.raises(ValueError, match=r"row 2 of 'train' has label .*: give a number"):
        open_sentences(source)
