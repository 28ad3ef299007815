"""What `layer.py` times of our own: our layer, the limits that it is held against, a naive loop
over experts. `Work` is what all do, and a `Layer` one that does it.

Legend: T tokens of this rank, K choices of each, N = T·K, D width, F hidden units, E experts, e of
    this rank.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_dist.config.schema import MeshConfig
from moe_dist.distributed.collectives import StatReducer
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.dispatcher_choice import build_dispatcher
from moe_dist.moe.experts import Experts, GeluExperts
from moe_dist.moe.gating.noisy_topk import NoisyTopK
from moe_dist.moe.kernels import triton_ffn
from moe_dist.moe.layer import MoE
from moe_dist.moe.routing import build_routing
from moe_dist.nn.token_context import TokenContext

TOKENS_PER_SAMPLE = 16  # noise of our gate is keyed by sample and position


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one rank: its tokens and its experts. `dy_TD`: the gradient of the output."""

    num_experts: int
    x_TD: torch.Tensor
    dy_TD: torch.Tensor
    expert_TK: torch.Tensor  # int64, by falling weight
    gate_TK: torch.Tensor  # float32, as routers give them; each token's sum to 1
    w1_eDF: torch.Tensor
    w2_eFD: torch.Tensor

    def part(self, tokens: slice, experts: slice) -> "Work":
        """Of the work of all ranks that of one."""
        by_token = {
            name: getattr(self, name)[tokens] for name in ("x_TD", "dy_TD", "expert_TK", "gate_TK")
        }
        return dataclasses.replace(
            self, **by_token, w1_eDF=self.w1_eDF[experts], w2_eFD=self.w2_eFD[experts]
        )

    @property
    def count_E(self) -> torch.Tensor:
        return torch.bincount(self.expert_TK.flatten(), minlength=self.num_experts)


