"""What `layer.py` times: our layer, the limits that it is held against, a naive loop, and the layers of other systems.

All but SonicMoE do the same work, experts of two matrices with ReLU and no biases, on the same weights, tokens, choices
and gate weights. Each has its weights in the layout of its own code, and gets the choices as that code wants them.
Where sorting the choices is part of a layer's forward (ours with `route`, Hugging Face, torchtitan, MegaBlocks,
ScatterMoE, SonicMoE), it is timed; what DeepSpeed's and Tutel's gates make of them is not.

Legend: T tokens of this rank, K choices of each, N = T·K, D width, F hidden units, E experts, e of this rank.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_dist.config import MeshConfig
from moe_dist.context import Context
from moe_dist.engine import import_deepspeed
from moe_dist.experts import Experts, GeluExperts
from moe_dist.gating.topk import NoisyTopK
from moe_dist.kernels import gpu
from moe_dist.layer import MoE
from moe_dist.parallel.collectives import Sums
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallelize import exchange_on
from moe_dist.routing import route

CAPACITY_FACTOR = 1.25
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
        by_token = {name: getattr(self, name)[tokens] for name in ("x_TD", "dy_TD", "expert_TK", "gate_TK")}
        return dataclasses.replace(self, **by_token, w1_eDF=self.w1_eDF[experts], w2_eFD=self.w2_eFD[experts])

    @property
    def count_E(self) -> torch.Tensor:
        return torch.bincount(self.expert_TK.flatten(), minlength=self.num_experts)


# forward(x_TD, gate_TK) -> what backward starts from: first the output, whose gradient is given, then any losses
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
        self.x_TD, self.gate_TK = (t.detach().requires_grad_() for t in (self.work.x_TD, self.work.gate_TK))

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


def _gradients(*weights: nn.Parameter, transposed: bool = False) -> ByExpert:
    """`transposed`: they are (e, F, D) and (e, D, F)."""

    def by_expert() -> tuple[Any, Any]:
        dw1, dw2 = (p.grad.mT if transposed and p.grad is not None else p.grad for p in weights)
        return dw1, dw2

    return by_expert


def ours(work: Work, mesh: Mesh, triton: bool = False, kind: type[Experts] = Experts) -> Layer:
    exchange, _ = _of_mesh(mesh)
    experts, ctx = _experts(work, kind), _context(work, mesh)
    experts.triton = triton
    keep_TK = torch.ones_like(work.expert_TK, dtype=torch.bool)

    def forward(x_TD: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (exchange(x_TD, route(work.expert_TK, gate_TK, keep_TK, work.num_experts), experts, ctx)[0],)

    weights = list(experts.parameters())
    return Layer(torch.__version__, work, forward, weights, _gradients(*weights) if kind is Experts else None)


def ours_triton(work: Work, mesh: Mesh) -> Layer:
    """With Triton's kernels, which are switched off elsewhere until they are measured here."""
    if not gpu.supported(len(work.x_TD), work.x_TD, work.w1_eDF, work.w2_eFD):
        raise ImportError("it wants Triton, a Hopper GPU, one dtype of 32 bits at most, widths in multiples of 16")
    return ours(work, mesh, triton=True)


