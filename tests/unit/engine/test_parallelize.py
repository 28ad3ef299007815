"""The choice of a dispatcher."""

import pytest

from moe_dist.config.overrides import override
from moe_dist.engine.dispatcher_choice import dispatcher_kind

pytestmark = pytest.mark.timeout(150)


def test_best_dispatcher_by_hand() -> None:
    # of 8 experts on two ranks, of a node or not, a rank has none of k with C(4, k) / C(8, k): of 4
    # with 1/70, so that a token visits 2 (1 - 1/70) = 1.97 of them, less than half of 4; of 3 with
    # 4/56, 1.86 ranks of
    # 3
    assert [
        dispatcher_kind("auto", 8, k, 2, per_node) for per_node in (1, 2, 3) for k in (4, 3)
    ] == [
        "dedup_rank",
        "all_to_all",
    ] * 3
    # four ranks, two experts each: of 5 a rank has none with C(6, 5) / C(8, 5) = 6/56, so 3.57
    # ranks; of 8, four
    assert [dispatcher_kind("auto", 8, k, 4, 4) for k in (5, 8)] == ["all_to_all", "dedup_rank"]
    # over two nodes of two evenly
    assert [dispatcher_kind("auto", 8, k, 4, 2) for k in (1, 4)] == ["dedup_node", "dedup_node"]


def test_unknown_dispatcher_is_rejected() -> None:
    from runs import tiny

    from moe_dist.config.validate import check_config

    with pytest.raises(ValueError, match=r"mesh\.dispatcher='twice'"):
        check_config(override(tiny(), ["mesh.dispatcher=twice"]))
