"""The four-convolution network of few-shot learning (Vinyals et al. 2016; Finn et al. 2017, appendix A)."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


class Block(nn.Module):
    """3 x 3 convolution, batch normalisation, ReLU; halves H and W by its stride or by 2 x 2 max pooling."""

    def __init__(self, inputs: int, channels: int, pooled: bool):
        super().__init__()
        self.pooled = pooled
        # No bias: batch normalisation subtracts the mean, so a bias before it would have gradient zero.
        self.conv = nn.Conv2d(inputs, channels, 3, stride=1 if pooled else 2, padding=1, bias=False)
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
        colours, *size = input_shape
        sizes = [colours] + [channels] * 4
        self.blocks = nn.Sequential(*[Block(i, o, pooled) for i, o in zip(sizes, sizes[1:])])
        self.pooled = pooled
        positions = (size[0] // 16) * (size[1] // 16) if pooled else 1
        if positions < 1:
            raise ValueError(f"images of {size[0]} x {size[1]} are too small for four poolings: 16 x 16 is the least")
        self.head = nn.Linear(channels * positions, outputs)
        for block in self.blocks:
            nn.init.xavier_uniform_(block.conv.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return self.head(x.flatten(1) if self.pooled else x.mean((2, 3)))
