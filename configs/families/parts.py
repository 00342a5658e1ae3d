"""The models and tasks of the families that the repository does not ship: data that every machine has, sizes of which two cores
train hundreds of runs.

Belongs here: what a configuration beside this file names. Each is written as a user of the project would write it.
"""
from __future__ import annotations

import copy
import functools
import math
import os
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F

from alpha_maml.data.omniglot import load_images
from alpha_maml.trainer.setup import cache

SPLITS = ("train", "val", "test")


def seeded(split: str, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(3 * number + SPLITS.index(split))


# Networks of images.


class Patches(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021): patches of 7 x 7, pre-norm layers, LayerNorm, GELU, a class token."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, width: int = 48, layers: int = 2, heads: int = 4):
        super().__init__()
        tokens = (input_shape[1] // 7) * (input_shape[2] // 7)
        self.embed = nn.Conv2d(input_shape[0], width, 7, stride=7)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens + 1, width))
        self.layers = nn.ModuleList(Layer(width, heads, causal=False) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in
                             self.attend(self.norm_1(x)).chunk(3, -1))
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if self.causal:
            length = x.shape[-2]
            scores = scores + torch.full((length, length), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        x = x + self.join((scores.softmax(-1) @ value).transpose(-3, -2).flatten(-2))
        return x + self.narrow(F.gelu(self.wide(self.norm_2(x))))


# Perceptrons.


class Perceptron(nn.Module):
    """x [n, inputs] -> [n, outputs]: two hidden layers with tanh."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, width: int = 40):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(math.prod(input_shape), width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
                                    nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Siren(nn.Module):
    """A coordinate network (Sitzmann et al. 2020): sines for activations."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, width: int = 48, frequency: float = 15.0):
        super().__init__()
        self.frequency = frequency
        self.layers = nn.ModuleList([nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, outputs)])
        nn.init.uniform_(self.layers[0].weight, -0.5, 0.5)
        for layer in self.layers[1:]:
            bound = math.sqrt(6 / width) / frequency
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(self.frequency * layer(x))
        return self.layers[-1](x) + 0.5


@functools.cache
def _drawings() -> Tensor:
    """Omniglot at 14 x 14: [1623, 20, 14, 14], ink = 1."""
    images, _ = load_images(_root(), cache())
    return F.avg_pool2d(torch.from_numpy(images).float() / 255, 2)


def _root() -> str | None:
    """The folder of Omniglot's archives, $OMNIGLOT_ROOT or beside the checkout; else they are downloaded once."""
    folder = Path(os.environ.get("OMNIGLOT_ROOT", Path(__file__).parents[3] / "shared/data/omniglot"))
    return str(folder) if folder.is_dir() else None


