"""Checks the fields of a config, each by itself, before any work."""

from moe_dist.config.messages import nearest, shorten, text_problem
from moe_dist.config.overrides import dotted_keys, value_of
from moe_dist.config.redact import has_secret
from moe_dist.config.schema import BatchConfig, Config, LSTMConfig, MoEConfig, moe_section

EXCHANGES = ("auto", "all_to_all", "dedup_rank", "dedup_node")


WIRES = ("same", "bf16")


WANDB_MODES = ("online", "offline", "off")
CLIP_BY = ("step", "previous")
DECAYS = ("rsqrt", "cosine")
ROUTINGS = ("none", "one_expert", "empty_rank", "ragged")
FAULTS = ("none", "kill", "kill_agent", "stop", "delay", "nan")
PHASES = (
    "forward",
    "backward",
    "step",
    "evaluation",
    "save",
    "report",
    "wandb",
    "counts",
    "dispatch",
    "combine",
)
MAX_COUNT = 2**31 - 1  # of every number of things: products of a few still fit what counts them
MAX_STEPS = 10**8 - 1  # the name of a checkpoint has eight digits
WEEK = 7 * 24 * 3600  # seconds
# the least and the most of each number, by the name of its field, which means the same in every
# section; products of a few of a step's numbers are far from what float32 holds
RANGES: dict[str, tuple[float, float]] = {
    "seed": (-(2**63), 2**63 - 1),
    # steps
    "steps": (1, MAX_STEPS),
    "log_every": (1, MAX_STEPS),
    "eval_every": (1, MAX_STEPS),
    "save_every": (1, MAX_STEPS),
    "step": (1, MAX_STEPS),
    "warmup_steps": (0, MAX_STEPS),
    "max_consecutive_skipped_steps": (1, MAX_STEPS),
    "keep_last_n": (1, MAX_STEPS),
    # ranks and processes
    "zero_stage": (0, 3),
    "ep": (1, MAX_COUNT),
    "rank": (0, MAX_COUNT),
    "overlap_chunks": (0, 1024),
    "workers": (0, 1024),
    "timeout_s": (1e-3, WEEK),
    "seconds": (0, WEEK),
    # sizes of the model
    "dim": (1, MAX_COUNT),
    "lstm_units": (1, MAX_COUNT),
    "ffn_hidden_dim": (1, MAX_COUNT),
    "ffn_layers": (1, 1000),
    "vocabulary_size": (1, MAX_COUNT),
    "embedding_dim": (1, MAX_COUNT),
    "max_tokens": (1, MAX_COUNT),
    "softmax_samples": (1, MAX_COUNT),
    "num_experts": (1, MAX_COUNT),
    "num_groups": (1, MAX_COUNT),
    "k": (1, MAX_COUNT),
    "expert_hidden_dim": (1, MAX_COUNT),
    "depth": (1, 10_000),
    "num_heads": (1, MAX_COUNT),
    "blocks_per_attention": (1, MAX_COUNT),
    "blocks_per_ffn": (1, MAX_COUNT),
    "blocks_per_norm": (1, MAX_COUNT),
    "blocks_per_routing": (1, MAX_COUNT),
    "image_size": (1, 2**16),
    "channels": (1, MAX_COUNT),
    "patch_size": (1, 2**16),
    "num_classes": (1, MAX_COUNT),
    # the batch and its samples
    "global_batch_size": (1, MAX_COUNT),
    "seq_len": (1, MAX_COUNT),
    "grad_accum_steps": (1, MAX_COUNT),
    "balance_loss_group_size": (1, MAX_COUNT),
    "capacity_group_size": (1, MAX_COUNT),
    "doc_stride": (1, MAX_COUNT),
    "max_answer_tokens": (1, MAX_COUNT),
    "randaugment_layers": (0, 100),
    "randaugment_magnitude": (0, 30),
    "mixup": (0, 1000),
    "label_smoothing": (0, 0.99),
    "no_answer_threshold": (-1e6, 1e6),
    # losses and the optimizer
    "dropout": (0, 0.99),
    "capacity_factor": (1e-3, 1e3),
    "importance_loss_weight": (0, 1e6),
    "load_loss_weight": (0, 1e6),
    "balance_loss_weight": (0, 1e6),
    "lr": (1e-12, 1e6),
    "weight_decay": (0, 1e6),
    "beta1": (0, 0.999999),
    "beta2": (0, 0.999999),
    "expert_beta2": (0, 0.999999),
    "eps": (1e-30, 1.0),
    "max_grad_norm": (1e-12, 1e12),
}


