"""The layers of other systems that `layer.py` times.

All but SonicMoE do the same work, experts of two matrices with ReLU and no biases, on the same
weights, tokens, choices and gate weights. Each has its weights in the layout of its own code, and
gets the choices as that code wants them.
Where sorting the choices is part of a layer's forward (ours with `route`, Hugging Face, torchtitan,
MegaBlocks, ScatterMoE, SonicMoE), it is timed; what DeepSpeed's and Tutel's gates make of them is
not. One that is not installed, or wants another device, is an ImportError.

Legend: T tokens of this rank, K choices of each, N = T·K, D width, F hidden units, E experts, e of
    this rank.
"""

import contextlib
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from ours import Layer, Work, gradients
from torch import nn

from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed import import_deepspeed

CAPACITY_FACTOR = 1.25


def deepspeed(work: Work, mesh: Mesh, drops: bool) -> Layer:
    """`deepspeed.moe.layer.MoE`. In place of its gate stands the decision that its own `topkgating`
    makes, once, of logits whose softmax is the given weights; where it drops, those that are left
    of a token sum to 1 again.
    """
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
        dw1_eDF, dw2_eFD = (
            torch.stack([each[i].weight.grad for each in experts]).mT for i in (0, 2)
        )
        return dw1_eDF, dw2_eFD

    auxiliary, capacity, num_experts, expert_KT, place_KT, gate_KT, count_E = (
        deepspeed.moe.sharded_moe.topkgating(
            logits_TE, k, CAPACITY_FACTOR, min_capacity, drops, layer.ep_group, sparse_routes=True
        )
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
    return Layer(
        deepspeed.__version__, work, forward, weights, None if drops else by_expert, dropped=dropped
    )


def hf_grouped_mm(work: Work, mesh: Mesh) -> Layer:
    """Hugging Face's `experts_implementation="grouped_mm"`, which Mixtral's experts run under, on
    experts without
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

        def forward(
            self, x_TD: torch.Tensor, expert_TK: torch.Tensor, gate_TK: torch.Tensor
        ) -> torch.Tensor:
            raise NotImplementedError

    experts = ReluExperts(SimpleNamespace(_experts_implementation="grouped_mm"))
    weights = [experts.up_proj, experts.down_proj]

    def forward(x_TD: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (experts(x_TD, work.expert_TK, gate_TK),)

    return Layer(
        version("transformers"), work, forward, weights, gradients(*weights, transposed=True)
    )


def torchtitan(work: Work, mesh: Mesh) -> Layer:
    """`RoutedExperts` with the dispatcher that its models use, on experts without a third matrix:
    the others are not multiplied. Its rounding to bf16 is left out, a no-op or not the same work.
    Counts of rows are the router's.
    """
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
    experts.w1_EFD, experts.w2_EDF = (
        nn.Parameter(w.mT.contiguous()) for w in (work.w1_eDF, work.w2_eFD)
    )
    if mesh.ep.size > 1:
        set_spmd_backend("default")  # plain tensors
        layer.token_dispatcher.wire_meshes(ep_mesh=mesh.device_mesh["ep"])
    expert_TK, count_E, weights = (
        work.expert_TK[None],
        work.count_E,
        [experts.w1_EFD, experts.w2_EDF],
    )

    def forward(x_TD: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (layer(x_TD[None], gate_TK[None], expert_TK, count_E)[0],)

    return Layer(
        version("torchtitan"), work, forward, weights, gradients(*weights, transposed=True)
    )


def tutel(work: Work, mesh: Mesh) -> Layer:
    """Its encoder, all-to-all, experts and decoder as its `moe_layer` has them, whose gate cannot
    be given weights. Its `extract_critical` decides once, with capacity factor 0: every expert has
    as many rows as the fullest one needs. Its kernels move bf16 rows in float32.
    """
    from tutel import moe, net
    from tutel.experts.ffn import ExpertModule

    k, (e, dim, hidden), group = work.expert_TK.shape[1], work.w1_eDF.shape, mesh.ep.group
    with torch.device("meta"):
        experts = ExpertModule(
            dim, hidden, e, 1, torch.relu, has_fc1_bias=False, has_fc2_bias=False
        )
    experts.batched_fc1_w = w1 = nn.Parameter(work.w1_eDF.mT.contiguous())
    experts.batched_fc2_w = w2 = nn.Parameter(work.w2_eFD)
    unsharded = SimpleNamespace(megablocks_size=0, adaptive_degree=1, sharded_count=1, group=group)
    score_TE = torch.zeros(len(work.x_TD), work.num_experts, device=work.x_TD.device)
    score_TE.scatter_(1, work.expert_TK, work.gate_TK)
    (*places, _, capacity, count_E), _ = moe.extract_critical(
        score_TE, k, loss_fn=None, capacity_factor=0, group=group
    )

    def forward(x_TD: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        decision = (*places, list(gate_TK.t().contiguous()), capacity, count_E)
        x_eCD = net.all_to_all(moe.fast_encode(x_TD, decision), 1, 0, group=group)
        y_ECD = net.all_to_all(experts(x_eCD, unsharded), 0, 1, group=group)
        return (moe.fast_decode(y_ECD, decision),)

    def by_expert() -> tuple[Any, Any]:
        return w1.grad.mT, w2.grad  # type: ignore[union-attr]

    return Layer(version("tutel"), work, forward, [w1, w2], by_expert)


def megablocks(work: Work, mesh: Mesh) -> Layer:
    """The experts of its `dMoE`, all but the router, with the grouped matmuls that it recommends on
    Hopper.
    """
    import grouped_gemm  # noqa: F401  # megablocks can be without it, these matmuls cannot
    from megablocks import Arguments, ParallelDroplessMLP

    _wants_gpu(work, torch.bfloat16)
    e, dim, hidden = work.w1_eDF.shape
    arguments = Arguments(
        hidden_size=dim,
        ffn_hidden_size=hidden,
        bias=False,
        activation_fn=torch.relu,
        mlp_impl="grouped",
        moe_num_experts=work.num_experts,
        moe_top_k=work.expert_TK.shape[1],
        moe_loss_weight=0.0,
        moe_expert_model_parallelism=mesh.ep.size > 1,
        expert_parallel_group=mesh.ep.group,
        fp16=False,
        bf16=True,
        device=torch.device("meta"),
    )
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

    return Layer(
        version("scattermoe"), work, forward, weights, gradients(*weights, transposed=True)
    )


def sonicmoe(work: Work, mesh: Mesh) -> Layer:
    """`moe_general_routing_inputs`, which takes choices. It has gated experts alone: these have
    SwiGLU, its default, and two thirds of the hidden units, as much to multiply with the third
    matrix; up to a multiple of 16, which is 1 % more at 1,024 units. Their weights are parts of the
    given ones.
    """
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    _wants_gpu(work, torch.bfloat16, capability=9)
    (num_tokens, k), hidden = work.expert_TK.shape, -(-work.w1_eDF.shape[2] // 24) * 16
    w1_eFD, w2_eDF = work.w1_eDF.mT.repeat(1, 2, 1)[:, : 2 * hidden], work.w2_eFD.mT[..., :hidden]
    w1, w2 = weights = [nn.Parameter(w.contiguous()) for w in (w1_eFD, w2_eDF)]
    token_N = torch.arange(
        num_tokens, dtype=torch.int32, device=work.x_TD.device
    ).repeat_interleave(k)
    expert_N = work.expert_TK.flatten().int()

    def forward(x_TD: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        of_experts = (w1.permute(1, 2, 0), None, w2.permute(1, 2, 0), None, work.num_experts)
        stream = torch.cuda.current_stream().cuda_stream
        given = (
            x_TD,
            gate_TK.flatten(),
            token_N,
            expert_N,
            *of_experts,
            stream,
            ActivationType.SWIGLU,
        )
        return (moe_general_routing_inputs(*given)[0],)

    return Layer(version("sonic-moe"), work, forward, weights)


def _wants_gpu(work: Work, *dtypes: torch.dtype, capability: int = 0) -> None:
    """Raises ImportError, which leaves an implementation out."""
    x = work.x_TD
    if (
        not x.is_cuda
        or x.dtype not in dtypes
        or torch.cuda.get_device_capability(x.device)[0] < capability
    ):
        least = f" of compute capability {capability} or more" if capability else ""
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ImportError(f"it wants a GPU{least}, and {names}")


PEERS: dict[str, Callable[[Work, Mesh], Any]] = {
    "deepspeed": lambda work, mesh: deepspeed(work, mesh, drops=False),
    "deepspeed_drops": lambda work, mesh: deepspeed(work, mesh, drops=True),
    "hf_grouped_mm": hf_grouped_mm,
    "torchtitan": torchtitan,
    "tutel": tutel,
    "megablocks": megablocks,
    "scattermoe": scattermoe,
    "sonicmoe": sonicmoe,
}
