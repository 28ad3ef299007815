"""Bytes that a rank holds, by kind."""

from typing import Any

import torch
from runs import Run, tiny

from moe_dist.distributed.batch_layout import make_batch_layout
from moe_dist.engine.ds_config import read_ds_config
from moe_dist.models.lstm_lm import LSTMLanguageModel
from moe_dist.training.model_stats import per_rank


def held_by(config: Any) -> dict[str, int]:
    run = Run(config)
    run.optimizer.start_step(1e-3)
    (batch,) = run.task.batches(0)
    parameters = [
        *run.model.dense_parameters().values(),
        *run.model.experts.values(),
        *run.model.group_gates.values(),
    ]
    known, saved = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss, *_ = run.task.loss(run.engine, batch, run.task.loss_denominator([batch]))
    run.engine.backward(loss)
    opt = run.optimizer
    dense = [getattr(p, "ds_tensor", p) for p in run.engine.names.values()]
    moments = [
        opt.state[p][m] for p in run.engine.flat_masters() for m in ("exp_avg", "exp_avg_sq")
    ]
    masters = [
        p for p in run.engine.flat_masters() if p.data_ptr() not in {d.data_ptr() for d in dense}
    ]
    state = [t for e in opt.experts.values() for end, t in e.tensors(1).items() if end]
    gates = [t for g in opt.group_gates.values() for t in g.tensors(1).values()]
    rows = [
        t
        for table in opt.row_tables.values()
        for name, t in table.tensors().items()
        if not name.endswith(".updates")
    ]
    narrow = [m.p for table in opt.row_tables.values() for m in table.named.values() if m.narrow]
    expert_masters = [e.master for e in opt.experts.values() if e.narrow]
    return {
        "dense parameters": size(dense),
        "dense optimizer": size(moments) + size(masters),
        "expert parameters": size([e.p for e in opt.experts.values()]),
        "expert gradients": size([e.local_gradient() for e in opt.experts.values()]),
        "expert optimizer": size(state) + size(expert_masters),
        "gates of groups": size(gates)
        + size([g.local_gradient() for g in opt.group_gates.values()]),
        "rows of the vocabulary": size(rows) + size(narrow),
        "activations": sum(saved.values()),
    }


def size(tensors: list[torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


SIZES = [
    "model.dim=64",
    "model.moe.num_experts=32",
    "model.moe.expert_hidden_dim=128",
    "batch.global_batch_size=32",
    "batch.seq_len=16",
]


def planned(ds: str, zero: int, *sets: str) -> tuple[Any, dict[str, Any]]:
    """Returns the config on two ranks, and its layout report."""
    config = tiny(
        *SIZES,
        "mesh.ep=2",
        f"ds_config={ds}",
        f"zero_stage={zero}",
        "data.vocabulary_size=2000",
        *sets,
    )
    with torch.device("meta"):
        model = LSTMLanguageModel(config.model, config.data.vocabulary_size)
    return config, per_rank(model, config, make_batch_layout(config, 2), read_ds_config(config))