def drawing(split: str, number: int):
    """One drawing: a random half of its pixels, and the other half (as Tancik et al. 2021, arXiv 2012.02189)."""
    generator, (low, high) = seeded(split, number), {"train": (0, 1100), "val": (1100, 1200), "test": (1200, 1623)}[split]
    which = int(torch.randint(20 * (high - low), (), generator=generator))
    image = _drawings()[low + which // 20, which % 20]
    side = torch.linspace(-1, 1, image.shape[-1])
    points, order = torch.cartesian_prod(side, side), torch.randperm(image.numel(), generator=generator)
    ink, half = image.flatten()[:, None], image.numel() // 2
    return (points[order[:half]], ink[order[:half]]), (points[order[half:]], ink[order[half:]])


def growth(split: str, number: int):
    """An equation u' = r u (1 - u / c), u(0) = 0.2, with a rate and a capacity of its own; no solution is given."""
    generator = seeded(split, number)
    rate, capacity = 1 + 3 * torch.rand(1, generator=generator), 0.5 + torch.rand(1, generator=generator)
    x = torch.rand(32, 1, generator=generator)
    whole = {"x": x, "rate": rate.expand(32, 1), "capacity": capacity.expand(32, 1)}
    return {name: t[:16] for name, t in whole.items()}, {name: t[16:] for name, t in whole.items()}


class Solution(nn.Module):
    """u(x) with u(0) = 0.2, and its slope, by forward differentiation."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, width: int = 32):
        super().__init__()
        self.body = Perceptron((1,), 1, width)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        u, slope = jvp(lambda x: 0.2 + x * self.body(x), (x,), (torch.ones_like(x),))
        return {"u": u, "slope": slope}


def residual(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """The mean squared residual of the equation of growth."""
    u = outputs["u"]
    return (outputs["slope"] - batch["rate"] * u * (1 - u / batch["capacity"])).square().mean()


# Ratings: a low-rank table of users and items.

ITEMS, FACTORS = 60, 4
TASTES = torch.randn(ITEMS, FACTORS, generator=torch.Generator().manual_seed(0))  # of items: unknown to the model
SIDE = torch.randn(FACTORS, 6, generator=torch.Generator().manual_seed(1))  # from a user's wish to what is known of the user


def user(split: str, number: int):
    """Six rated items of a new user and ten others; of the user six noisy facts are known."""
    generator = seeded(split, number)
    wish = torch.randn(FACTORS, generator=generator)
    facts = (wish @ SIDE / 2 + torch.randn(6, generator=generator)).expand(16, 6)
    items = torch.randperm(ITEMS, generator=generator)[:16]
    ratings = 2 * torch.sigmoid(TASTES[items] @ wish)[:, None] - 1
    whole = {"items": items, "facts": facts, "labels": ratings + 0.1 * torch.randn(16, 1, generator=generator)}
    return {name: t[:6] for name, t in whole.items()}, {name: t[6:] for name, t in whole.items()}


class Ratings(nn.Module):
    """An embedding of items beside the facts, and a perceptron (as MeLU, Lee et al. 2019)."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, width: int = 32):
        super().__init__()
        self.embed = nn.Embedding(ITEMS, 16)
        self.layers = nn.Sequential(nn.Linear(22, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, items: Tensor, facts: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layers(torch.cat([self.embed(items), facts], -1))}


# Text: the modules of Python's standard library.

LENGTH, SYMBOLS = 32, 128


@functools.cache
def _texts() -> dict[str, list[Tensor]]:
    """The modules that are long enough, by split: each its bytes, other than ASCII as a question mark."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [torch.frombuffer(bytearray(t), dtype=torch.uint8).long() for t in map(Path.read_bytes, paths) if len(t) > 4000]
    texts = [torch.where(t < SYMBOLS, t, ord("?")) for t in texts]
    return {"train": texts[: len(texts) * 2 // 3], "val": texts[len(texts) * 2 // 3 : len(texts) * 5 // 6],
            "test": texts[len(texts) * 5 // 6 :]}


def module(split: str, number: int):
    """One module: four pieces from its first half, and four from what follows; each byte is to be told from those before."""
    generator, texts = seeded(split, number), _texts()[split]
    text = texts[int(torch.randint(len(texts), (), generator=generator))]
    half = len(text) // 2
    starts = torch.randint(half - LENGTH - 1, (8,), generator=generator)
    starts[4:] += half
    pieces = torch.stack([text[s : s + LENGTH + 1] for s in starts.tolist()])
    return (pieces[:4, :-1], pieces[:4, 1:]), (pieces[4:, :-1], pieces[4:, 1:])


class Reader(nn.Module):
    """A byte-level transformer: ids [n, L] -> logits [n, L, symbols]."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, width: int = 32, layers: int = 2, heads: int = 2):
        super().__init__()
        self.embed, self.positions = nn.Embedding(SYMBOLS, width), nn.Parameter(0.02 * torch.randn(LENGTH, width))
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(width, heads, causal=True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, SYMBOLS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions[: ids.shape[-1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Recurrent(nn.Module):
    """A byte-level GRU (Cho et al. 2014), cell by cell."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, width: int = 48):
        super().__init__()
        self.embed, self.width = nn.Embedding(SYMBOLS, 24), width
        self.given, self.kept, self.head = nn.Linear(24, 3 * width), nn.Linear(width, 3 * width), nn.Linear(width, SYMBOLS)

    def forward(self, ids: Tensor) -> Tensor:
        given, h, states = self.given(self.embed(ids)), torch.zeros(len(ids), self.width), []
        for x in given.unbind(-2):
            (a, b, c), (d, e, f) = x.chunk(3, -1), self.kept(h).chunk(3, -1)
            update = torch.sigmoid(b + e)
            h = update * h + (1 - update) * torch.tanh(c + torch.sigmoid(a + d) * f)
            states.append(h)
        return self.head(torch.stack(states, -2))


class Low(nn.Module):
    """A frozen linear layer with a low-rank addition (LoRA, Hu et al. 2022)."""

    def __init__(self, layer: nn.Linear, rank: int = 4):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) / math.sqrt(layer.in_features))
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.a.mT @ self.b.mT


@functools.cache
def _trained() -> Reader:
    """A reader trained on the training modules by AdamW, as one downloads it elsewhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reader = Reader((), 0)
        optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
        for step in range(300):
            tasks = [module("train", 10**6 + 8 * step + i)[0] for i in range(8)]
            x, y = (torch.cat(part) for part in zip(*tasks))
            loss = F.cross_entropy(reader(x).flatten(0, 1), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return reader


def adapters(input_shape: tuple[int, ...], outputs: int, rank: int = 4) -> nn.Module:
    """The trained reader, frozen, with adapters beside the linear layers of its blocks."""
    reader = copy.deepcopy(_trained()).requires_grad_(False)
    for layer in reader.layers:
        for name in ("attend", "join", "wide", "narrow"):
            setattr(layer, name, Low(getattr(layer, name), rank))
    return reader
