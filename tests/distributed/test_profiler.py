"""The trace of a profiled run of two ranks."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from processes import ranks, set_
from runs import TINY

from moe_dist.distributed import rendezvous_port


@pytest.mark.timeout(120)
def test_profile_of_two_ranks_has_named_ranges(small_text: Path, tmp_path: Path) -> None:
    """Uses a hierarchical layer, whose groups have their own gates, dispatches and experts."""
    sets = set_(
        *TINY,
        "steps=6",
        "mesh.ep=2",
        "model.moe.num_groups=4",
        f"data.text={small_text}",
        "eval_every=6",
    )
    ended = ranks(
        rendezvous_port.find_free_port(),
        "lstm_moe_demo",
        "--folder",
        str(tmp_path / "run"),
        *sets,
        "--profile",
    )
    assert [status for status, _ in ended] == [0, 0], ended
    assert sorted(path.name for path in (tmp_path / "run" / "profile").iterdir()) == [
        "rank0.json.gz",
        "rank1.json.gz",
    ]
    for path in (tmp_path / "run" / "profile").iterdir():
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        ranges = [e for e in events if e.get("cat") == "user_annotation"]
        parts = (
            "gate middle",
            "gates of groups middle",
            "dispatch middle",
            "dispatch in groups middle",
            "experts middle",
        )
        count = Counter(e["name"] for e in ranges)
        assert {count[f"{part}{side}"] for part in parts for side in ("", " (backward)")} == {
            3
        }  # steps
        assert {
            count[name] for name in ("data", "forward", "backward and update", "optimizer")
        } == {3}
        inside = {part: set() for part in parts}  # type: ignore[var-annotated]
        for event in events:
            if event.get("name", "").startswith("autograd::engine"):
                around = [
                    e
                    for e in ranges
                    if e["ts"] <= event["ts"] and event["ts"] + event["dur"] <= e["ts"] + e["dur"]
                ]
                innermost = min(around, key=lambda e: e["dur"])["name"]
                if innermost.endswith(" (backward)"):
                    inside[innermost.removesuffix(" (backward)")].add(event["name"].split(": ")[-1])
        where = {
            node: {part for part in parts if node in inside[part]}
            for node in set().union(*inside.values())
        }
        assert where["_WaitAllBackward"] == where["_StartScatterBackward"] == {"dispatch middle"}
        assert where["TopkBackward0"] == {"gate middle", "gates of groups middle"}
        of_experts = {node for node in where if re.search("Relu|Feed[Ff]orward", node)}
        assert of_experts and all(where[node] == {"experts middle"} for node in of_experts)
