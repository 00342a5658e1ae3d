"""Models as users write them, for images [n, 1, H, W] whose rows are tokens, or for anything flat."""
from __future__ import annotations

from math import prod

from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """One layer of self-attention over rows: torch's encoder layer, its multi-head attention, or the bare function."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, form: str):
        super().__init__()
        self.form, self.embed, self.head = form, nn.Linear(input_shape[-1], 8), nn.Linear(8, outputs)
        if form == "encoder":
            self.attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        else:
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True) if form == "multihead" else nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.squeeze(1))
        if self.form == "encoder":
            x = self.attention(x)
        elif self.form == "multihead":
            x = x + self.attention(x, x, x, need_weights=False)[0]
        else:
            query, key, value = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.attention(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(-2)
        return self.head(x.mean(1))


class Dropout(nn.Module):
    """A perceptron with dropout."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int):
        super().__init__()
        self.first, self.last = nn.Linear(prod(input_shape), 32), nn.Linear(32, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.first(x.flatten(1)).tanh(), 0.25, self.training))


class Smooth(nn.Module):
    """No ReLU and no maximum, at whose kinks the last bit of a sum would decide."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(),
                                    nn.Linear(24, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class FusedNorm(nn.Module):
    """A convolution with one of torch's own normalisations, its affine part fused."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, norm: str):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, stride=4), nn.Conv2d(4, outputs, 3)
        self.norm = {"batch": lambda: nn.BatchNorm2d(4, track_running_stats=False), "group": lambda: nn.GroupNorm(2, 4),
                     "layer": lambda: nn.LayerNorm([4, 4, 4]), "instance": lambda: nn.InstanceNorm2d(4, affine=True)}[norm]()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.softplus(self.norm(self.first(x)))).mean((2, 3))
