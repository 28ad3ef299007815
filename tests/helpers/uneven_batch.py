"""A global batch of 8 samples with up to 4 tokens each, its uneven cuts over ranks, and how results
of ranks are compared.

Legend: T tokens, B samples, S timesteps, D width, E experts."""

import functools
from dataclasses import dataclass

import torch

from moe_dist.engine.parallelize import ParallelModel
from moe_dist.moe.kernels import cpu_ffn
from moe_dist.nn import prng
from moe_dist.nn.token_context import TokenContext

EXACT = {"atol": 1e-10, "rtol": 0}
SEED, DIM, HIDDEN, NUM_EXPERTS = 5, 6, 10, 8
LENGTHS, TIMESTEPS = (4, 2, 0, 0, 1, 4, 3, 4), 4  # valid tokens of each sample
NUM_SAMPLES, FIRST_SAMPLE = len(LENGTHS), 16  # the batch is the third micro-batch of its step
NEVER = (4, 5)  # experts that no token chooses: with ep = 4 all of the rank that has no tokens


@dataclass(frozen=True)
class Layout:
    """Rank r holds samples cut[r] to cut[r + 1] of the batch."""

    ep: int
    cut: tuple[int, ...]
    exchange: str = "auto"  # "dedup_node": two nodes of two ranks
    pieces: int | None = None
    worth_it: int = (
        cpu_ffn.MIN_BYTES_PER_EXPERT
    )  # bytes of hidden units of an expert from which it is run by itself

    @property
    def world(self) -> int:
        return len(self.cut) - 1


LAYOUTS = [
    Layout(1, (0, 8)),
    Layout(2, (0, 2, 8)),
    Layout(1, (0, 0, 8)),
    Layout(4, (0, 2, 4, 4, 8)),
    Layout(2, (0, 2, 4, 4, 8)),
    Layout(2, (0, 2, 8), "dedup_rank"),
    Layout(4, (0, 2, 4, 4, 8), "dedup_rank"),
    Layout(2, (0, 2, 4, 4, 8), "dedup_rank"),
    Layout(4, (0, 2, 4, 4, 8), "dedup_node"),
    Layout(2, (0, 2, 8), "all_to_all", 1),
    Layout(2, (0, 2, 8), "all_to_all", 3),
    Layout(4, (0, 2, 4, 4, 8), "all_to_all", 2),
    # experts by themselves, their gradients put off where rows travel in pieces; in some pieces
    # alone; and sent once
    Layout(1, (0, 8), worth_it=0),
    Layout(2, (0, 2, 8), "all_to_all", 1, worth_it=0),
    Layout(2, (0, 2, 8), "all_to_all", 3, worth_it=0),
    Layout(2, (0, 2, 8), "all_to_all", 3, worth_it=400),  # 5 rows of an expert
    Layout(2, (0, 2, 8), "dedup_rank", worth_it=0),
]


@dataclass(frozen=True)
class Case:
    """Options of one layer."""

    k: int = 2
    noise: bool = True
    train: bool = True
    capacity_factor: float | None = None
    balance_loss_group_size: int = NUM_SAMPLES
    capacity_group_size: int = 1
    experts: str = "relu"


def drawn(*shape: int, key: str) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float64).normal_(
        generator=prng.generator("test_parity", key)
    )


@functools.cache
def batch() -> dict[str, torch.Tensor]:
    """Returns the whole batch and the gate of the layer cases."""
    x_BSD = drawn(NUM_SAMPLES, TIMESTEPS, DIM, key="x")
    x_BSD[:, :, 0] = 1.0  # lets the gate exclude experts
    w_gate_DE = drawn(DIM, NUM_EXPERTS, key="w_gate")
    w_gate_DE[0, list(NEVER)] = -30.0
    return {
        "x": x_BSD.flatten(0, 1),
        "weight": drawn(
            NUM_SAMPLES * TIMESTEPS, DIM, key="weight"
        ),  # L = sum of weight * y + balance loss
        "w_gate": w_gate_DE,
        "w_noise": 0.5 * drawn(DIM, NUM_EXPERTS, key="w_noise"),
    }


def context(first: int, last: int, case: Case) -> TokenContext:
    """Returns the context of samples `first` to `last` of the batch."""
    position_S = torch.arange(TIMESTEPS)
    return TokenContext(
        sample_T=torch.arange(FIRST_SAMPLE + first, FIRST_SAMPLE + last).repeat_interleave(
            TIMESTEPS
        ),
        position_T=position_S.repeat(last - first),
        valid_T=(position_S < torch.tensor(LENGTHS)[first:last, None]).flatten(),
        seed=SEED,
        step=3,
        train=case.train,
        first_sample=FIRST_SAMPLE,
        num_samples=NUM_SAMPLES,
        balance_loss_group_size=case.balance_loss_group_size,
        capacity_group_size=case.capacity_group_size,
        layer_call=1,
    )


def gradients(model: ParallelModel) -> dict[str, torch.Tensor]:
    """Returns {"d NAME": gradient} and, for experts, also {"NAME": value}."""
    told = {
        f"d {name}": p.grad
        for name, p in [*model.dense_parameters().items(), *model.experts.items()]
    }
    return told | {name: p.detach() for name, p in model.experts.items()}


def gathered(by_rank: list[dict[str, torch.Tensor | None]], ep: int) -> dict[str, torch.Tensor]:
    """Quantities of the whole batch from those of every rank.

    Tokens' are joined; expert weights are joined along `ep`, their gradients summed over the ranks
    that share them; the balance loss exists once; all others are sums over ranks.
    """
    whole = {}
    for key, value in by_rank[0].items():
        values = [rank[key] for rank in by_rank]
        if value is None:  # a parameter out of use: on every rank
            assert values == [None] * len(values)
            continue
        if ".experts." in key:
            copies = [torch.cat(values[i : i + ep]) for i in range(0, len(values), ep)]
            if not key.startswith("d "):
                assert all(torch.equal(copy, copies[0]) for copy in copies)
            whole[key] = sum(copies) if key.startswith("d ") else copies[0]
        elif key in ("y", "dx") or key.startswith("state"):
            whole[key] = torch.cat(values)
        elif key == "balance_loss":
            assert all(torch.equal(v, value) for v in values)
            whole[key] = value
        else:
            whole[key] = torch.stack(values).sum(0)
    return whole


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    unused = expected.keys() - actual.keys()  # noise that is off
    assert all(key.startswith("d ") and not expected[key].any() for key in unused), unused
    assert actual.keys() <= expected.keys()
    for key, value in actual.items():
        torch.testing.assert_close(
            value, expected[key], **EXACT, msg=lambda m, key=key: f"{key}: {m}"
        )
