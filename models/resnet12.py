"""The residual network of twelve convolutions of few-shot learning (Mishra et al. 2018; Oreshkin et al. 2018), in the widths of
Lee et al. 2019 (MetaOptNet), without DropBlock."""
from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from alpha_maml.models.norm import Norm

SLOPE = 0.1  # of the leaky ReLU


class Block(nn.Module):
    """Three 3 x 3 convolutions beside a 1 x 1 shortcut, each with its norm; leaky ReLU; 2 x 2 max pooling halves H and W."""

    def __init__(self, inputs: int, outputs: int, norm: str):
        super().__init__()
        sizes = (inputs, outputs, outputs)
        # No biases: the norms have them.
        self.convs = nn.ModuleList(nn.Conv2d(size, outputs, 3, padding=1, bias=False) for size in sizes)
        self.norms = nn.ModuleList(Norm(outputs, norm) for _ in sizes)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.shortcut_norm = Norm(outputs, norm)
        for weight in (*self.convs.parameters(), self.shortcut.weight):
            nn.init.kaiming_normal_(weight, SLOPE, "fan_out", "leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        y, last = x, len(self.convs) - 1
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            y = norm(conv(y))
            y = F.leaky_relu(y, SLOPE) if i < last else y
        return F.max_pool2d(F.leaky_relu(y + self.shortcut_norm(self.shortcut(x)), SLOPE), 2)


class ResNet12(nn.Module):
    """x [n, C, H, W] -> logits [n, outputs]: four blocks, the mean over positions, a linear head.

    `channels` is the first block's width, the others have 2.5, 5 and 10 times as many: 64, 160, 320, 640. `norm` is a mode of
    models.norm.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, channels: int = 64, norm: str = "batch"):
        super().__init__()
        colours, height, width = input_shape
        if min(height, width) < 16:
            raise ValueError(f"images of {height} x {width} are too small for four poolings: 16 x 16 is the least")
        sizes = (colours, channels, channels * 5 // 2, channels * 5, channels * 10)
        self.blocks = nn.Sequential(*[Block(i, o, norm) for i, o in zip(sizes, sizes[1:])])
        self.head = nn.Linear(sizes[-1], outputs)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))
