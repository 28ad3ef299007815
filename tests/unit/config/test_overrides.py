"""Configs: fields set by name, JSON, and their documentation."""

import dataclasses
import inspect
import json
import re

import pytest
from runs import tiny

from moe_dist.config import papers, schema
from moe_dist.config.overrides import SYNONYMS, dotted_keys, from_json, override, to_json
from moe_dist.config.schema import Config


def test_override_sets_every_kind_of_field() -> None:
    config = override(
        papers.get("lstm_moe_demo"),
        [
            "mesh.ep=2",
            "optim.lr=1e-4",
            "model.moe.noise=false",
            "zero_stage=3",
            "optim.max_grad_norm=none",
            "data.text=a=b",
        ],
    )
    assert (config.mesh.ep, config.optim.lr, config.model.moe.noise) == (2, 1e-4, False)
    assert (config.zero_stage, config.optim.max_grad_norm, config.data.text) == (3, None, "a=b")
    assert override(config, ["zero_stage=none"]).zero_stage is None


@pytest.mark.parametrize(
    ("name", "key", "says"),
    [
        # other programs' names, in the right section, in another one, and in none
        ("lstm_moe_demo", "optim.learning_rate", "did you mean 'optim.lr'?"),
        ("lstm_moe_demo", "train.batch-size", "did you mean 'batch.global_batch_size'?"),
        ("widenet_demo", "num_epochs", "did you mean 'steps'?"),
        ("widenet_text_demo", "vocab_size", "did you mean 'model.vocabulary_size'?"),
        ("lstm_moe_demo", "data.vocab_size", "did you mean 'data.vocabulary_size'?"),
        ("lstm_moe_demo", "model.num_experts_per_tok", "did you mean 'model.moe.k'?"),
        # a field in another section
        ("widenet_demo", "model.num_experts", "did you mean 'model.encoder.moe.num_experts'?"),
        ("widenet_demo", "weight_decay", "did you mean 'optim.weight_decay'?"),
        # a slip
        ("lstm_moe_demo", "optim.wieght_decay", "did you mean 'optim.weight_decay'?"),
        # nothing near: the fields of its section, or all
        ("lstm_moe_demo", "data.path", "known: data.streamed, data.text, data.vocabulary_size"),
        ("lstm_moe_demo", "foo", "known: async_save, baseline, batch.balance_loss_group_size, "),
    ],
)
def test_unknown_field_names_the_nearest(name: str, key: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"no field {key!r}; {says}")):
        override(papers.get(name), [f"{key}=1"])


def test_every_synonym_names_a_field() -> None:
    every = [papers.get(name) for name in ("lstm_moe_demo", "widenet_demo", "widenet_squad")]
    last_parts = {key.rpartition(".")[2] for config in every for key in dotted_keys(config)}
    assert last_parts.issuperset(SYNONYMS.values()) and last_parts.isdisjoint(SYNONYMS)


@pytest.mark.parametrize("name", papers.CONFIGS)
def test_json_round_trip_of_every_config(name: str) -> None:
    config = papers.get(name)
    assert config.name == name and from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optim": {"rate": 1}}, "no field 'optim.rate'"),
        ({"steps": "many"}, "steps='many', expected a whole number"),
        ({"mesh": 3}, "mesh is 3, expected an object"),
        ({"data": {"text": 1}}, "data.text=1, expected text"),
    ],
)
def test_invalid_json_is_rejected(change: dict, says: str) -> None:
    with pytest.raises(ValueError) as error:
        from_json(json.dumps(dataclasses.asdict(tiny()) | change))
    assert says in str(error.value)
    with pytest.raises(ValueError, match="expected an object"):
        from_json("[]")


def test_every_field_can_be_set() -> None:
    assert {
        "mesh.ep",
        "model.moe.capacity_factor",
        "batch.grad_accum_steps",
        "wandb.mode",
        "ds_config",
        "zero_stage",
    } <= set(dotted_keys(tiny()))


def test_every_field_is_documented_in_order() -> None:
    """The reference page of the config is made from the `Attributes:` sections."""
    sections = [each for each in vars(schema).values() if dataclasses.is_dataclass(each)]
    assert Config in sections and len(sections) == 17
    for section in sections:
        _, _, attributes = inspect.getdoc(section).partition("Attributes:\n")
        documented = re.findall(r"^ {4}(\w+): ", attributes, re.MULTILINE)
        assert documented == [field.name for field in dataclasses.fields(section)], section
