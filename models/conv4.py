"""The four-convolution network of few-shot learning (Vinyals et al. 2016; Finn et al. 2017, appendix A)."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.convolution import Convolution, NormRelu


class BatchNorm(nn.Module):
    """Batch normalisation by the batch's own statistics (MAML's transductive setting): no buffers, so nothing can leak
    between tasks or ranks. x [n, C, H, W].

    The affine part stands outside the fused call because torch's batching rule for the fused affine form has wrong
    second derivatives under vmap (tests/test_maml.py holds the measurement).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, None, None, None, None, training=True)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class Convolution3x3(nn.Module):
    """A convolution with a border of one zero. The weight [O, 3, 3, C] is stored channels last, as its products read it."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride = stride
        # No bias: batch normalisation subtracts the mean, so a bias before it would have gradient zero.
        self.weight = nn.Parameter(torch.empty(outputs, 3, 3, inputs))
        nn.init.xavier_uniform_(self.weight.permute(0, 3, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.permute(0, 3, 1, 2).contiguous(), stride=self.stride, padding=1)


class Block(nn.Module):
    """3 x 3 convolution, batch normalisation, ReLU; halves H and W by its stride or by 2 x 2 max pooling."""

    def __init__(self, inputs: int, channels: int, pooled: bool):
        super().__init__()
        self.pooled = pooled
        self.conv = Convolution3x3(inputs, channels, stride=1 if pooled else 2)
        self.norm = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return F.max_pool2d(x, 2) if self.pooled else x


class Conv4(nn.Module):
    """x [n, C, H, W] -> logits [n, outputs].

    `pooled=False`, MAML's net for Omniglot: strided convolutions, mean over positions, linear head.
    `pooled=True`, MAML's net for colour images: max pooling, and a linear head on all positions.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, channels: int = 64, pooled: bool = False):
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError("it takes images, of the shape [C, H, W]")
        colours, *size = input_shape
        sizes = [colours] + [channels] * 4
        self.blocks = nn.Sequential(*[Block(i, o, pooled) for i, o in zip(sizes, sizes[1:])])
        self.pooled = pooled
        positions = (size[0] // 16) * (size[1] // 16) if pooled else 1
        if positions < 1:
            raise ValueError(f"images of {size[0]} x {size[1]} are too small for four poolings: 16 x 16 is the least")
        self.head = nn.Linear(channels * positions, outputs)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return self.head(x.flatten(1) if self.pooled else x.mean((2, 3)))

    def forward_tasks(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        """`forward` of T tasks at once, each with parameters of its own: params by name, each with an axis T in front,
        x [T, n, C, H, W] -> [T, n, outputs]."""
        x = x.movedim(2, -1)
        for i, block in enumerate(self.blocks):
            weight, gain, shift = (params[f"blocks.{i}.{name}"] for name in ("conv.weight", "norm.weight", "norm.bias"))
            x = NormRelu.apply(Convolution.apply(x, weight, block.conv.stride), gain, shift)
            x = _max_pool(x) if self.pooled else x
        x = x.movedim(-1, 2).flatten(2) if self.pooled else x.mean((2, 3))
        return torch.baddbmm(params["head.bias"][:, None], x, params["head.weight"].mT)


def _max_pool(x: Tensor) -> Tensor:
    """2 x 2 maxima of x [T, n, h, w, C]; memory stays channels last."""
    maxima = F.max_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), 2)
    return maxima.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
