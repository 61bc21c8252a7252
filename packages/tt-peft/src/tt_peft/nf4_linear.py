"""Linear layers with a weight of NF4: whole, or with its codes spread over ranks by FSDP2."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tt_peft.lowrank import is_sharded, whole
from tt_peft.nf4 import BLOCK, Scales, from_codes, frozen_linear, is_nf4, nf4_tensor_class, quantize, scales_of, to_nf4


@dataclass
class Spread:
    """A weight that is kept as codes: its shape and dtype, and the scales of its blocks once it is loaded."""

    shape: torch.Size
    dtype: torch.dtype
    scales: Scales | None = None


class NF4Base(nn.Linear):
    """A linear layer whose weight is NF4, or will be as soon as it is loaded."""

    weight_name = "weight"  # its full name, for messages
    spread: Spread | None = None

    def load_base_(self, name: str, tensor: Tensor) -> None:
        """Set ``weight`` or ``bias`` from a dense tensor; the weight is quantized on the way."""
        if name != "weight":
            self.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))  # it may be a mapped file
            return
        if tensor.shape != self.weight.shape:
            raise ValueError(f"{self.weight_name} has shape {list(tensor.shape)}, expected {list(self.weight.shape)}")
        self.weight = nn.Parameter(to_nf4(tensor, name=self.weight_name), requires_grad=False)
        self.base_loaded_(tensor)

    # ---- sharded ----

    def spread_(self) -> None:
        """Keep the codes as a parameter of their own, uint8[blocks, 32], which FSDP2 can shard block by block.

        ``weight`` is then put together from the codes, which are gathered while the layer computes, and the scales of
        the blocks, which every rank has whole: a 32nd of the codes. On the meta device, call it before the weight is
        loaded: each rank then quantizes its own blocks, into what one process has, bit for bit.
        """
        weight = self.weight
        self.spread = Spread(weight.shape, weight.dtype)
        codes = torch.empty(weight.numel() // BLOCK, BLOCK // 2, dtype=torch.uint8, device=weight.device)
        if is_nf4(weight):
            given: Any = weight
            codes = given.quantized_data.view(-1, BLOCK // 2)
            self.spread.scales = Scales(
                given.quantized_scalers, given.quantization_factor, given.scaler_mean, given.nf4
            )
        del self._parameters["weight"]
        self.codes = nn.Parameter(codes, requires_grad=False)

    def load_slice_(self, tensor: Tensor, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Quantize the blocks that this rank holds of the dense weight ``tensor``, of which no other value is read.

        Returns those. Every rank must call this. The largest magnitudes of all blocks travel, since the scales of the
        blocks are quantized together. Adapters that start from the dense weight (LoftQ) read all of it, on every rank.
        """
        codes, spread = self.codes, self.spread
        assert spread is not None
        assert is_sharded(codes)
        if tensor.shape != spread.shape:
            raise ValueError(f"{self.weight_name} has shape {list(tensor.shape)}, expected {list(spread.shape)}")
        (chunk,) = codes.__create_chunk_list__()  # type: ignore[no-untyped-call]
        own = tensor.reshape(-1, BLOCK).narrow(0, chunk.offsets[0], chunk.sizes[0]).to(device, dtype, copy=True)
        packed, absmax = quantize(own)
        home = torch.device(codes.device_mesh.device_type)
        like: dict[str, Any] = {"device_mesh": codes.device_mesh, "placements": codes.placements, "run_check": False}
        every = type(codes).from_local(absmax.to(home), shape=codes.shape[:1], stride=(1,), **like).full_tensor()
        spread.scales = scales_of(every, name=self.weight_name)
        made = type(codes).from_local(packed, shape=codes.shape, stride=codes.stride(), **like)
        self.codes = nn.Parameter(made, requires_grad=False)
        if self.needs_dense():
            self.base_loaded_(tensor.to(device, dtype))
        return own

    def file_parameters(self) -> dict[str, Tensor]:
        """The base parameters as files name and shape them: a placeholder for a weight that is spread."""
        own: dict[str, Tensor] = dict(self.named_parameters(recurse=False))
        if self.spread is None:
            return own
        del own["codes"]
        return {"weight": torch.empty(self.spread.shape, dtype=self.spread.dtype, device="meta"), **own}

    def __getattr__(self, name: str) -> Any:
        if name != "weight" or self.spread is None:
            return super().__getattr__(name)
        if self.spread.scales is None:
            return self.file_parameters()["weight"]
        return from_codes(whole(self.codes), self.spread.scales, self.spread.shape, self.spread.dtype)

    def needs_dense(self) -> bool:
        """Whether ``base_loaded_`` does something."""
        return False

    def base_loaded_(self, tensor: Tensor) -> None:
        """Called with the dense weight, before it is gone."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.spread is not None or is_nf4(self.weight):
            nf4_tensor_class()  # in a process that has not quantized anything yet

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """``load_state_dict`` with a dense weight quantizes it."""
        state = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        given = state.get(prefix + "weight")
        if given is not None and not is_nf4(given) and given.shape == self.weight.shape:
            given = given.to(self.weight.dtype)
            self.load_base_("weight", given if self.weight.is_meta else given.to(self.weight.device))
            state[prefix + "weight"] = self.weight
        super()._load_from_state_dict(state, prefix, *rest)


class NF4Linear(NF4Base):
    """A frozen linear layer in NF4, without an adapter."""

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)


def spread_nf4_(model: nn.Module) -> None:
    """``spread_`` for every NF4 layer of ``model``: call this before ``fully_shard``."""
    for module in model.modules():
        if isinstance(module, NF4Base):
            module.spread_()
