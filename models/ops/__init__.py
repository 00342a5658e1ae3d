"""The one door to fast operations: torch's own, Triton kernels on a GPU, native code on a CPU, whichever the machine has.

Belongs here: code that computes the same numbers as a few lines of torch, faster. May import: `alpha_maml.errors`.
Offers: `block`, `products`, `uniforms`, `enable_native`. Callers never ask which code runs; `products` and `uniforms` return
None where torch's operations are all there is.
"""
from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from alpha_maml.models.ops import native
from alpha_maml.models.ops.convolution import Convolution, NormRelu
from alpha_maml.models.ops.device import EPS, runs_triton
from alpha_maml.models.ops.native import CHANNELS, enable_native

__all__ = ["CHANNELS", "EPS", "block", "enable_native", "products", "uniforms"]


def block(x: Tensor, weight: Tensor, gain: Tensor, shift: Tensor, stride: int, pooled: bool, by_native: bool = False) -> Tensor:
    """3 x 3 convolution with a border of one zero, batch normalisation, ReLU, and 2 x 2 max pooling where `pooled`.

    Args:
        x: [T, n, h, w, C], images of T tasks, channels last.
        weight: [T, O, 3, 3, C], each task's own. gain, shift: [T, O].
        by_native: as native code, which `enable_native` has made ready.

    Returns:
        [T, n, h', w', O]. The first and second derivatives are exact; there is no third.
    """
    if by_native:
        return native.block(x, weight, gain, shift, stride, pooled)
    x = NormRelu.apply(Convolution.apply(x, weight, stride), gain, shift)
    if not pooled:
        return x
    maxima = F.max_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), 2)  # memory stays channels last
    return maxima.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def products(a: list[Tensor], b: list[Tensor]) -> Tensor | None:
    """sum(a b) over each tensor [T, ...] but for its first axis, in one pass: float64 [T, N], products in the tensors' own
    type. None where nothing is faster than torch's operations."""
    if runs_triton(a[0]):
        from alpha_maml.models.ops import triton_products

        return triton_products.products(a, b)
    return native.products(a, b) if a[0].device.type == "cpu" and native.loaded() else None


def uniforms(seed: int, split: int, iteration: int | Tensor, indices: Tensor, stream: int, count: int) -> Tensor | None:
    """`data.tasks.draw` in one launch, with the same bits; `split` by its number. None where there are no Triton kernels."""
    if not runs_triton(indices):
        return None
    from alpha_maml.models.ops import triton_draw

    return triton_draw.draw(seed, split, iteration, indices, stream, count)
