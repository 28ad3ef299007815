"""Checks a config's fields, each field by itself, before a run does any work."""

from moe_dist.config.messages import nearest, shorten, text_problem
from moe_dist.config.overrides import dotted_keys, value_of
from moe_dist.config.redact import has_secret
from moe_dist.config.schema import (
    BatchConfig,
    Config,
    LSTMConfig,
    MoEConfig,
    WandbConfig,
    moe_section,
)

WANDB_MODES = ("online", "offline", "off")
# dotted key of a mode -> its values. Modes that depend on the model, the task or the data are
# checked in the module that reads them.
MODES: dict[str, tuple[str, ...]] = {
    "mesh.dispatcher": ("auto", "all_to_all", "dedup_rank", "dedup_node"),
    "mesh.comm_dtype": ("same", "bf16"),
    "optim.clip_norm_source": ("step", "previous"),
    "optim.schedule": ("rsqrt", "cosine"),
    "wandb.mode": WANDB_MODES,
    "fault_injection.routing": ("none", "one_expert", "empty_rank", "ragged"),
    "fault_injection.fault": ("none", "kill", "kill_agent", "stop", "delay", "nan"),
    "fault_injection.phase": (
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
    ),
}

MAX_NAME_LENGTH = 100  # characters in `Config.name`; folder names begin with it
MAX_WANDB_NAME_LENGTH = 128  # characters in a project or group name; wandb's server limit
MAX_WANDB_TAG_LENGTH = 64  # characters
MAX_COUNT = 2**31 - 1  # largest count; the product of two counts still fits into 64 bits
MAX_STEPS = 10**8 - 1  # a checkpoint's name has eight digits
WEEK_S = 7 * 24 * 3600
# last part of a number's key -> (smallest value, largest value); it has the same meaning in every
# section. The bounds keep products of a step's numbers far from float32's limits.
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
    "timeout_s": (1e-3, WEEK_S),
    "seconds": (0, WEEK_S),
    # model sizes
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