MAX_NAME_LENGTH = 100  # characters of `Config.name`, for the names of folders begin with it


def check_config(config: Config) -> None:
    """Checks each field of a config by itself. Whether the parts fit together (a layout, a gate, a
    DeepSpeed config) is checked where they meet.

    Raises:
        ValueError: A number is out of its range (`RANGES`), a text is empty or cannot be a name, a
            mode is unknown, or a value looks like a password or a key.
    """
    if config.name in (".", "..") or "/" in config.name or len(config.name) > MAX_NAME_LENGTH:
        raise ValueError(
            f"name={shorten(config.name)!r}: a word of at most {MAX_NAME_LENGTH} characters that can name a "
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
            if wrong := text_problem(value):
                raise ValueError(
                    f"{key}={shorten(value)!r} {wrong}; give a value, or leave {key} out"
                )
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            least, most = RANGES[name]
            if not least <= value <= most:
                raise ValueError(
                    f"{key}={shorten(value)}: from {_number(least)} to {_number(most)}"
                )
    if (
        config.save_every % config.log_every
    ):  # else a resumed run's first line would hold fewer steps
        raise ValueError(
            f"save_every={config.save_every} is not a multiple of log_every={config.log_every}"
        )
    for key, known in (
        ("mesh.dispatcher", EXCHANGES),
        ("mesh.comm_dtype", WIRES),
        ("optim.clip_norm_source", CLIP_BY),
        ("optim.schedule", DECAYS),
        ("wandb.mode", WANDB_MODES),
        ("fault_injection.routing", ROUTINGS),
        ("fault_injection.fault", FAULTS),
        ("fault_injection.phase", PHASES),
    ):
        if (value := value_of(config, key)) not in known:
            raise ValueError(f"{key}={value!r}; {nearest(value, known)}")
    labels = config.wandb
    if labels.project is not None and (
        not 1 <= len(labels.project) <= 128 or set(labels.project) & set("/\\#?%:")
    ):
        raise ValueError(
            f"wandb.project={labels.project!r:.150}: 1 to 128 characters, none of them / \\ # ? % :"
        )
    if labels.group is not None and not 1 <= len(labels.group) <= 128:
        raise ValueError(f"wandb.group={labels.group!r:.150}: 1 to 128 characters")
    if labels.tags is not None and not all(
        1 <= len(tag.strip()) <= 64 for tag in labels.tags.split(",")
    ):
        raise ValueError(
            f"wandb.tags={labels.tags!r:.150}: tags of 1 to 64 characters, with commas between them"
        )
    if not isinstance(config.model, LSTMConfig) and config.batch.seq_len != BatchConfig().seq_len:
        raise ValueError(
            f"batch.seq_len={config.batch.seq_len}: only a language model has timesteps; leave it out"
        )
    experts = moe_section(config)
    if (
        experts
        and isinstance(experts[1], MoEConfig)
        and experts[1].k == 1
        and experts[1].num_experts > 1
    ):
        raise ValueError(
            "model.moe.k=1: noisy top-k weights one chosen expert by a softmax over one number, which is "
            "1 whatever the gate computes, so that the task gives the gate no gradient; use 2 up to "
            "num_experts (with num_groups: up to the groups, and to the experts of a group), or the "
            "softmax-then-top-k gate of model.encoder.moe (as in widenet_demo), which learns at k=1"
        )
    by_row = isinstance(config.model, LSTMConfig) and config.model.softmax_samples is not None
    if by_row and (config.optim.weight_decay or config.optim.lamb):
        raise ValueError(
            "optim.weight_decay and optim.lamb with model.softmax_samples: rows of the vocabulary are updated "
            "where they are touched alone, and would not decay; do without one of them"
        )
    if (
        config.optim.fuse_expert_update_in_backward
        and config.optim.max_grad_norm is not None
        and config.optim.clip_norm_source == "step"
    ):
        raise ValueError(
            "optim.fuse_expert_update_in_backward updates experts before the step's norm is known: optim.clip_norm_source=previous or "
            "optim.max_grad_norm=none"
        )


def _number(x: float) -> str:
    return str(x) if isinstance(x, int) else f"{x:g}"
