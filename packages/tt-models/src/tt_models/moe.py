"""Mixture of experts with grouped matrix products: https://arxiv.org/abs/2401.04088.

T: tokens, K: experts per token, X: experts, E: hidden size, I: intermediate size.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_models.cpu.elementwise import gated
from tt_models.decoder import Decoder
from tt_models.mlp import activation_named

Route = Callable[[Tensor], tuple[Tensor, Tensor]]  # router logits [T, X] to weights and experts, [T, K] each


class Experts(nn.Module):
    """X gated mlps as two stacked weights, ``gate_up_proj`` [X, 2 I, E] and ``down_proj`` [X, E, I].

    Their memory is not initialized: ``build``, ``reset_parameters`` or a checkpoint fills it.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, *, activation: str = "silu") -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.activation = activation_named(activation)

    def reset_parameters(self, std: float) -> None:
        """Normal weights."""
        nn.init.normal_(self.gate_up_proj, std=std)
        nn.init.normal_(self.down_proj, std=std)

    def forward(self, x_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """The weighted sum of the outputs of each token's experts, [T, E]."""
        return mix(x_TE, weights_TK, experts_TK, self.gate_up_proj.shape[0], self.apply_experts)

    def apply_experts(self, x_RE: Tensor, counts_X: Tensor, experts_R: Tensor) -> Tensor:
        """Rows R sorted by expert, ``counts_X`` for each."""
        gate, up = grouped_linear(x_RE, self.gate_up_proj, counts_X).chunk(2, dim=-1)
        return grouped_linear(gated(self.activation, gate, up), self.down_proj, counts_X)


class MoE(nn.Module):
    """A router, and the experts that it chooses for each token."""

    def __init__(self, hidden_size: int, experts: Experts, num_experts: int, route: Route) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = experts
        self.route = route

    def forward(self, x_BSE: Tensor) -> Tensor:
        """[B, S, E] to the same shape."""
        x_TE = x_BSE.flatten(0, 1)
        weights_TK, experts_TK = self.route(self.gate(x_TE))
        return self.experts(x_TE, weights_TK, experts_TK).view(x_BSE.shape)  # type: ignore[no-any-return]


def softmax_then_top_k(logits_TX: Tensor, *, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The most probable experts and their probabilities, which sum to one if ``renormalize``."""
    weights, experts = logits_TX.float().softmax(dim=-1).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits_TX.dtype), experts


def mix(
    x_TE: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    num_experts: int,
    apply_experts: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Sort the (token, expert) pairs by expert, call ``apply_experts`` once, and sum up by token."""
    order = experts_TK.flatten().argsort(stable=True)
    experts_R = experts_TK.flatten()[order]
    counts_X = torch.zeros(num_experts, dtype=torch.int64, device=x_TE.device)
    counts_X = counts_X.scatter_add(0, experts_R, torch.ones_like(experts_R))
    tokens_R = order // experts_TK.shape[1]
    y_RE = apply_experts(x_TE[tokens_R], counts_X, experts_R) * weights_TK.flatten()[order, None]
    return torch.zeros_like(x_TE).index_add(0, tokens_R, y_RE.to(x_TE.dtype))


def grouped_linear(x_RE: Tensor, weight_XOE: Tensor, counts_X: Tensor) -> Tensor:
    """``x W^T``, [R, O], each row with the weight of its expert; rows are sorted by expert."""
    aligned = all(size * x_RE.element_size() % 16 == 0 for size in weight_XOE.shape[1:])  # grouped_mm wants 16 bytes
    on_cpu = x_RE.device.type == "cpu" and not torch.compiler.is_compiling()  # which supports more dtypes
    dtypes = (torch.bfloat16, torch.float32, torch.float16) if on_cpu else (torch.bfloat16,)
    if aligned and x_RE.dtype == weight_XOE.dtype and x_RE.dtype in dtypes:
        return F.grouped_mm(x_RE, weight_XOE.transpose(1, 2), offs=counts_X.cumsum(0).int())
    rows = torch.split(x_RE, counts_X.tolist())
    return torch.cat([F.linear(part, weight) for part, weight in zip(rows, weight_XOE.unbind(0), strict=True)])


@contextmanager
def record_router_logits(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the router logits [T, X] of each layer, by module name, of the last forward inside the block."""
    recorded: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        router = getattr(module, "router", None) or getattr(module, "gate", None)
        if isinstance(getattr(module, "experts", None), nn.Module) and isinstance(router, nn.Module):

            def record(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
                recorded[name] = output

            handles.append(router.register_forward_hook(record))
    if not handles:
        raise ValueError("the model has no mixture of experts")
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def load_balancing_loss(router_logits: Mapping[str, Tensor], *, top_k: int, mask: Tensor | None = None) -> Tensor:
    """How unevenly the experts are used, ``top_k`` at best: https://arxiv.org/abs/2101.03961, over all layers at once.

    ``mask`` [B, S] is True, or 1, for the tokens that count (not padding).
    """
    layers = list(router_logits.values())
    probabilities = torch.stack([logits.float().softmax(dim=-1) for logits in layers])  # [layers, T, X]
    chosen = torch.zeros_like(probabilities).scatter_(-1, torch.stack(layers).topk(top_k, dim=-1).indices, 1.0)
    if mask is not None:
        counts = mask.flatten().bool()  # a mask of integers would be read as indices
        probabilities, chosen = probabilities[:, counts], chosen[:, counts]
    return probabilities.shape[-1] * (chosen.mean(dim=(0, 1)) * probabilities.mean(dim=(0, 1))).sum()


class ExpertNames(NamedTuple):
    """The names that files have for the parts of a mixture."""

    block: str
    gate: str
    up: str
    down: str


class MixtureDecoder(Decoder):
    """A decoder whose experts are separate matrices in most files, and stacked in memory.

    ``load_state_dict`` reads both; the tensors of all files of a model must come together.
    """

    names: ClassVar[ExpertNames] = ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")

    def __init__(self, *parts: Any, **numbers: Any) -> None:
        super().__init__(*parts, **numbers)
        self.register_load_state_dict_pre_hook(join_experts)  # type: ignore[no-untyped-call]

    def hf_sources(self, name: str) -> list[str]:
        """The keys in Hugging Face files that make up the parameter ``name``, expert by expert."""
        match = re.fullmatch(r"(.*\.)mlp\.(gate\.weight|experts\.(gate_up_proj|down_proj))", name)
        if match is None:
            return [name]
        block = f"{match[1]}{self.names.block}"
        if match[3] is None:
            return [f"{block}.{match[2]}"]
        parts = (self.names.down,) if match[3] == "down_proj" else (self.names.gate, self.names.up)
        experts = self.get_parameter(name).shape[0]
        return [f"{block}.experts.{expert}.{part}.weight" for expert in range(experts) for part in parts]

    def join_from_hf(self, name: str, parts: list[Tensor]) -> Tensor:
        """The parameter ``name`` from its ``hf_sources``."""
        if len(parts) == 1 and ".experts." not in name:
            return parts[0]
        step = len(parts) // self.get_parameter(name).shape[0]
        return torch.stack([torch.cat(parts[i : i + step]) for i in range(0, len(parts), step)])

    def split_for_hf(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The opposite: file key to tensor."""
        keys = self.hf_sources(name)
        if len(keys) == 1 and ".experts." not in name:
            return {keys[0]: tensor}
        pieces = [piece for expert in tensor.unbind(0) for piece in expert.chunk(len(keys) // tensor.shape[0])]
        return dict(zip(keys, pieces, strict=True))


def join_experts(module: MixtureDecoder, state_dict: dict[str, Any], prefix: str, *lists: Any) -> None:
    """Join the matrices of a file that is being loaded into stacked parameters."""
    for name, _ in module.named_parameters():
        keys = [prefix + key for key in module.hf_sources(name)]
        if prefix + name in state_dict or not all(key in state_dict for key in keys):
            continue
        try:
            state_dict[prefix + name] = module.join_from_hf(name, [state_dict[key] for key in keys])
        except RuntimeError as error:
            errors: list[str] = lists[-1]
            errors.append(f"{prefix}{name} cannot be made of {keys[0]} to {keys[-1]}: {error}")
        for key in keys:
            del state_dict[key]
