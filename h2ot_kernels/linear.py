"""Linear layers whose CPU inference runs through oneDNN, with weights packed once."""

import torch
from torch import Tensor, nn
from torch.nn import functional

PACKABLE = (torch.float32, torch.bfloat16)
ACTIVATIONS = {"none": lambda y: y, "gelu": functional.gelu, "tanh": torch.tanh, "relu": torch.relu}


class Linear(nn.Linear):
    """nn.Linear, faster in CPU inference.

    In eval mode without gradients, in float32 or bfloat16 (autocast included), the weight is packed into oneDNN's
    layout at the first call and again after it changed; everywhere else this is nn.Linear. Packed weights are neither
    in the state_dict nor pickled or copied.

    >>> import torch
    >>> from h2ot_kernels.linear import Linear
    >>> layer = Linear(8, 4).eval()
    >>> with torch.inference_mode():
    ...     layer(torch.zeros(3, 8)).shape
    torch.Size([3, 4])
    """

    _packed: tuple | None = None  # (what the weight was, the packed weight, the bias in its dtype)

    def forward(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features], in one pass with the activation or the addition.

        activation: "none", "gelu" (exact), "tanh" or "relu"; residual [..., out_features]: added to the product.
        """
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if not self._can_pack(x, dtype):
            y = ACTIVATIONS[activation](super().forward(x))
            return y if residual is None else residual + y
        weight, bias = self._pack(x, dtype)
        x = x.to(dtype)
        if residual is None or activation != "none" or residual.dtype != dtype:
            y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
            return y if residual is None else residual + y
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")

    def _can_pack(self, x: Tensor, dtype: torch.dtype) -> bool:
        return (
            not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
            and dtype in PACKABLE
            and (dtype == self.weight.dtype or torch.is_autocast_enabled("cpu"))
            and x.device.type == self.weight.device.type == "cpu"
            and x.numel() > 0
            and type(x) is Tensor  # no fakes, no functorch wrappers
            and type(self.weight) is nn.Parameter
            and not self.weight.is_inference()  # such a tensor does not say when it changes
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
            and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )

    def _pack(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        state = (self.weight.data_ptr(), self.weight._version, dtype)
        if self.bias is not None:
            state += (self.bias.data_ptr(), self.bias._version)
        packed = self._packed
        if packed is None or packed[0] != state:
            rows = x.numel() // self.in_features
            weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.to(dtype), rows)
            packed = self._packed = (state, weight, None if self.bias is None else self.bias.to(dtype))
        return packed[1], packed[2]

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def train(self, mode: bool = True) -> "Linear":
        self._packed = None
        return super().train(mode)
