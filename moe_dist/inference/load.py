"""A trained run read back for use: the next word's probabilities, and the experts that a text visits.

The newest checkpoint of a run folder, whatever layout and precision wrote it, in one process, on CPU, in float32. A
text is read with neither noise nor dropout, and with the state carried.

Legend: T words of a text, V vocabulary, D width, K experts that a word visits (k², with groups), E experts of a layer,
M visits of one expert, N assignments.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moe_dist.checkpoint.format import read_state
from moe_dist.checkpoint.manifest import newest_complete
from moe_dist.checkpoint.sealed_config import read_config
from moe_dist.checkpoint.single_process import load_weights
from moe_dist.config.overrides import value_of
from moe_dist.config.schema import Config, LSTMConfig, TextDataConfig
from moe_dist.inference.expert_usage import ExpertAssignments, RecordingDispatcher
from moe_dist.models.lstm_lm import State, state_widths
from moe_dist.moe.hierarchical import ExpertGroups
from moe_dist.moe.layer import MoE
from moe_dist.nn.token_context import TokenContext
from moe_dist.tasks.language_model import saved_vocabulary
from moe_dist.tasks.registry import task_of

WINDOW = 512  # words read at once


def open_run(folder: Path) -> tuple[Config, Any, dict[str, Any]]:
    """The config of a run, its model with the weights of the newest whole checkpoint, on CPU, and the state beside it.

    Raises ValueError for a folder without a config or checkpoint, or where the two do not fit together."""
    config, note = read_config(folder)
    if note:
        print(f"note: {note}", file=sys.stderr)
    newest, refused = newest_complete(folder)
    for reason in refused.values():
        print(f"warning: {reason}. Refused; reading {newest.name}", file=sys.stderr)
    state = read_state(newest)
    _check_kept(newest, config, state)
    model = task_of(config).build_model(config).to_empty(device="cpu")
    load_weights(newest, model)
    return config, model, state


def _check_kept(checkpoint: Path, config: Config, state: dict[str, Any]) -> None:
    """Raises ValueError where a value that the task needs is missing in a checkpoint, or does not fit the model."""
    kept = task_of(config).required_metadata
    if missing := [key for key in kept if key not in state]:
        raise ValueError(
            f"{checkpoint}: keeps no {', '.join(missing)}, which a run of task={config.task} needs"
        )
    if "vocabulary" in kept:
        _check_size(
            checkpoint, config, "data.vocabulary_size", "words", len(state["vocabulary"]["words"])
        )
    if "tokens" in kept:
        _check_size(
            checkpoint, config, "model.vocabulary_size", "tokens", len(json.loads(state["tokens"]))
        )
    if "classes" in kept and len(state["classes"]) > (
        most := value_of(config, "model.num_classes")
    ):
        raise ValueError(
            f"{checkpoint}: has {len(state['classes'])} classes, and model.num_classes of config.json is {most}"
        )


def _check_size(checkpoint: Path, config: Config, key: str, what: str, size: int) -> None:
    if size != (expected := value_of(config, key)):
        raise ValueError(f"{checkpoint}: has {size} {what}, and {key} of config.json is {expected}")


class TextModel:
    """The model of a run, which reads a text."""

    def __init__(self, folder: Path) -> None:
        """Raises what `open_run` does, and ValueError for a run of another task."""
        self.config, self.model, state = open_run(folder)
        config = self.config
        if not isinstance(config.model, LSTMConfig):
            raise ValueError(
                f"{folder}: a run of task={config.task}; only a language model continues a text"
            )
        assert isinstance(config.data, TextDataConfig)
        self.layers, self.data = config.model, config.data
        self.vocabulary = saved_vocabulary(state)
        self.recorders: dict[str, RecordingDispatcher] = {}  # by layer
        for name, layer in self.model.named_modules():
            if isinstance(layer, MoE):
                innermost = layer.experts if isinstance(layer.experts, ExpertGroups) else layer
                innermost.dispatcher = self.recorders[name] = RecordingDispatcher()

    def initial_state(self) -> State:
        """The state before a text's first word."""
        widths = state_widths(self.layers)
        return tuple((torch.zeros(1, 1, h), torch.zeros(1, 1, c)) for h, c in widths)

    @torch.no_grad()
    def read(self, word_T: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """Words (T,) -> the log-probabilities (V,) of the word after them, in nats, and the state there."""
        num = len(word_T)
        position_T = torch.arange(num)
        # a word is a sample of its own: capacity is then counted within a word, drops nothing, and a text may be read
        # in any parts
        ctx = TokenContext(
            sample_T=position_T,
            position_T=position_T,
            valid_T=torch.ones(num, dtype=torch.bool),
            seed=0,
            step=0,
            train=False,
            first_sample=0,
            num_samples=num,
            balance_loss_group_size=num,
            capacity_group_size=1,
        )
        x_TD, state, _ = self.model.read(word_T[None], state, ctx)
        return self.model.softmax.log_probability(x_TD[-1:])[0], state

    def expert_assignments(self, word_T: torch.Tensor) -> dict[str, ExpertAssignments]:
        """Of a whole text, by layer."""
        state = self.initial_state()
        parts: dict[str, list[ExpertAssignments]] = {name: [] for name in self.recorders}
        with tqdm(
            total=len(word_T), desc="reading", unit=" words", disable=None, leave=False
        ) as bar:
            for part_T in word_T.split(WINDOW):
                _, state = self.read(part_T, state)
                for name, watched in self.recorders.items():
                    parts[name].append(watched.assignments)
                bar.update(len(part_T))
        return {
            name: ExpertAssignments(
                torch.cat([v.expert_TK for v in of]),
                torch.cat([v.weight_TK for v in of]),
                of[0].num_experts,
            )
            for name, of in parts.items()
        }
