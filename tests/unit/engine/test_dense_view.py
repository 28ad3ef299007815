"""What DeepSpeed sees of a model, and what everybody else sees."""

import pytest
import torch
from runs import tiny

from moe_dist.config.schema import LSTMConfig
from moe_dist.distributed import mesh as meshes
from moe_dist.engine.dense_view import DenseView, experts_detached
from moe_dist.engine.parallelize import ParallelModel, parallelize
from moe_dist.models.lstm_lm import LSTMLanguageModel

ALONE = meshes.Axis(1, 0, None)  # type: ignore[arg-type]
ONE_RANK = meshes.Mesh(ALONE, ALONE, ALONE, 1, torch.device("cpu"), None, None)  # type: ignore[arg-type]
GATES = {"middle.experts.w_gate.w_gDb", "middle.experts.w_noise.w_gDb"}
EXPERTS = {"middle.experts.experts.w1_eDF", "middle.experts.experts.w2_eFD"}
ROWS = {"embedding.weight", "softmax.w_VD", "softmax.b_V"}


def parallel_model(dtype: torch.dtype) -> ParallelModel:
    config = tiny("model.moe.num_groups=4", "model.softmax_samples=20")
    assert isinstance(config.model, LSTMConfig)
    with torch.device("meta"):
        plain = LSTMLanguageModel(config.model, 50)
    return parallelize(plain, ONE_RANK, seed=0, dtype=dtype)


def test_experts_and_rows_are_in_the_module_tree() -> None:
    model = parallel_model(torch.float32)
    names = dict(model.module.named_parameters()).keys()
    assert GATES | EXPERTS | ROWS <= names == model.module.state_dict().keys()
    assert model.experts.keys() == EXPERTS and model.group_gates.keys() == GATES
    assert {name for table in model.row_tables.values() for name in table} == ROWS
    assert model.dense_parameters().keys() == names - GATES - EXPERTS - ROWS
    model.module.to(torch.float64)
    assert {p.dtype for p in model.experts.values()} == {torch.float64}


def test_the_view_has_dense_parameters_alone() -> None:
    model = parallel_model(torch.float32)
    view = DenseView(model)
    dense = model.dense_parameters()
    assert [name for name, _ in view.named_parameters()] == [f"model.{name}" for name in dense]
    assert [id(p) for p in view.parameters()] == [id(p) for p in dense.values()]


def test_detached_experts_are_not_cast_and_come_back_in_their_order() -> None:
    """As DeepSpeed casts a model to bf16; gates inside of groups stay in float32."""
    model = parallel_model(torch.float32)
    order = list(model.module.state_dict())
    with experts_detached(model):
        assert {
            name for name, _ in model.module.named_parameters()
        } == model.dense_parameters().keys()
        model.module.bfloat16()
    assert list(model.module.state_dict()) == order
    kept = {name: p.dtype for name, p in model.module.named_parameters()}
    assert {kept[name] for name in GATES | EXPERTS | ROWS} == {torch.float32}
    assert {kept[name] for name in model.dense_parameters()} == {torch.bfloat16}


def test_they_come_back_after_an_exception() -> None:
    model = parallel_model(torch.float32)
    order = list(model.module.state_dict())
    with pytest.raises(RuntimeError), experts_detached(model):
        raise RuntimeError
    assert list(model.module.state_dict()) == order


def test_table_with_two_parents_is_hidden_from_both() -> None:
    model = parallel_model(torch.float32)
    model.module.head = torch.nn.Sequential(model.module.embedding)
    with experts_detached(model):
        assert "head.0.weight" not in model.module.state_dict()
    assert "head.0.weight" in model.module.state_dict()