def ours_gate(work: Work, mesh: Mesh) -> Layer:
    """Our layer whole, with a noisy gate that chooses, and both its losses."""
    moe, ctx = MoE(_gate(work), _experts(work)), _context(work, mesh)
    moe.exchange, moe.sums = _of_mesh(mesh)

    def forward(x_TD: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y_TD, stats = moe(x_TD, ctx)
        return y_TD, stats.balance_loss

    return Layer(torch.__version__, work, forward, list(moe.parameters()))


def dense(work: Work, mesh: Mesh) -> Layer:
    """The dense limit: N rows as well, all through the first expert."""
    weights = [nn.Parameter(w[0]) for w in (work.w1_eDF, work.w2_eFD)]
    return Layer(torch.__version__, _rows_of_dense(work), lambda x_ND, _: (_mlp(x_ND, *weights),), weights)


def dense_gate(work: Work, mesh: Mesh) -> Layer:
    """The dense limit, and beside it the gate alone."""
    gate, ctx, sums = _gate(work), _context(work, mesh), _of_mesh(mesh)[1]
    weights = [nn.Parameter(w[0]) for w in (work.w1_eDF, work.w2_eFD)]
    x_TD = work.x_TD.detach().requires_grad_()  # gradients add up in it, as they do where the gate is part of a layer

    def forward(x_ND: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routing, told = gate(x_TD, ctx)
        importance_GE, load_GE = sums.everyone(torch.stack([told.importance_GE, told.load_GE]))
        return _mlp(x_ND, *weights), gate.balance_loss(importance_GE, load_GE), routing.gate_N.sum()

    return Layer(torch.__version__, _rows_of_dense(work), forward, [*weights, *gate.parameters()])


def dense_gelu(work: Work, mesh: Mesh) -> Layer:
    """The dense limit with GELU and biases."""
    w1, w2, b1, b2 = weights = [nn.Parameter(p[0]) for p in _experts(work, GeluExperts).parameters()]

    def forward(x_ND: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.addmm(b2, F.gelu(torch.addmm(b1, x_ND, w1)), w2),)

    return Layer(torch.__version__, _rows_of_dense(work), forward, weights)


class SortedLimit:
    """Rows that lie sorted by expert, weighted, and stay so: matmuls and ReLU alone, without autograd."""

    version, dropped = torch.__version__, 0.0

    def __init__(self, work: Work, reuse: bool) -> None:
        """`reuse`: of all memory, from step to step."""
        self.count_E = work.count_E.tolist()
        choice_N = work.expert_TK.flatten().argsort(stable=True)
        token_N = choice_N // work.expert_TK.shape[1]
        self.x_ND = work.x_TD[token_N]
        self.dy_ND = work.dy_TD[token_N] * work.gate_TK.flatten()[choice_N, None].to(work.dy_TD.dtype)
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
        by_expert = (*(t.split(self.count_E) for t in rows), self.w1_EDF, self.w2_EFD, self.dw1_EDF, self.dw2_EFD)
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
    return SortedLimit(dataclasses.replace(work, **first, expert_TK=torch.zeros_like(work.expert_TK)), reuse=True)


def naive(work: Work, mesh: Mesh) -> Layer:
    """A loop over experts that looks for the tokens of each."""
    w1, w2 = ([nn.Parameter(w) for w in stack] for stack in (work.w1_eDF, work.w2_eFD))

    def forward(x_TD: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y_TD = torch.zeros_like(x_TD)
        for i in range(work.num_experts):
            token_n, choice_n = (work.expert_TK == i).nonzero(as_tuple=True)
            y_nD = _mlp(x_TD[token_n], w1[i], w2[i]) * gate_TK[token_n, choice_n, None].to(x_TD.dtype)
            y_TD = y_TD.index_add(0, token_n, y_nD)
        return (y_TD,)

    def by_expert() -> tuple[torch.Tensor, torch.Tensor]:
        dw1_eDF, dw2_eFD = (torch.stack([p.grad for p in w]) for w in (w1, w2))  # type: ignore[misc]
        return dw1_eDF, dw2_eFD

    return Layer(torch.__version__, work, forward, [*w1, *w2], by_expert)


def deepspeed(work: Work, mesh: Mesh, drops: bool) -> Layer:
    """`deepspeed.moe.layer.MoE`. In place of its gate stands the decision that its own `topkgating` makes, once, of
    logits whose softmax is the given weights; where it drops, those that are left of a token sum to 1 again."""
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(verbose=False)
    (num_tokens, k), dim, hidden = work.expert_TK.shape, *work.w1_eDF.shape[1:]
    with torch.device("meta"):
        w1, w2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        expert = nn.Sequential(w1, nn.ReLU(), w2)
        moe = deepspeed.moe.layer.MoE(dim, expert, work.num_experts, ep_size=mesh.ep.size, k=k)
    with contextlib.redirect_stdout(None):  # it tells of its group
        moe.set_deepspeed_parallelism()
    min_capacity = moe.deepspeed_moe.gate.min_capacity
    layer, experts = moe.deepspeed_moe, moe.deepspeed_moe.experts.deepspeed_experts
    for each, *weights in zip(experts, work.w1_eDF, work.w2_eFD, strict=True):
        each[0].weight, each[2].weight = (nn.Parameter(w.t().contiguous()) for w in weights)
    logits_TE = torch.full((num_tokens, work.num_experts), -torch.inf, device=work.x_TD.device)
    logits_TE.scatter_(1, work.expert_TK, work.gate_TK.log())

    def by_expert() -> tuple[torch.Tensor, torch.Tensor]:
        dw1_eDF, dw2_eFD = (torch.stack([each[i].weight.grad for each in experts]).mT for i in (0, 2))
        return dw1_eDF, dw2_eFD

    auxiliary, capacity, num_experts, expert_KT, place_KT, gate_KT, count_E = deepspeed.moe.sharded_moe.topkgating(
        logits_TE, k, CAPACITY_FACTOR, min_capacity, drops, layer.ep_group, sparse_routes=True
    )
    given_KT = nn.Parameter(gate_KT)
    del layer.gate

    def forward(x_TD: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weight_KT = given_KT if drops else gate_TK.t()
        decision = (auxiliary, capacity, num_experts, expert_KT, place_KT, weight_KT, count_E)
        layer.__dict__["gate"] = lambda *_: decision
        return (layer(x_TD, None),)

    weights = [given_KT, *(p for each in experts for p in each.parameters())]
    dropped = (expert_KT < 0).float().mean().item()
    return Layer(deepspeed.__version__, work, forward, weights, None if drops else by_expert, dropped=dropped)


def hf_grouped_mm(work: Work, mesh: Mesh) -> Layer:
    """Hugging Face's `experts_implementation="grouped_mm"`, which Mixtral's experts run under, on experts without
    Mixtral's third matrix. Weights are (e, out, in) as Mixtral's."""
    from transformers.integrations.moe import use_experts_implementation

    @use_experts_implementation(has_gate=False)
    class ReluExperts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts = work.num_experts
            self.up_proj = nn.Parameter(work.w1_eDF.mT.contiguous())
            self.down_proj = nn.Parameter(work.w2_eFD.mT.contiguous())
            self.act_fn = nn.ReLU()

        def forward(self, x_TD: torch.Tensor, expert_TK: torch.Tensor, gate_TK: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    experts = ReluExperts(SimpleNamespace(_experts_implementation="grouped_mm"))
    weights = [experts.up_proj, experts.down_proj]

    def forward(x_TD: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (experts(x_TD, work.expert_TK, gate_TK),)

    return Layer(version("transformers"), work, forward, weights, _gradients(*weights, transposed=True))


def torchtitan(work: Work, mesh: Mesh) -> Layer:
    """`RoutedExperts` with the dispatcher that its models use, on experts without a third matrix: the others are not
    multiplied. Its rounding to bf16 is left out, a no-op or not the same work. Counts of rows are the router's."""
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    class ReluExperts(GroupedExperts):
        def forward(self, x_RD: torch.Tensor, count_e: torch.Tensor) -> torch.Tensor:
            offsets_e = count_e.cumsum(0, dtype=torch.int32)
            h_RF = self._grouped_mm(A=x_RD, B_t=self.w1_EFD.mT, offs=offsets_e).relu()
            return self._grouped_mm(A=h_RF, B_t=self.w2_EDF.mT, offs=offsets_e)

    (_, k), (e, dim, hidden) = work.expert_TK.shape, work.w1_eDF.shape
    inner = GroupedExperts.Config(dim=dim, hidden_dim=hidden, num_experts=e)
    dispatcher = AllToAllTokenDispatcher.Config(num_experts=work.num_experts, top_k=k)
    with torch.device("meta"):
        layer = RoutedExperts.Config(inner_experts=inner, token_dispatcher=dispatcher).build()
        layer.inner_experts = experts = ReluExperts(inner)
    experts.w1_EFD, experts.w2_EDF = (nn.Parameter(w.mT.contiguous()) for w in (work.w1_eDF, work.w2_eFD))
    if mesh.ep.size > 1:
        set_spmd_backend("default")  # plain tensors
        layer.token_dispatcher.wire_meshes(ep_mesh=mesh.device_mesh["ep"])
    expert_TK, count_E, weights = work.expert_TK[None], work.count_E, [experts.w1_EFD, experts.w2_EDF]

    def forward(x_TD: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (layer(x_TD[None], gate_TK[None], expert_TK, count_E)[0],)

    return Layer(version("torchtitan"), work, forward, weights, _gradients(*weights, transposed=True))


def tutel(work: Work, mesh: Mesh) -> Layer:
    """Its encoder, all-to-all, experts and decoder as its `moe_layer` has them, whose gate cannot be given weights. Its
    `extract_critical` decides once, with capacity factor 0: every expert has as many rows as the fullest one needs. Its
    kernels move bf16 rows in float32."""
    from tutel import moe, net
    from tutel.experts.ffn import ExpertModule

    k, (e, dim, hidden), group = work.expert_TK.shape[1], work.w1_eDF.shape, mesh.ep.group
    with torch.device("meta"):
        experts = ExpertModule(dim, hidden, e, 1, torch.relu, has_fc1_bias=False, has_fc2_bias=False)
    experts.batched_fc1_w = w1 = nn.Parameter(work.w1_eDF.mT.contiguous())
    experts.batched_fc2_w = w2 = nn.Parameter(work.w2_eFD)
    unsharded = SimpleNamespace(megablocks_size=0, adaptive_degree=1, sharded_count=1, group=group)
    score_TE = torch.zeros(len(work.x_TD), work.num_experts, device=work.x_TD.device)
    score_TE.scatter_(1, work.expert_TK, work.gate_TK)
    (*places, _, capacity, count_E), _ = moe.extract_critical(score_TE, k, loss_fn=None, capacity_factor=0, group=group)

    def forward(x_TD: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        decision = (*places, list(gate_TK.t().contiguous()), capacity, count_E)
        x_eCD = net.all_to_all(moe.fast_encode(x_TD, decision), 1, 0, group=group)
        y_ECD = net.all_to_all(experts(x_eCD, unsharded), 0, 1, group=group)
        return (moe.fast_decode(y_ECD, decision),)

    def by_expert() -> tuple[Any, Any]:
        return w1.grad.mT, w2.grad  # type: ignore[union-attr]

    return Layer(version("tutel"), work, forward, [w1, w2], by_expert)


def megablocks(work: Work, mesh: Mesh) -> Layer:
    """The experts of its `dMoE`, all but the router, with the grouped matmuls that it recommends on Hopper."""
    import grouped_gemm  # noqa: F401  # megablocks can be without it, these matmuls cannot
    from megablocks import Arguments, ParallelDroplessMLP

    _wants_gpu(work, torch.bfloat16)
    e, dim, hidden = work.w1_eDF.shape
    arguments = Arguments(
        hidden_size=dim, ffn_hidden_size=hidden, bias=False, activation_fn=torch.relu, mlp_impl="grouped",
        moe_num_experts=work.num_experts, moe_top_k=work.expert_TK.shape[1], moe_loss_weight=0.0,
        moe_expert_model_parallelism=mesh.ep.size > 1, expert_parallel_group=mesh.ep.group,
        fp16=False, bf16=True, device=torch.device("meta"),
    )  # fmt: skip
    layer = ParallelDroplessMLP(arguments)
    weights = [nn.Parameter(w.flatten(0, 1)) for w in (work.w1_eDF.mT, work.w2_eFD)]
    layer.mlp.w1, layer.mlp.w2 = weights

    def forward(x_TD: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (layer(x_TD, None, gate_TK.to(x_TD.dtype), work.expert_TK),)

    def by_expert() -> tuple[Any, Any]:
        """It divides them by the ranks that share the experts."""
        dw1_eFD, dw2_eFD = (mesh.ep.size * p.grad.view(e, hidden, dim) for p in weights)  # type: ignore[union-attr]
        return dw1_eFD.mT, dw2_eFD

    return Layer(version("megablocks"), work, forward, weights, by_expert)


def scattermoe(work: Work, mesh: Mesh) -> Layer:
    """Its `MLP`. In float32 its matmuls are of TF32."""
    from scattermoe.mlp import MLP

    _wants_gpu(work, torch.bfloat16, torch.float32)
    e, dim, hidden = work.w1_eDF.shape
    with torch.device("meta"):
        mlp = MLP(dim, hidden, e, work.expert_TK.shape[1], activation=nn.ReLU())
    weights = [nn.Parameter(w.mT.contiguous()) for w in (work.w1_eDF, work.w2_eFD)]
    mlp.experts.weight, mlp.output_experts.weight = weights

    def forward(x_TD: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (mlp(x_TD, gate_TK.to(x_TD.dtype), work.expert_TK),)

    return Layer(version("scattermoe"), work, forward, weights, _gradients(*weights, transposed=True))


def sonicmoe(work: Work, mesh: Mesh) -> Layer:
    """`moe_general_routing_inputs`, which takes choices. It has gated experts alone: these have SwiGLU, its default,
    and two thirds of the hidden units, as much to multiply with the third matrix; up to a multiple of 16, which is 1 %
    more at 1,024 units. Their weights are parts of the given ones."""
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    _wants_gpu(work, torch.bfloat16, capability=9)
    (num_tokens, k), hidden = work.expert_TK.shape, -(-work.w1_eDF.shape[2] // 24) * 16
    w1_eFD, w2_eDF = work.w1_eDF.mT.repeat(1, 2, 1)[:, : 2 * hidden], work.w2_eFD.mT[..., :hidden]
    w1, w2 = weights = [nn.Parameter(w.contiguous()) for w in (w1_eFD, w2_eDF)]
    token_N = torch.arange(num_tokens, dtype=torch.int32, device=work.x_TD.device).repeat_interleave(k)
    expert_N = work.expert_TK.flatten().int()

    def forward(x_TD: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        of_experts = (w1.permute(1, 2, 0), None, w2.permute(1, 2, 0), None, work.num_experts)
        stream = torch.cuda.current_stream().cuda_stream
        given = (x_TD, gate_TK.flatten(), token_N, expert_N, *of_experts, stream, ActivationType.SWIGLU)
        return (moe_general_routing_inputs(*given)[0],)

    return Layer(version("sonic-moe"), work, forward, weights)


def _wants_gpu(work: Work, *dtypes: torch.dtype, capability: int = 0) -> None:
    """Raises ImportError, which leaves an implementation out."""
    x = work.x_TD
    if not x.is_cuda or x.dtype not in dtypes or torch.cuda.get_device_capability(x.device)[0] < capability:
        least = f" of compute capability {capability} or more" if capability else ""
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ImportError(f"it wants a GPU{least}, and {names}")


def _of_mesh(mesh: Mesh) -> tuple[Any, Any]:
    """Exchange and sums, as `parallelize` chooses them."""
    return exchange_on(mesh, MeshConfig()), Sums(mesh)


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
        setattr(experts, name, nn.Parameter(given[name] if name in given else work.w1_eDF.new_zeros(p.shape)))
    return experts


def _mlp(x_ND: torch.Tensor, w1_DF: torch.Tensor, w2_FD: torch.Tensor) -> torch.Tensor:
    return (x_ND @ w1_DF).relu() @ w2_FD


def _rows_of_dense(work: Work) -> Work:
    k = work.expert_TK.shape[1]
    return dataclasses.replace(work, x_TD=work.x_TD.repeat(k, 1), dy_TD=work.dy_TD.repeat(k, 1))


def _context(work: Work, mesh: Mesh) -> Context:
    num_tokens, device = len(work.x_TD), work.x_TD.device
    token_T = torch.arange(num_tokens, device=device) + mesh.dp.index * num_tokens
    num_samples = -(-num_tokens * mesh.dp.size // TOKENS_PER_SAMPLE)
    return Context(
        token_T // TOKENS_PER_SAMPLE, token_T % TOKENS_PER_SAMPLE, torch.ones_like(token_T, dtype=torch.bool),
        seed=0, step=0, train=True, first_sample=0, num_samples=num_samples,
        samples_per_balance_group=num_samples, samples_per_token_group=1,
    )  # fmt: skip


ALL: dict[str, Callable[[Work, Mesh], Any]] = {
    "dense": dense,
    "dense_reused": lambda work, mesh: dense_reused(work),
    "sorted": lambda work, mesh: SortedLimit(work, reuse=False),
    "sorted_reused": lambda work, mesh: SortedLimit(work, reuse=True),
    "ours": ours,
    "ours_triton": ours_triton,
    "naive": naive,
    "deepspeed": lambda work, mesh: deepspeed(work, mesh, drops=False),
    "deepspeed_drops": lambda work, mesh: deepspeed(work, mesh, drops=True),
    "hf_grouped_mm": hf_grouped_mm,
    "torchtitan": torchtitan,
    "tutel": tutel,
    "megablocks": megablocks,
    "scattermoe": scattermoe,
    "sonicmoe": sonicmoe,
}
WITH_GATE = {"dense_gate": dense_gate, "ours_gate": ours_gate}
WITH_GELU = {"dense_gelu": dense_gelu, "ours_gelu": lambda work, mesh: ours(work, mesh, kind=GeluExperts)}
# know no exchange of tokens between ranks, or it is not here
ONE_RANK = {"sorted", "sorted_reused", "naive", "hf_grouped_mm", "scattermoe", "sonicmoe"}