def check_config(config: Config) -> None:
    """Checks each config field by itself.

    Combinations of sections (a batch layout, a gate's groups, a DeepSpeed config) are checked in
    the modules that combine them.

    Args:
        config: The config.

    Raises:
        ValueError: For the first invalid field: a number is out of its range (`RANGES`), a text is
            empty or cannot be a name, a mode is unknown (`MODES`), or a text looks like a password
            or a key. The message begins with the field's dotted key.
    """
    _check_name(config.name)
    for key in dotted_keys(config):
        value = value_of(config, key)
        if isinstance(value, str):
            _check_text(key, value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_number(key, value)
    _check_intervals(config)
    _check_modes(config)
    _check_wandb(config.wandb)
    _check_seq_len(config)
    _check_gate(config)
    _check_optimizer(config)


def _check_name(name: str) -> None:
    """Checks that a folder's name can begin with the run's name."""
    if name in (".", "..") or "/" in name or len(name) > MAX_NAME_LENGTH:
        raise ValueError(
            f"name={shorten(name)!r} cannot begin the name of the run folder; use at most "
            f'{MAX_NAME_LENGTH} characters without "/", and neither "." nor ".."'
        )


def _check_text(key: str, text: str) -> None:
    """Checks that a text is no secret and can be a name or a path."""
    if has_secret(text):
        raise ValueError(
            f"{key} contains something that looks like a password or a key, and the run folder "
            "would store it; pass it in the environment instead (HF_TOKEN, WANDB_API_KEY)"
        )
    problem = text_problem(text)
    if problem is not None:
        raise ValueError(f"{key}={shorten(text)!r} {problem}; give a value, or leave {key} out")


def _check_number(key: str, value: float) -> None:
    """Checks that a number is in its range; NaN is in no range."""
    least, most = RANGES[key.rpartition(".")[2]]
    if not least <= value <= most:
        raise ValueError(
            f"{key}={shorten(value)} is out of range; "
            f"use a value from {_format_number(least)} to {_format_number(most)}"
        )


def _check_intervals(config: Config) -> None:
    """Checks that every checkpoint ends a line of metrics.jsonl.

    Otherwise the first line of a resumed run would be a mean over fewer steps.
    """
    if config.save_every % config.log_every:
        raise ValueError(
            f"save_every={config.save_every} is not a multiple of log_every={config.log_every}; "
            "use a multiple, or set log_every to a divisor of save_every"
        )


def _check_modes(config: Config) -> None:
    """Checks each mode against its values in `MODES`."""
    for key, known in MODES.items():
        value = value_of(config, key)
        if value not in known:
            raise ValueError(f"{key}={value!r} is unknown; {nearest(value, known)}")


def _check_wandb(labels: WandbConfig) -> None:
    """Checks wandb names early: the server would refuse an invalid one in the middle of a run."""
    if labels.project is not None:
        forbidden = set(labels.project) & set("/\\#?%:")
        if forbidden or not 1 <= len(labels.project) <= MAX_WANDB_NAME_LENGTH:
            raise ValueError(
                f"wandb.project={labels.project!r:.150} cannot be a project; use 1 to "
                f"{MAX_WANDB_NAME_LENGTH} characters, and none of / \\ # ? % :"
            )
    if labels.group is not None and not 1 <= len(labels.group) <= MAX_WANDB_NAME_LENGTH:
        raise ValueError(
            f"wandb.group={labels.group!r:.150} cannot be a group; use 1 to "
            f"{MAX_WANDB_NAME_LENGTH} characters"
        )
    tags = [] if labels.tags is None else labels.tags.split(",")
    for tag in tags:
        if not 1 <= len(tag.strip()) <= MAX_WANDB_TAG_LENGTH:
            raise ValueError(
                f"wandb.tags={labels.tags!r:.150} has an empty or long tag; use tags of 1 to "
                f"{MAX_WANDB_TAG_LENGTH} characters with commas between them"
            )


def _check_seq_len(config: Config) -> None:
    """Checks that only a language model sets its sequence length."""
    seq_len = config.batch.seq_len
    if not isinstance(config.model, LSTMConfig) and seq_len != BatchConfig().seq_len:
        raise ValueError(
            f"batch.seq_len={seq_len} has no effect: only a language model has timesteps; "
            "leave it out"
        )


def _check_gate(config: Config) -> None:
    """Checks that the task gives a noisy top-k gate a gradient."""
    section = moe_section(config)
    if section is None:
        return
    _, moe = section
    if isinstance(moe, MoEConfig) and moe.k == 1 and moe.num_experts > 1:
        raise ValueError(
            "model.moe.k=1 gives the gate no gradient: noisy top-k weights one chosen expert by a "
            "softmax over one number, which is always 1; use 2 to num_experts (with num_groups: 2 "
            "to the number of groups, and of experts per group), or the softmax-then-top-k gate of "
            "model.encoder.moe (as in widenet_demo), which learns with k=1"
        )


def _check_optimizer(config: Config) -> None:
    """Checks for optimizer options that exclude each other."""
    optim = config.optim
    sparse_rows = isinstance(config.model, LSTMConfig) and config.model.softmax_samples is not None
    if sparse_rows and (optim.weight_decay or optim.lamb):
        raise ValueError(
            "optim.weight_decay and optim.lamb cannot be combined with model.softmax_samples: "
            "vocabulary rows are updated only in steps that use them, and other rows would not "
            "decay; leave one of them out"
        )
    clips_by_this_step = optim.max_grad_norm is not None and optim.clip_norm_source == "step"
    if optim.fuse_expert_update_in_backward and clips_by_this_step:
        raise ValueError(
            "optim.fuse_expert_update_in_backward updates experts before the norm of the step is "
            "known; set optim.clip_norm_source=previous or optim.max_grad_norm=none"
        )


def _format_number(value: float) -> str:
    """Returns an integer in full and a float with six digits."""
    return str(value) if isinstance(value, int) else f"{value:g}"
