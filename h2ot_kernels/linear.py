"""Linear layers whose CPU inference runs with weights packed once: our kernels where they are faster, else oneDNN."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from .add_norm import add_norm, takes
from .backend import is_reference
from .inference import dots_run, floats_panel, tiles_run
from .linear_halves import Halves
from .linear_products import HAS_ONEDNN, Product, is_widened, product_of
from .packed import ACTIVATIONS, Packed
from .samples import Samples
from .watched import in_turn, is_own, is_plain, is_silent

Made = TypeVar("Made")
PACKABLE = (torch.float32, torch.bfloat16, torch.float16)
FUSED = (torch.float32, torch.bfloat16)  # tokens whose norm is part of a product


class Linear(nn.Linear):
    """nn.Linear with what stands around it in a transformer; faster in CPU inference.

    In eval mode without gradients, where the reference backend is not chosen, in float32, bfloat16 or float16 (autocast
    included), the weight is packed at the first call and again after it changed, and the activation or the addition is
    part of the product; everywhere else this is nn.Linear. Products are this package's, with a LayerNorm before and an
    activation or an addition behind them in the same pass: in float32 by AVX2 or AVX-512, or, if not narrow, by
    a tile unit (AMX), in whole numbers of three or four bytes: about float32's accuracy, faster, as if each number
    were off by 2^-25 of the largest of its row or output, with scaled channels (csrc/amx/digits.h, packed_tiles.h);
    in bfloat16 by such a unit or by AVX512-BF16. Elsewhere they are oneDNN's. Where the CPU has no instructions for a
    16-bit dtype they are products in float32, whose weights take twice the memory. Packed weights are neither in the
    state_dict nor pickled or copied. What changes a parameter behind autograd's back
    (`weight.data`, fused optimizers, NumPy) is noticed in a thousand elements of it, spread over rows and columns
    (`samples.py`): edit single elements under `torch.no_grad()`, not through `.data`.

    >>> import torch
    >>> from h2ot_kernels.linear import Linear
    >>> layer = Linear(8, 4).eval()
    >>> with torch.inference_mode():
    ...     layer(torch.zeros(3, 8)).shape
    torch.Size([3, 4])
    """

    _kept: dict | None = None  # name -> (what the parameters were, Samples, what was made of them)

    def forward(
        self,
        input: Tensor,
        activation: str = "none",
        *,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        chunks: int = 1,
        norm: nn.LayerNorm | None = None,
        out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """x = input [..., in_features] -> residual + scale * activation(product of norm(x)) [..., out_features].

        activation: "none", "gelu" (exact), "tanh" or "relu"; a scale [out_features] goes with "none". chunks: give the
        output features in that many tensors of their own, a tuple; residual, scale and out go with one. norm: what is
        done to x first. out: where the result is written, best laid out as the residual; without gradients.
        """
        x = input  # nn.Linear's name, which callers may give
        if chunks > 1:
            for name, given in (("out", out), ("residual", residual), ("scale", scale)):
                if given is not None:
                    raise ValueError(f"chunks: got {chunks}, wanted 1 where {name} is given")
        if scale is not None and activation != "none":
            raise ValueError(f"activation: got {activation!r}, wanted 'none' where scale is given")
        if out is not None:
            return self._write(x, activation, residual, out, scale=scale, norm=norm)
        dtype = product_dtype(x) if x.is_cpu else None
        product = dtype and self._ready(x, dtype, scale, chunks)  # nothing is packed elsewhere
        if product is None:
            return self._plain(x, activation, residual, scale, chunks, norm)
        fused = {}
        if norm is not None:
            inside = inside_product(norm, x) if isinstance(product, Packed) else None
            if inside is None:
                x = normed(norm, x, dtype)
            else:
                fused = {"norm": inside}
        if x.dtype != dtype and not (isinstance(product, Halves) and x.dtype in FUSED):
            x = x.to(dtype)
        products = product(x, activation, residual, **fused)
        return products[0] if chunks == 1 else products

    def _write(self, x: Tensor, activation: str, residual: Tensor | None, out: Tensor, **given) -> Tensor:
        plain = activation == "none" and residual is not None and given["norm"] is None and x.is_cpu
        product = self._ready(x, product_dtype(x), given["scale"], 1) if plain else None
        if isinstance(product, Packed) and product.write(x, residual, out):
            return out
        return out.copy_(self.forward(x, activation, residual=residual, **given))

    def _plain(
        self,
        x: Tensor,
        activation: str = "none",
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        chunks: int = 1,
        norm: nn.LayerNorm | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        x = x if norm is None else norm(x)
        if chunks > 1 and not is_plain(self.weight):
            y = functional.linear(x, self.weight, self.bias)
            return tuple(ACTIVATIONS[activation](part) for part in y.chunk(chunks, -1))
        if chunks > 1:
            biases = [None] * chunks if self.bias is None else self.bias.chunk(chunks)
            parts = zip(self.weight.chunk(chunks), biases, strict=True)
            return tuple(ACTIVATIONS[activation](functional.linear(x, *part)) for part in parts)
        y = functional.linear(x, self.weight, self.bias)
        if activation != "none":
            y = ACTIVATIONS[activation](y)
        if scale is not None:
            return scale * y if residual is None else torch.addcmul(residual, y.to(residual.dtype), scale)
        return y if residual is None else residual + y

    def _ready(self, x: Tensor, dtype: torch.dtype, scale: Tensor | None, chunks: int) -> Product | None:
        """What multiplies x in this dtype; None: nn.Linear does."""
        return self.packed_for(x, x.shape[-1], dtype, scale, chunks) if takes_packed(x, dtype) else None

    def packed_for(
        self, x: Tensor, features: int, dtype: torch.dtype, scale: Tensor | None, chunks: int
    ) -> Product | None:
        """The same for rows of `features` that are made of x's, which `takes_packed` has looked at."""
        own = self._parameters  # nn.Module looks attributes of these names up in Python
        weight, bias = own.get("weight"), own.get("bias", self)
        bias = self.bias if bias is self else bias  # no parameter
        if (
            type(weight) is nn.Parameter
            and not self.training
            and (x.dtype == dtype == weight.dtype or (torch.is_autocast_enabled("cpu") and _casts(x, weight)))
            and weight.is_cpu
            and weight.layout is torch.strided
            and features == weight.shape[1]
            and not weight.is_inference()  # such a tensor does not say when it changes
            and (scale is None or not scale.is_inference())
            and (bias is None or not bias.is_inference())
        ):
            return self._pack(x.numel() // x.shape[-1], weight, bias, dtype, scale, chunks)
        return None

    def _pack(
        self,
        rows: int,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        scale: Tensor | None,
        chunks: int,
    ) -> Product:
        """The weight and bias, times the scale."""

        def make() -> Product:
            own, added = weight.detach(), bias
            if scale is not None:
                own, added = own * scale[:, None], None if added is None else added * scale
            own, added = own.to(dtype), None if added is None else added.to(dtype)
            return product_of(own, added, rows, chunks)

        sources = [weight] if bias is None else [weight, bias]
        if scale is not None:
            sources.append(scale)
        return self.kept("packed", (dtype, chunks, tiles_run(), dots_run(), floats_panel()), sources, make)

    def kept(self, name: str, key: tuple, sources: list[Tensor], make: Callable[[], Made]) -> Made:
        """make(), kept under name until key or one of the tensors that it is made of changes."""
        state = (key, [(tensor.data_ptr(), tensor._version, tensor.stride()) for tensor in sources])
        all_kept = self._kept  # read once: another thread may call train()
        kept = all_kept and all_kept.get(name)
        if kept and kept[0] == state and kept[1].same():
            return kept[2]
        samples = Samples(sources)
        made = make()
        self._kept = {**(self._kept or {}), name: (state, samples, made)}
        return made

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def train(self, mode: bool = True) -> "Linear":
        if mode:  # eval() before every request packs nothing again
            self._kept = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear":
        """What `to`, `cuda` and the like call: what is kept for another dtype or device may never be asked for."""
        if self._kept is None:
            return super()._apply(fn, recurse)
        form = self.weight.device, self.weight.dtype
        super()._apply(fn, recurse)
        if (self.weight.device, self.weight.dtype) != form:
            self._kept = None
        return self


def made_plain(model: nn.Module) -> nn.Module:
    """model, each `Linear` in it now an nn.Linear with the same parameters: for tools that go by a layer's exact class
    (`torch.ao.quantization.quantize_dynamic`) and would leave it out without a word. In place.

    >>> from h2ot_kernels import hosts
    >>> model = made_plain(hosts.build("h2ot_mixste", num_frames=27, channels=32, depth=3, stages={1: 9}))
    >>> type(model.TTEblocks[0].attn.qkv)
    <class 'torch.nn.modules.linear.Linear'>
    """
    for layer in model.modules():
        if type(layer) is Linear:
            vars(layer).pop("_kept", None)
            layer.__class__ = nn.Linear
    return model


def call(layer: nn.Module, x: Tensor, activation: str = "none", **around) -> Tensor | tuple[Tensor, ...]:
    """What `Linear.forward` gives of these: inside the layer's call where that is nobody's but ours, else in turn."""
    if is_own(layer, Linear):
        return layer(x, activation, **around)
    return in_turn(layer, x, activation, **around)


def takes_packed(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether packed weights of this dtype may multiply x, here and now."""
    return (
        not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        and forward_ad._current_level < 0  # a product of oneDNN has no tangent
        and dtype in PACKABLE
        and type(x) is Tensor  # no fakes, no functorch wrappers
        and not (x.is_nested or torch.jit.is_tracing())
        and x.layout is torch.strided
        and x.dim() > 0
        and x.numel() > 0
        and HAS_ONEDNN
        and torch._C._get_mkldnn_enabled()
        and not is_reference(None)
        and (dtype != torch.float16 or is_widened(dtype))
    )


def product_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer multiplies x in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def inside_product(
    norm: nn.LayerNorm, x: Tensor, fused: tuple[torch.dtype, ...] = FUSED
) -> tuple[Tensor | None, Tensor | None, float] | None:
    """(weight, bias, eps) of a LayerNorm over x's last axis that a product takes, unheard; else None."""
    if type(norm) is not nn.LayerNorm or x.dtype not in fused or norm.normalized_shape != x.shape[-1:]:
        return None
    own = norm._parameters
    weight, bias = own.get("weight", norm), own.get("bias", norm)  # norm: there is one, which is no parameter
    for v in (weight, bias):
        if v is not None and not (type(v) is nn.Parameter and v.is_cpu and v.dtype in (torch.float32, x.dtype)):
            return None
    of_two = weight is not None and bias is not None and weight.dtype != bias.dtype
    return None if of_two or not is_silent(norm) else (weight, bias, norm.eps)


def normed(norm: nn.LayerNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
    """norm(x), in the dtype of the product where that takes one pass; contiguous, for the product."""
    rows = x if x.stride(-1) == 1 else x.contiguous()  # with the bits of contiguous ones
    one_pass = is_silent(norm) and takes(rows, None, norm, dtype)
    return add_norm(rows, None, norm, dtype)[1].contiguous() if one_pass else norm(x)


def _casts(*tensors: Tensor) -> bool:
    """Autocast casts these: it leaves float64 as it is."""
    return all(tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) for tensor in tensors)
