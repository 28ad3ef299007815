"""Loads a trained run for use in one process, on CPU, in float32.

It loads a run folder's newest complete checkpoint, written in any layout and precision. `open_run`
returns the model for any task. `TextModel` reads a text with a language model, without noise and
dropout; the LSTM state is carried from word to word.

Legend: T words in a text, V vocabulary, D width.
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

WORDS_PER_CALL = 512  # words per model call when a whole text is read


def open_run(folder: Path) -> tuple[Config, Any, dict[str, Any]]:
    """Loads a run. Notes and warnings about its files are printed on stderr.

    Args:
        folder: The run folder.

    Returns:
        The config, the model on CPU with the newest complete checkpoint's weights, and the
        checkpoint's JSON state.

    Raises:
        ValueError: The folder has no config or no complete checkpoint, or they do not fit together.
    """
    config, note = read_config(folder)
    if note:
        print(f"note: {note}", file=sys.stderr)
    newest, refused = newest_complete(folder)
    for reason in refused.values():
        print(f"warning: {reason}. Refused; reading {newest.name}", file=sys.stderr)
    state = read_state(newest)
    _check_metadata(newest, config, state)
    model = task_of(config).build_model(config).to_empty(device="cpu")
    load_weights(newest, model)
    return config, model, state


def _check_metadata(checkpoint: Path, config: Config, state: dict[str, Any]) -> None:
    """Raises ValueError if the task's metadata is missing or does not fit the model."""
    required = task_of(config).required_metadata
    missing = [key for key in required if key not in state]
    if missing:
        raise ValueError(
            f"{checkpoint}: has no {', '.join(missing)}, which a run of task={config.task} needs"
        )
    if "vocabulary" in required:
        num_words = len(state["vocabulary"]["words"])
        _check_size(checkpoint, config, "data.vocabulary_size", "words", num_words)
    if "tokens" in required:
        num_tokens = len(json.loads(state["tokens"]))
        _check_size(checkpoint, config, "model.vocabulary_size", "tokens", num_tokens)
    if "classes" in required:
        num_classes = len(state["classes"])
        largest = value_of(config, "model.num_classes")
        if num_classes > largest:
            raise ValueError(
                f"{checkpoint}: has {num_classes} classes, "
                f"and model.num_classes of config.json is {largest}"
            )


def _check_size(checkpoint: Path, config: Config, key: str, things: str, size: int) -> None:
    """Raises ValueError if a config field differs from a size in the checkpoint."""
    expected = value_of(config, key)
    if size != expected:
        raise ValueError(
            f"{checkpoint}: has {size} {things}, and {key} of config.json is {expected}"
        )


class TextModel:
    """A run's language model.

    Attributes:
        config: The run's config.
        model: The model.
        layers: The config's section `model`.
        data: The config's section `data`.
        vocabulary: The run's vocabulary.
        recorders: By MoE layer name, the recording dispatcher.
    """

    def __init__(self, folder: Path) -> None:
        """Loads a run.

        Args:
            folder: The run folder.

        Raises:
            ValueError: As `open_run`, or the run has another task.
        """
        self.config, self.model, state = open_run(folder)
        config = self.config
        if not isinstance(config.model, LSTMConfig):
            raise ValueError(
                f"{folder}: a run of task={config.task}; only a language model continues a text"
            )
        assert isinstance(config.data, TextDataConfig)
        self.layers = config.model
        self.data = config.data
        self.vocabulary = saved_vocabulary(state)
        self.recorders: dict[str, RecordingDispatcher] = {}
        for name, layer in self.model.named_modules():
            if isinstance(layer, MoE):
                # in a layer of groups, the dispatcher inside the groups has the experts
                innermost = layer.experts if isinstance(layer.experts, ExpertGroups) else layer
                recorder = RecordingDispatcher()
                innermost.dispatcher = recorder
                self.recorders[name] = recorder

    def initial_state(self) -> State:
        """Returns the LSTM state before a text's first word."""
        state = []
        for hidden_width, cell_width in state_widths(self.layers):
            state.append((torch.zeros(1, 1, hidden_width), torch.zeros(1, 1, cell_width)))
        return tuple(state)

    @torch.no_grad()
    def read(self, word_T: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """Reads a text's next words.

        Args:
            word_T: Word indices, int64, (T,).
            state: The LSTM state before them.

        Returns:
            The next word's log-probabilities (V,), in nats, and the state after the words.
        """
        num_words = len(word_T)
        position_T = torch.arange(num_words)
        # each word is a separate sample. So capacity is counted within a word and drops nothing,
        # and a text can be read in parts of any length
        ctx = TokenContext(
            sample_T=position_T,
            position_T=position_T,
            valid_T=torch.ones(num_words, dtype=torch.bool),
            seed=0,
            step=0,
            train=False,
            first_sample=0,
            num_samples=num_words,
            balance_loss_group_size=num_words,
            capacity_group_size=1,
        )
        x_TD, state, _ = self.model.read(word_T[None], state, ctx)
        return self.model.softmax.log_probability(x_TD[-1:])[0], state

    def expert_assignments(self, word_T: torch.Tensor) -> dict[str, ExpertAssignments]:
        """Returns the experts visited by each word in a whole text, by layer name."""
        state = self.initial_state()
        parts: dict[str, list[ExpertAssignments]] = {name: [] for name in self.recorders}
        with tqdm(
            total=len(word_T), desc="reading", unit=" words", disable=None, leave=False
        ) as bar:
            for part_T in word_T.split(WORDS_PER_CALL):
                _, state = self.read(part_T, state)
                for name, recorder in self.recorders.items():
                    parts[name].append(recorder.assignments)
                bar.update(len(part_T))
        return {name: _concatenate(assignments) for name, assignments in parts.items()}


def _concatenate(parts: list[ExpertAssignments]) -> ExpertAssignments:
    """Joins the assignments for a text's consecutive parts."""
    expert_TK = torch.cat([part.expert_TK for part in parts])
    weight_TK = torch.cat([part.weight_TK for part in parts])
    return ExpertAssignments(expert_TK, weight_TK, parts[0].num_experts)
