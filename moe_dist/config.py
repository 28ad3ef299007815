"""What a run is: frozen dataclasses, overridden by `--set a.b=c`, kept as JSON in the run folder. Imports no torch.

`num_experts` and every batch size are global numbers: what a rank holds follows from them and the mesh.
"""

import dataclasses
import difflib
import functools
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MeshConfig:
    """How the ranks are used; like the ZeRO stage and the accumulation, no part of the result."""

    ep: int = 1  # expert-parallel degree: ranks that share one set of experts


@dataclass(frozen=True)
class DataConfig:
    """Text of a language model: "embedded" (King James Bible and Shakespeare), a file, a glob or a folder, or the name
    of a dataset with its configuration where it has several: "lm1b", "wikitext:wikitext-2-raw-v1", "owner/name"."""

    text: str = "embedded"
    streamed: bool = False  # the training split is read as it comes, a line a lane, instead of held in memory
    vocabulary_size: int = 8000


@dataclass(frozen=True)
class MoEConfig:
    """One mixture-of-experts layer (Shazeer et al. 2017)."""

    num_experts: int = 32
    num_groups: int | None = (
        None  # None: one flat gate; else a primary gate over groups, and a gate in each (Appendix B)
    )
    k: int = 4  # experts per token; with groups: groups per token, and experts per group
    hidden: int = 1024  # ReLU units per expert
    noise: bool = True  # Eq. 4's noise in training; without it Eq. 10's load falls back to counts
    capacity_factor: float | None = None  # None: nothing is dropped
    recompute: bool = False  # hidden activations of experts again in backward, instead of kept (Appendix D)
    w_importance: float = 0.1  # Eq. 7
    w_load: float = 0.1  # Eq. 11


@dataclass(frozen=True)
class ModelConfig:
    """LSTM language model of Appendix C.1: embedding, LSTM, middle layer, LSTM, softmax, all of width `dim`.

    With `softmax_samples` the rows of embedding and softmax that a step does not touch are neither reduced nor updated.
    """

    dim: int = 512
    lstm_units: int | None = None  # None: `dim`; more are projected to `dim`
    middle: str = "moe"  # "moe"; "ffn": ReLU layers for every word; "lstm": two more LSTMs; "none": one LSTM is all
    ffn_hidden: int = 4096  # units of an "ffn" layer
    ffn_layers: int = 1
    dropout: float = 0.1
    softmax_samples: int | None = None  # words drawn to stand for the vocabulary in training; None: all of it
    moe: MoEConfig = field(default_factory=MoEConfig)


@dataclass(frozen=True)
class SoftmaxMoEConfig:
    """One mixture-of-experts layer of WideNet (Xue et al. 2021)."""

    num_experts: int = 4
    k: int = 2  # experts per token
    hidden: int = 4096  # GELU units per expert
    noise: bool = True  # of deviation 1 / num_experts, in training
    capacity_factor: float | None = 1.2  # None: nothing is dropped
    recompute: bool = False  # hidden activations of experts again in backward, instead of kept
    w_balance: float = 0.01  # lambda of the balance loss


