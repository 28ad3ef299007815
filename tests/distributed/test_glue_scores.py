"""GLUE scores against plain formulas over all predictions, on any layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Run, tiny_sentences

from moe_dist.data.text import sentences
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.spawn import run_distributed
from moe_dist.tasks import text_classification
from moe_dist.training.evaluate import evaluate


@pytest.mark.timeout(200)
def test_glue_scores_of_any_layout_are_those_of_all_predictions(tmp_path: Path) -> None:
    """37 test texts in steps of 16: the last step has padding."""
    words = ["good", "bad", "fine", "dull", "long"]
    for name, label in (
        ("two", lambda i: (i % 5 in (0, 2)) != (i % 7 == 0)),
        ("scores", lambda i: i % 5 + i % 3 / 2),
    ):
        for split, size in (("train", 60), ("validation", 20), ("test", 37)):
            rows = [
                {
                    "text": f"{words[i % 5]} {words[i * i % 5]} {words[i // 5 % 5]}",
                    "label": label(i),
                }
                for i in range(size)
            ]
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
    one = run_distributed(measured, 1, tmp_path, 1, timeout=90)[0]
    for two in run_distributed(measured, 2, tmp_path, 2, timeout=90):
        for kind, (told, *_) in two.items():
            assert told == pytest.approx(one[kind][0], rel=1e-5, abs=1e-5), kind
    for kind in ("matthews", "f1"):
        told, said, right = one[kind]
        assert 0 < sum(said) < len(said) == 37, "no constant"
        assert told["test/accuracy"] == pytest.approx(np.mean(np.equal(said, right)))
        both = [s and r for s, r in zip(said, right, strict=True)]
        # the correlation of zeros and ones is Matthews'; F1 = 2 |both| / (|said| + |right|)
        expected = (
            np.corrcoef(said, right)[0, 1]
            if kind == "matthews"
            else 2 * sum(both) / (sum(said) + sum(right))
        )
        assert told[f"test/{kind}"] == pytest.approx(expected, rel=1e-6)
    told, said, right = one["scores"]
    assert told["test/loss"] == pytest.approx(np.square(np.subtract(said, right)).mean(), rel=1e-5)
    assert told["test/pearson"] == pytest.approx(np.corrcoef(said, right)[0, 1], rel=1e-6)
    ranks = [
        [sum(v < w for v in vs) + (sum(v == w for v in vs) + 1) / 2 for w in vs]
        for vs in (said, right)
    ]
    assert told["test/spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-6)


def measured(folder: Path, ep: int) -> dict[str, Any]:
    """Returns the scores after some steps and, on one rank, every prediction with its target."""
    meshes.init_process_group()
    found = {}
    for kind in ("matthews", "f1", "scores"):
        source = str(folder / ("scores" if kind == "scores" else "two"))
        text_classification.GLUE_MEASURES = {} if kind == "scores" else {source: kind}
        sentences.REGRESSION_TASKS = text_classification.REGRESSION_TASKS = (
            (source,) if kind == "scores" else ()
        )
        sets = [
            f"data.sentences={source}",
            "batch.global_batch_size=16",
            "optim.lr=1e-2",
            f"mesh.ep={ep}",
        ]
        run = Run(tiny_sentences(*sets, "model.encoder.moe.capacity_factor=none")).steps(0, 12)
        told = evaluate(run.engine, run.task, "test", run.mesh)
        said, right = [], []
        for (batch,) in run.task.eval_batches("test"):
            with torch.no_grad():
                logit_BC, _ = run.engine(batch.token_BS, batch.kind_BS, batch.ctx)
            said += (logit_BC[:, 0] if kind == "scores" else logit_BC.argmax(1)).tolist()
            right += batch.targets[0].tolist()
        kept = [i for i, target in enumerate(right) if target != -100]
        found[kind] = (told, [said[i] for i in kept], [right[i] for i in kept])
    meshes.shutdown()
    return found
