"""A plan against the bytes that ranks hold and send."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_memory import held_by
from runs import Run, tiny, tiny_images

from moe_dist.distributed import loopback
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.batch_layout import make_batch_layout
from moe_dist.distributed.spawn import run_distributed
from moe_dist.engine.ds_config import read_ds_config
from moe_dist.moe.layer import MoE
from moe_dist.planner import microbenchmark
from moe_dist.planner.cost_model import (
    RankCost,
    dispatch_traffic,
    rank_memory,
)
from moe_dist.tasks.registry import task_of
from moe_dist.training.metric_accumulator import MetricAccumulator
from moe_dist.training.model_stats import activation_bytes
from moe_dist.training.setup import set_up
from moe_dist.training.step import train_step

NOTHING = RankCost({}, {})


MEASURED = [
    "model.dim=64",
    "model.moe.num_experts=32",
    "model.moe.k=4",
    "batch.global_batch_size=64",
    "mesh.ep=2",
    "zero_stage=1",
]
IMAGES = [
    "mesh.ep=2",
    "model.encoder.moe.capacity_factor=none",
    "model.encoder.dim=128",
    "model.encoder.moe.expert_hidden_dim=256",
]


def live(text: str) -> tuple[dict[str, int], dict[str, float], dict[str, int]]:
    """Returns the bytes that this rank holds, and those that it sends in a step, by kind."""
    meshes.init_process_group()
    config = tiny(*MEASURED, f"data.text={text}")
    held = held_by(config)
    run = Run(config)
    meter = MetricAccumulator(run.mesh, run.task)
    with meter.step():
        for _ in train_step(run.training, 1):
            pass
    images = Run(tiny_images(*IMAGES))
    saved: dict[int, int] = {}
    known = {
        p.untyped_storage().data_ptr()
        for p in [*images.model.dense_parameters().values(), *images.model.experts.values()]
    }
    images.optimizer.start_step(1e-3)
    (batch,) = images.task.batches(0)

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        images.task.loss(images.engine, batch, images.task.loss_denominator([batch]))
    meshes.shutdown()
    return (
        held,
        {"/".join(map(str, key)): num_bytes for key, num_bytes in meter.sent.items()},
        {"images": sum(saved.values())},
    )


@pytest.mark.timeout(120)
def test_two_ranks_hold_and_send_the_planned_bytes(small_text: Path) -> None:
    config = tiny(*MEASURED)
    plain, layout, ds = (
        task_of(config).build_model(config),
        make_batch_layout(config, 2),
        read_ds_config(config),
    )
    planned = rank_memory(plain, config, layout, ds, NOTHING)
    bytes_of = {
        t.name: t.intra_node_bytes
        for t in dispatch_traffic(config, layout, 2, 1, 4, 4 * config.batch.seq_len)
    }
    images = tiny_images(*IMAGES)
    kept = activation_bytes(task_of(images).build_model(images), images, 16, 4)
    told = run_distributed(live, 2, str(small_text), timeout=100)
    sums: dict[str, float] = {}
    for held, sends, saved in told:
        assert held["dense parameters"] + held["expert parameters"] == pytest.approx(
            planned["weights"], rel=0.01
        )
        both = held["dense optimizer"] + held["expert optimizer"]
        assert both == pytest.approx(
            planned["masters"] + planned["optimizer state"], rel=0.01, abs=200
        )
        sums["images"] = (
            sums.get("images", 0) + saved["images"] / 2
        )  # one rank's experts may be chosen more often
        for label, number in sends.items():
            what = (
                "dispatch" if "dispatch" in label else "combine" if "combine" in label else "other"
            )
            sums[what] = sums.get(what, 0) + number / 2
    assert sums["images"] == pytest.approx(kept, rel=0.1)
    # a fresh gate draws its experts evenly: each word at random
    assert sums["dispatch"] == pytest.approx(bytes_of["dispatch"], rel=0.1)
    assert sums["combine"] == pytest.approx(bytes_of["combine"], rel=0.1)


def echoed(text: str) -> dict[str, Any]:
    """Runs this rank alone as the second of two: returns its experts and the rows that they
    get of 48 words."""
    mesh = loopback.loopback_mesh(meshes.init_distributed(1), 2, 1)
    config = tiny(f"data.text={text}", "mesh.dispatcher=all_to_all")
    training = set_up(config, read_ds_config(config), mesh)
    seen: list[Any] = []
    (layer,) = (m for m in training.model.module.modules() if isinstance(m, MoE))
    layer.gate.register_forward_hook(lambda module, args, result: seen.append(result[0].count_E))
    experts = layer.experts
    experts.register_forward_pre_hook(lambda module, args: seen.append(args[1].count_E))
    for _ in train_step(training, 1):
        pass
    meshes.shutdown()
    return {"held": len(experts.w1_eDF), "sent": seen[0].tolist(), "got": seen[1].tolist()}


@pytest.mark.timeout(120)
def test_loopback_traffic_equals_real_traffic(small_text: Path) -> None:
    """The second of two ranks has experts 4 to 7 of 8, and gets twice the rows that its own
    words send to each."""
    (told,) = run_distributed(echoed, 1, str(small_text), timeout=100)
    assert told["held"] == 4 and sum(told["sent"]) == 48 * 2
    assert told["got"] == [2 * n for n in told["sent"][4:]]


@pytest.mark.timeout(120)
def test_collective_benchmark_of_two_ranks_returns_times() -> None:
    (links, _) = run_distributed(microbenchmark.benchmark_collectives, 2, 2, timeout=100)
    for link in (links.rows, links.sums):
        assert 0 < link.latency < 1 and 1e6 < link.bandwidth < 1e12
