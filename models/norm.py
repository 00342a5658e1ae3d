"""Normalisation of feature maps, by a mode's name: what statistics are taken over, and so what a prediction depends on."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alpha_maml.models.ops import EPS

MODES = ("batch", "frozen", "group", "layer", "none")
GROUP = 16  # channels of a group, at least (Wu and He 2018, table 3)


class Norm(nn.Module):
    """x [n, C, H, W] -> the same shape, with a gain and a shift for each channel.

    batch   statistics of a channel over the batch that is given (MAML's setting): transductive, a prediction depends on the
            other queries. There are no buffers, so nothing can leak between tasks or ranks. Ioffe and Szegedy 2015.
    frozen  of a channel over given images, once, before training (`calibrate`): constants, which the gain and the shift take
            in as their first values, so that what is left is the gain and the shift.
    group   of each image by itself, over groups of at least GROUP channels and their positions. Wu and He 2018.
    layer   of each image by itself, over all channels and positions. Ba, Kiros, Hinton 2016.
    none    no statistics and no gain, the shift alone.

    The affine part stands outside the fused calls because torch's batching rules for the fused affine forms of batch, instance
    and layer norm have wrong second derivatives where something differentiates through vmap (tests/test_norm.py measures it).
    """

    def __init__(self, channels: int, mode: str = "batch"):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"norm {mode!r} must be one of {', '.join(MODES)}")
        self.mode = mode
        self.groups = max(g for g in range(1, max(1, channels // GROUP) + 1) if channels % g == 0) if mode == "group" else 1
        if mode != "none":
            self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        shift = self.bias[:, None, None]
        if self.mode == "none":
            return x + shift
        if self.mode == "batch":
            x = F.batch_norm(x, None, None, training=True)
        elif self.mode != "frozen":
            x = F.group_norm(x, self.groups)
        return x * self.weight[:, None, None] + shift


def calibrate(model: nn.Module, images: Callable[[], Tensor]) -> None:
    """Lets each frozen norm of the model give images() [n, *input_shape] the mean 0 and the variance 1 in each channel, one
    norm after the other as the images meet them; they are asked for only where there is such a norm. A data-dependent
    initialisation in the sense of Salimans and Kingma 2016, section 3."""
    norms, mode = [m for m in model.modules() if isinstance(m, Norm) and m.mode == "frozen"], model.training
    if norms:
        hooks = [norm.register_forward_pre_hook(_take_in) for norm in norms]
        with torch.no_grad():
            model.eval()(images())
        model.train(mode)
        for hook in hooks:
            hook.remove()


def _take_in(norm: Norm, inputs: tuple[Tensor]) -> None:
    variance, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
    norm.weight.copy_((variance + EPS).rsqrt())
    norm.bias.copy_(-mean * norm.weight)
