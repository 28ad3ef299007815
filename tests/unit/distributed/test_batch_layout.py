"""The layout of a batch over ranks, by hand."""

from moe_dist.distributed.batch_layout import BatchLayout


def test_batch_layout_by_hand() -> None:
    # 24 samples, 2 micro-batches of 12 over 3 ranks of 4: rank 1 has 4..7 of the first and 16..19
    # of the second
    layout = BatchLayout(
        world=3,
        global_batch_size=24,
        grad_accum_steps=2,
        balance_loss_group_size=12,
        capacity_group_size=1,
    )
    assert [list(layout.local_samples(micro, 1)) for micro in (0, 1)] == [
        [4, 5, 6, 7],
        [16, 17, 18, 19],
    ]
    held = [s for micro in (0, 1) for rank in range(3) for s in layout.local_samples(micro, rank)]
    assert held == list(range(24)), "the global order, each sample once"