# forward(x_TD, gate_TK) -> what backward starts from: first the output, whose gradient is given,
# then any losses
Forward = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
ByExpert = Callable[[], tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass
class Layer:
    """One implementation under autograd. `step` is what is timed."""

    version: str
    work: Work
    forward: Forward
    weights: list[nn.Parameter]
    by_expert: ByExpert | None = (
        None  # the gradients of the weights as (e, D, F), (e, F, D); None: other work than ours
    )
    dropped: float = 0.0  # of the assignments

    def __post_init__(self) -> None:
        self.x_TD, self.gate_TK = (
            t.detach().requires_grad_() for t in (self.work.x_TD, self.work.gate_TK)
        )

    def step(self) -> None:
        """Lets the last step's gradients go, then forward and backward."""
        for p in self.weights:
            p.grad = None
        self.x_TD.grad = self.gate_TK.grad = None
        y_TD, *losses = self.forward(self.x_TD, self.gate_TK)
        torch.autograd.backward([y_TD, *losses], [self.work.dy_TD, *[None] * len(losses)])
        self.y_TD = y_TD.detach()

    def results(self) -> dict[str, torch.Tensor]:
        """Of the last step, what can be held against a reference."""
        if self.by_expert is None:
            return {}
        dx_TD, dgate_TK = self.x_TD.grad, self.gate_TK.grad
        assert dx_TD is not None and dgate_TK is not None
        names = ("y", "x", "gate", "w1", "w2")
        return dict(zip(names, (self.y_TD, dx_TD, dgate_TK, *self.by_expert()), strict=True))


def gradients(*weights: nn.Parameter, transposed: bool = False) -> ByExpert:
    """`transposed`: they are (e, F, D) and (e, D, F)."""

    def by_expert() -> tuple[Any, Any]:
        dw1, dw2 = (p.grad.mT if transposed and p.grad is not None else p.grad for p in weights)
        return dw1, dw2

    return by_expert


def ours(work: Work, mesh: Mesh, triton: bool = False, kind: type[Experts] = Experts) -> Layer:
    exchange, _ = _of_mesh(work, mesh)
    experts, ctx = _experts(work, kind), _context(work, mesh)
    experts.use_triton = triton
    keep_TK = torch.ones_like(work.expert_TK, dtype=torch.bool)

    def forward(x_TD: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            exchange(
                x_TD,
                build_routing(work.expert_TK, gate_TK, keep_TK, work.num_experts),
                experts,
                ctx,
            )[0],
        )

    weights = list(experts.parameters())
    return Layer(
        torch.__version__, work, forward, weights, gradients(*weights) if kind is Experts else None
    )


def ours_triton(work: Work, mesh: Mesh) -> Layer:
    """With Triton's kernels, which are switched off elsewhere until they are measured here."""
    if not triton_ffn.supported(len(work.x_TD), work.x_TD, work.w1_eDF, work.w2_eFD):
        raise ImportError(
            "it wants Triton, a Hopper GPU, one dtype of 32 bits at most, widths in multiples of 16"
        )
    return ours(work, mesh, triton=True)


def ours_gate(work: Work, mesh: Mesh) -> Layer:
    """Our layer whole, with a noisy gate that chooses, and both its losses."""
    moe, ctx = MoE(_gate(work), _experts(work)), _context(work, mesh)
    moe.dispatcher, moe.stat_reducer = _of_mesh(work, mesh)

    def forward(x_TD: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y_TD, stats = moe(x_TD, ctx)
        return y_TD, stats.balance_loss

    return Layer(torch.__version__, work, forward, list(moe.parameters()))


def dense(work: Work, mesh: Mesh) -> Layer:
    """The dense limit: N rows as well, all through the first expert."""
    weights = [nn.Parameter(w[0]) for w in (work.w1_eDF, work.w2_eFD)]
    return Layer(
        torch.__version__, _rows_of_dense(work), lambda x_ND, _: (_mlp(x_ND, *weights),), weights
    )


def dense_gate(work: Work, mesh: Mesh) -> Layer:
    """The dense limit, and beside it the gate alone."""
    gate, ctx, sums = _gate(work), _context(work, mesh), _of_mesh(work, mesh)[1]
    weights = [nn.Parameter(w[0]) for w in (work.w1_eDF, work.w2_eFD)]
    x_TD = (
        work.x_TD.detach().requires_grad_()
    )  # gradients add up in it, as they do where the gate is part of a layer

    def forward(x_ND: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routing, told = gate(x_TD, ctx)
        importance_GE, load_GE = sums.over_data(torch.stack([told.importance_GE, told.load_GE]))
        return _mlp(x_ND, *weights), gate.balance_loss(importance_GE, load_GE), routing.gate_N.sum()

    return Layer(torch.__version__, _rows_of_dense(work), forward, [*weights, *gate.parameters()])


def dense_gelu(work: Work, mesh: Mesh) -> Layer:
    """The dense limit with GELU and biases."""
    w1, w2, b1, b2 = weights = [
        nn.Parameter(p[0]) for p in _experts(work, GeluExperts).parameters()
    ]

    def forward(x_ND: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.addmm(b2, F.gelu(torch.addmm(b1, x_ND, w1)), w2),)

    return Layer(torch.__version__, _rows_of_dense(work), forward, weights)


class SortedLimit:
    """Rows that lie sorted by expert, weighted, and stay so: matmuls and ReLU alone, without
    autograd.
    """

    version, dropped = torch.__version__, 0.0

    def __init__(self, work: Work, reuse: bool) -> None:
        """`reuse`: of all memory, from step to step."""
        self.count_E = work.count_E.tolist()
        choice_N = work.expert_TK.flatten().argsort(stable=True)
        token_N = choice_N // work.expert_TK.shape[1]
        self.x_ND = work.x_TD[token_N]
        self.dy_ND = work.dy_TD[token_N] * work.gate_TK.flatten()[choice_N, None].to(
            work.dy_TD.dtype
        )
        self.w1_EDF, self.w2_EFD = work.w1_eDF, work.w2_eFD
        self.reuse = reuse
        self._take_memory()

    def _take_memory(self) -> None:
        self.h_NF = self.x_ND.new_empty(len(self.x_ND), self.w1_EDF.shape[2])
        self.dh_nF = self.h_NF.new_empty(max(self.count_E), self.w1_EDF.shape[2])
        self.y_ND, self.dx_ND = torch.empty_like(self.x_ND), torch.empty_like(self.x_ND)
        self.dw1_EDF, self.dw2_EFD = torch.empty_like(self.w1_EDF), torch.empty_like(self.w2_EFD)

    def step(self) -> None:
        if not self.reuse:
            del self.h_NF, self.dh_nF, self.y_ND, self.dx_ND, self.dw1_EDF, self.dw2_EFD
            self._take_memory()
        rows = (self.x_ND, self.h_NF, self.y_ND, self.dy_ND, self.dx_ND)
        by_expert = (
            *(t.split(self.count_E) for t in rows),
            self.w1_EDF,
            self.w2_EFD,
            self.dw1_EDF,
            self.dw2_EFD,
        )
        experts = list(zip(*by_expert, strict=True))
        for x, h, y, _, _, w1, w2, _, _ in experts:
            torch.mm(x, w1, out=h)
            torch.mm(h.relu_(), w2, out=y)
        for x, h, _, dy, dx, w1, w2, dw1, dw2 in experts:
            dh = self.dh_nF[: len(x)]
            torch.mm(h.t(), dy, out=dw2)
            torch.mm(dy, w2.t(), out=dh)
            torch.ops.aten.threshold_backward.grad_input(dh, h, 0, grad_input=dh)
            torch.mm(dh, w1.t(), out=dx)
            torch.mm(x.t(), dh, out=dw1)

    def results(self) -> dict[str, torch.Tensor]:
        return {} if len(self.count_E) == 1 else {"w1": self.dw1_EDF, "w2": self.dw2_EFD}


def dense_reused(work: Work) -> SortedLimit:
    """The dense limit without autograd's passes over memory, and without fresh memory."""
    first: dict[str, Any] = {"num_experts": 1, "w1_eDF": work.w1_eDF[:1], "w2_eFD": work.w2_eFD[:1]}
    return SortedLimit(
        dataclasses.replace(work, **first, expert_TK=torch.zeros_like(work.expert_TK)), reuse=True
    )


def naive(work: Work, mesh: Mesh) -> Layer:
    """A loop over experts that looks for the tokens of each."""
    w1, w2 = ([nn.Parameter(w) for w in stack] for stack in (work.w1_eDF, work.w2_eFD))

    def forward(x_TD: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y_TD = torch.zeros_like(x_TD)
        for i in range(work.num_experts):
            token_n, choice_n = (work.expert_TK == i).nonzero(as_tuple=True)
            y_nD = _mlp(x_TD[token_n], w1[i], w2[i]) * gate_TK[token_n, choice_n, None].to(
                x_TD.dtype
            )
            y_TD = y_TD.index_add(0, token_n, y_nD)
        return (y_TD,)

    def by_expert() -> tuple[torch.Tensor, torch.Tensor]:
        dw1_eDF, dw2_eFD = (torch.stack([p.grad for p in w]) for w in (w1, w2))  # type: ignore[misc]
        return dw1_eDF, dw2_eFD

    return Layer(torch.__version__, work, forward, [*w1, *w2], by_expert)


def _of_mesh(work: Work, mesh: Mesh) -> tuple[Any, Any]:
    """Exchange and sums, as `parallelize` chooses them."""
    return build_dispatcher(
        mesh, MeshConfig(), work.num_experts, work.expert_TK.shape[1]
    ), StatReducer(mesh)


def _gate(work: Work) -> NoisyTopK:
    gate = NoisyTopK(work.x_TD.shape[1], work.num_experts, work.expert_TK.shape[1]).to(work.x_TD)
    for p in gate.parameters():
        nn.init.zeros_(p)
    return gate


def _experts(work: Work, kind: type[Experts] = Experts) -> Experts:
    """Biases, where there are any, are 0."""
    e, dim, hidden = work.w1_eDF.shape
    with torch.device("meta"):
        experts = kind(e, dim, hidden)
    given = {"w1_eDF": work.w1_eDF, "w2_eFD": work.w2_eFD}
    for name, p in list(experts.named_parameters()):
        setattr(
            experts,
            name,
            nn.Parameter(given[name] if name in given else work.w1_eDF.new_zeros(p.shape)),
        )
    return experts


def _mlp(x_ND: torch.Tensor, w1_DF: torch.Tensor, w2_FD: torch.Tensor) -> torch.Tensor:
    return (x_ND @ w1_DF).relu() @ w2_FD


def _rows_of_dense(work: Work) -> Work:
    k = work.expert_TK.shape[1]
    return dataclasses.replace(work, x_TD=work.x_TD.repeat(k, 1), dy_TD=work.dy_TD.repeat(k, 1))


def _context(work: Work, mesh: Mesh) -> TokenContext:
    num_tokens, device = len(work.x_TD), work.x_TD.device
    token_T = torch.arange(num_tokens, device=device) + mesh.dp.index * num_tokens
    num_samples = -(-num_tokens * mesh.dp.size // TOKENS_PER_SAMPLE)
    return TokenContext(
        token_T // TOKENS_PER_SAMPLE,
        token_T % TOKENS_PER_SAMPLE,
        torch.ones_like(token_T, dtype=torch.bool),
        seed=0,
        step=0,
        train=True,
        first_sample=0,
        num_samples=num_samples,
        balance_loss_group_size=num_samples,
        capacity_group_size=1,
    )


OURS: dict[str, Callable[[Work, Mesh], Any]] = {
    "dense": dense,
    "dense_reused": lambda work, mesh: dense_reused(work),
    "sorted": lambda work, mesh: SortedLimit(work, reuse=False),
    "sorted_reused": lambda work, mesh: SortedLimit(work, reuse=True),
    "ours": ours,
    "ours_triton": ours_triton,
    "naive": naive,
}
WITH_GATE = {"dense_gate": dense_gate, "ours_gate": ours_gate}
WITH_GELU = {
    "dense_gelu": dense_gelu,
    "ours_gelu": lambda work, mesh: ours(work, mesh, kind=GeluExperts),
}
