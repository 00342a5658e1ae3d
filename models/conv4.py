"""The four-convolution network of few-shot learning (Vinyals et al. 2016; Finn et al. 2017, appendix A)."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alpha_maml.models import ops
from alpha_maml.models.norm import Norm


class Convolution3x3(nn.Module):
    """A convolution with a border of one zero. The weight [O, 3, 3, C] is stored channels last, as its products read it."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride = stride
        # No bias: the norm has one, and batch normalisation would subtract a bias before it.
        self.weight = nn.Parameter(torch.empty(outputs, 3, 3, inputs))
        nn.init.xavier_uniform_(self.weight.permute(0, 3, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        # Channels first without doubt: strides that could mean channels last (C = 1) end in an error of pooling under vmap.
        weight = self.weight.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        return F.conv2d(x, weight, stride=self.stride, padding=1)


class Block(nn.Module):
    """3 x 3 convolution, norm, ReLU; halves H and W by its stride or by 2 x 2 max pooling."""

    def __init__(self, inputs: int, channels: int, pooled: bool, norm: str):
        super().__init__()
        self.pooled = pooled
        self.conv = Convolution3x3(inputs, channels, stride=1 if pooled else 2)
        self.norm = Norm(channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return F.max_pool2d(x, 2) if self.pooled else x


class Conv4(nn.Module):
    """x [n, C, H, W] -> logits [n, outputs].

    `pooled=False`, MAML's net for Omniglot: strided convolutions, mean over positions, linear head.
    `pooled=True`, MAML's net for colour images: max pooling, and a linear head on all positions.
    `norm` is a mode of models.norm; under batch, the default, many tasks run at once by hand-written derivatives.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, channels: int = 64, pooled: bool = False,
                 norm: str = "batch"):
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError("it takes images, of the shape [C, H, W]")
        colours, *size = input_shape
        sizes = [colours] + [channels] * 4
        self.blocks = nn.Sequential(*[Block(i, o, pooled, norm) for i, o in zip(sizes, sizes[1:])])
        self.pooled = pooled
        positions = (size[0] // 16) * (size[1] // 16) if pooled else 1
        if positions < 1:
            raise ValueError(f"images of {size[0]} x {size[1]} are too small for four poolings: 16 x 16 is the least")
        self.head = nn.Linear(channels * positions, outputs)
        nn.init.zeros_(self.head.bias)
        if norm != "batch":
            self.forward_tasks = None  # pyright: ignore[reportAttributeAccessIssue]
        self.native = False if norm == "batch" and channels % ops.CHANNELS == 0 else None  # None: it cannot be

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return self.head(x.flatten(1) if self.pooled else x.mean((2, 3)))

    def forward_tasks(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        """`forward` of T tasks at once, each with parameters of its own: params by name, each with an axis T in front,
        x [T, n, C, H, W] -> [T, n, outputs]."""
        x, stride = x.movedim(2, -1), 1 if self.pooled else 2
        for i in range(len(self.blocks)):
            weight, gain, shift = (params[f"blocks.{i}.{name}"] for name in ("conv.weight", "norm.weight", "norm.bias"))
            x = ops.block(x, weight, gain, shift, stride, self.pooled, bool(self.native))
        x = x.movedim(-1, 2).flatten(2) if self.pooled else x.mean((2, 3))
        return torch.baddbmm(params["head.bias"][:, None], x, params["head.weight"].mT)


def conv4_pooled(input_shape: tuple[int, ...], outputs: int, **arguments: Any) -> Conv4:
    """`Conv4` with max pooling, under a name of its own in `model.name`."""
    return Conv4(input_shape, outputs, pooled=True, **arguments)