@dataclass(frozen=True)
class EncoderConfig:
    """A pre-LN transformer encoder. `blocks_per_...` consecutive blocks share one of something: 1 shares nothing, None
    is all blocks. The defaults are WideNet's: one attention, one router and one set of experts, LayerNorms of their
    own."""

    depth: int = 12  # blocks
    dim: int = 768
    num_heads: int = 12
    ffn_hidden: int = 3072  # GELU units of a dense block
    moe_blocks: str = "all"  # which have experts instead: "all", "none", or numbers from 0 such as "9,11"
    blocks_per_attention: int | None = None
    blocks_per_ffn: int | None = None  # dense, or router and experts
    blocks_per_norm: int | None = 1  # both LayerNorms of a block
    blocks_per_routing: int | None = 1  # the later ones take the assignment of the first
    dropout: float = 0.1  # of embeddings, and of what is added to a residual
    moe: SoftmaxMoEConfig = field(default_factory=SoftmaxMoEConfig)


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer: patches, learned positions, encoder, mean over patches, a tanh layer, classes."""

    image_size: int = 224
    channels: int = 3
    patch_size: int = 16
    num_classes: int = 1000
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


@dataclass(frozen=True)
class TextConfig:
    """A text encoder after ALBERT: factorised embedding, and the two heads of its pre-training."""

    vocabulary_size: int = 30_000
    embedding_dim: int = 128
    max_tokens: int = 512
    num_kinds: int = 2  # of tokens: those of a first and of a second text
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


@dataclass(frozen=True)
class BatchConfig:
    """One optimizer step, over all ranks. A sample of a language model is a lane of text, `timesteps` words a step."""

    samples: int = 64
    timesteps: int = 32
    accumulation: int = 1  # micro-batches per step
    samples_per_balance_group: int | None = None  # None: the whole batch, and then accumulation must be 1
    samples_per_token_group: int = 1  # capacity is counted within this many samples


@dataclass(frozen=True)
class OptimConfig:
    """Adam for dense parameters; factored Adam with beta1 = 0 for expert matrices (Appendix D)."""

    lr: float = 1e-3  # reached after warm-up
    warmup_steps: int = 1000  # linear; then lr falls with 1/sqrt(step)
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0  # one norm over dense parameters and all experts
    clip_by: str = "step"  # whose norm: this "step"'s, or the "previous" one's (of a run's first step: not clipped)
    # expert gradients are used and freed as soon as backward has made them: 4 bytes a parameter are all that an expert
    # parameter takes in fp32; a step whose gradient is not finite ends the run, for it cannot be skipped
    free_gradients: bool = False
    expert_form: str = "paper"  # "paper": v = r c / mean(r), then the root; "diet": roots first; "adam": not factored
    expert_beta2: float = 0.999


@dataclass(frozen=True)
class WandbConfig:
    """Where curves go besides the run folder."""

    mode: str = "online"  # "online" (offline when there is no login), "offline" or "off"


@dataclass(frozen=True)
class Config:
    """A whole run. `ds_config` names a file of ds_configs/ (precision, ZeRO stage); `zero` overrides its stage."""

    name: str
    task: str = "language_model"
    seed: int = 0
    steps: int = 1000
    log_every: int = 10  # steps between lines of metrics.jsonl
    eval_every: int = 500  # steps between evaluations on the validation split
    save_every: int = 500  # steps between checkpoints; the last step is always saved
    keep_checkpoints: int = 2
    save_in_background: bool = False  # a checkpoint is copied and written while training goes on
    ds_config: str = "fp32"
    zero: int | None = None
    compare: str | None = None  # kept metrics (JSON) of a baseline, printed beside the result
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


WANDB_MODES = ("online", "offline", "off")
CLIP_BY = ("step", "previous")
MOST = 2**31 - 1  # of every number of things: products of a few still fit what counts them
AT_LEAST_ONE = (
    "steps", "log_every", "eval_every", "save_every", "keep_checkpoints", "data.vocabulary_size", "model.dim",
    "model.lstm_units", "model.ffn_hidden", "model.ffn_layers", "model.softmax_samples", "model.moe.num_experts",
    "model.moe.hidden", "batch.timesteps",
)  # fmt: skip


def check(config: Config) -> None:
    """Raises ValueError for a number out of its range, a name that is no folder's, or an unknown wandb mode. Whether
    the parts fit together (a layout, a gate, a DeepSpeed config) is checked where they meet."""
    if config.name in ("", ".", "..") or "/" in config.name:
        raise ValueError(f"name={config.name!r}: a word that can name a folder, for the run folder begins with it")
    for key in dotted_keys().keys() - {"seed"}:
        if isinstance(value := _get(config, key), int) and value > MOST:
            raise ValueError(f"{key}={value}: at most {MOST}")
    for key in AT_LEAST_ONE:
        if (value := _get(config, key)) is not None and value < 1:
            raise ValueError(f"{key}={value}: at least 1")
    for key in ("model.dropout", "optim.beta1", "optim.beta2", "optim.expert_beta2"):
        if not 0 <= (value := _get(config, key)) < 1:
            raise ValueError(f"{key}={value}: from 0 to below 1")
    if (value := config.model.moe.capacity_factor) is not None and not 1e-3 <= value <= 1e3:
        raise ValueError(f"model.moe.capacity_factor={value}: from 0.001 to 1000, or none")
    for key in ("optim.lr", "optim.eps", "optim.clip_norm"):
        if (value := _get(config, key)) is not None and not 0 < value < float("inf"):
            raise ValueError(f"{key}={value}: a positive number")
    for key in ("model.moe.w_importance", "model.moe.w_load", "optim.warmup_steps"):
        if not 0 <= (value := _get(config, key)) < float("inf"):
            raise ValueError(f"{key}={value}: 0 or more")
    if config.steps >= 10**8:  # a checkpoint's name has eight digits
        raise ValueError(f"steps={config.steps}: at most 99999999")
    if config.save_every % config.log_every:  # else a resumed run's first line would hold fewer steps
        raise ValueError(f"save_every={config.save_every} is not a multiple of log_every={config.log_every}")
    if config.optim.clip_by not in CLIP_BY:
        raise ValueError(f"optim.clip_by={config.optim.clip_by!r}; {nearest(config.optim.clip_by, CLIP_BY)}")
    if config.optim.free_gradients and config.optim.clip_norm is not None and config.optim.clip_by == "step":
        raise ValueError(
            "optim.free_gradients updates experts before the step's norm is known: optim.clip_by=previous or "
            "optim.clip_norm=none"
        )
    if config.wandb.mode not in WANDB_MODES:
        raise ValueError(f"wandb.mode={config.wandb.mode!r}; {nearest(config.wandb.mode, WANDB_MODES)}")


def _get(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """What an error about an unknown `name` goes on with: the nearest known name, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def dotted_keys(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every field that `--set` may name, as {dotted key: type}."""
    keys: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        keys |= dotted_keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else {prefix + name: kind}  # type: ignore[arg-type]
    return keys


def override(config: Config, assignments: typing.Iterable[str]) -> Config:
    """Applies `a.b=value` strings in order. Raises ValueError for a bad value or an unknown key, naming the nearest."""
    known = dotted_keys()
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text!r}: expected KEY=VALUE, for example --set mesh.ep=2")
        if key not in known:
            raise ValueError(f"--set {text!r}: no field {key!r}; {nearest(key, known)}")
        config = _replace(config, key.split("."), _parse(key, value, known[key]))
    return config


def _replace(node: Any, path: list[str], value: Any) -> Any:
    child = value if len(path) == 1 else _replace(getattr(node, path[0]), path[1:], value)
    return dataclasses.replace(node, **{path[0]: child})


def _parse(key: str, text: str, kind: Any) -> Any:
    """`text` from a command line as a value of type `kind`."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if types.NoneType in options and text.lower() in ("none", "null"):
        return None
    (plain,) = [k for k in options if k is not types.NoneType]
    try:
        return {"true": True, "false": False}[text.lower()] if plain is bool else plain(text)
    except (KeyError, ValueError):
        expected = " or ".join("none" if k is types.NoneType else k.__name__ for k in options)
        raise ValueError(f"--set {key}={text}: expected {expected}") from None


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
    """Inverse of `to_json`. Raises ValueError for text that is no config, naming the field."""
    return _build(Config, json.loads(text), "")


def _build(cls: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"config: {prefix.rstrip('.') or 'the whole'} is {values!r}, expected an object")
    hints, fields = typing.get_type_hints(cls), {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"config: no field {prefix + name!r}; {nearest(name, hints)}")
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            value = _build(kind, value, f"{prefix}{name}.")
        elif not isinstance(value, kind) and not (isinstance(value, int) and isinstance(0.0, kind)):
            raise ValueError(f"config: {prefix}{name}={value!r}, expected {getattr(kind, '__name__', kind)}")
        fields[name] = value
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"config: {error}") from None
