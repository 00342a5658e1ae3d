"""Real architectures by kind, small and with random weights, and tasks for them: what tests/models/test_zoo.py trains."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WAYS = 3


def generator(split: str, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(3 * number + ("train", "val", "test").index(split))


def halves(tree: dict[str, Tensor] | tuple[Tensor, ...], at: int) -> tuple[Any, Any]:
    if isinstance(tree, dict):
        return {name: t[:at] for name, t in tree.items()}, {name: t[at:] for name, t in tree.items()}
    return tuple(t[:at] for t in tree), tuple(t[at:] for t in tree)


def images(split: str, number: int, side: int = 32) -> tuple:
    y = torch.arange(2 * WAYS) % WAYS
    x = torch.rand(2 * WAYS, 3, side, side, generator=generator(split, number)) + y[:, None, None, None] / 4
    return halves((x, y), WAYS)


def large(split: str, number: int) -> tuple:
    return images(split, number, 64)


def tokens(split: str, number: int, length: int = 6) -> tuple:
    """Sentences of which the last words may be padding; the class is in their first word."""
    y, g = torch.arange(2 * WAYS) % WAYS, generator(split, number)
    ids = torch.randint(4, 30, (2 * WAYS, length), generator=g)
    ids[:, 0] = y + 1
    mask = (torch.arange(length) < torch.randint(3, length + 1, (2 * WAYS, 1), generator=g)).long()
    return halves({"input_ids": ids * mask, "attention_mask": mask, "labels": y}, WAYS)


def text(split: str, number: int) -> tuple:
    """Continuations; what is padding counts for nothing."""
    ids = torch.randint(30, (4, 7), generator=generator(split, number))
    return halves({"input_ids": ids, "labels": ids.where(torch.arange(7) < 6, torch.tensor(-100))}, 2)


def pairs(split: str, number: int) -> tuple:
    """From one sequence to another."""
    ids = torch.randint(1, 30, (4, 5), generator=generator(split, number))
    return halves({"input_ids": ids, "decoder_input_ids": ids.roll(1, 1), "labels": ids}, 2)


def sequences(split: str, number: int) -> tuple:
    y = torch.arange(2 * WAYS) % WAYS
    x = torch.randn(2 * WAYS, 5, 4, generator=generator(split, number)) + y[:, None, None]
    return halves((x, y), WAYS)


def curves(split: str, number: int) -> tuple:
    x = 2 * torch.rand(8, 2, generator=generator(split, number)) - 1
    return halves((x, torch.sin(3 * x[:, :1] + number) * x[:, 1:]), 4)


def graphs(split: str, number: int) -> tuple:
    """Adjacency and features of small graphs, and how many edges they have."""
    g = generator(split, number)
    edges = (torch.rand(6, 5, 5, generator=g) < 0.4).float()
    edges = ((edges + edges.mT) > 0).float()
    features, y = torch.randn(6, 5, 3, generator=g), edges.sum((1, 2))[:, None] / 10
    return ((edges[:3], features[:3]), y[:3]), ((edges[3:], features[3:]), y[3:])


class Recurrent(nn.Module):
    def __init__(self, input_shape: tuple, outputs: int, kind: str = "LSTM"):
        super().__init__()
        self.body, self.head = getattr(nn, kind)(input_shape[-1], 8, batch_first=True), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Encoder(nn.Module):
    def __init__(self, input_shape: tuple, outputs: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.embed, self.body, self.head = nn.Linear(input_shape[-1], 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)).mean(1))


class Siren(nn.Module):
    def __init__(self, input_shape: tuple, outputs: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(input_shape[0], 16), nn.Linear(16, 16), nn.Linear(16, outputs)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(5 * layer(x))
        return self.layers[-1](x)


class Hyper(nn.Module):
    """A network that makes another's weights."""

    def __init__(self, input_shape: tuple, outputs: int):
        super().__init__()
        self.shape, self.code = (outputs, input_shape[0]), nn.Parameter(torch.ones(4))
        self.make = nn.Linear(4, outputs * input_shape[0])

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.make(self.code).view(self.shape)))


class Graph(nn.Module):
    def __init__(self, input_shape: tuple, outputs: int):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, outputs)

    def forward(self, edges: Tensor, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = torch.tanh(layer(edges @ x + x))
        return self.head(x.mean(1))


class Tied(nn.Module):
    def __init__(self, input_shape: tuple, outputs: int):
        super().__init__()
        self.embed, self.mix = nn.Embedding(30, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 30, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(input_ids).cumsum(1))))


class Headed(nn.Module):
    """A frozen backbone with batch norms, and a head."""

    def __init__(self, input_shape: tuple, outputs: int):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten())
        self.backbone.requires_grad_(False)
        self.head = nn.Linear(8 * 15 * 15, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Picture(nn.Module):
    """torchvision's vision transformer at a small size."""

    def __new__(cls, input_shape: tuple, outputs: int) -> nn.Module:
        from torchvision.models import VisionTransformer

        return VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=outputs)


class Windows(nn.Module):
    """torchvision's Swin transformer at a small size."""

    def __new__(cls, input_shape: tuple, outputs: int) -> nn.Module:
        from torchvision.models import SwinTransformer

        return SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=outputs)


class Entry(NamedTuple):
    model: str
    tasks: str
    args: dict[str, Any] = {}
    loss: str | None = None
    alone: bool = False  # vmap cannot take it


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
WORDS = SMALL | NO_DROPOUT | {"vocab_size": 40, "max_position_embeddings": 16}
GPT = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
       "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
LORA = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
ZOO = {
    "torchvision resnet18": Entry("torchvision:resnet18", "zoo:images"),
    "torchvision mobilenet_v3_small": Entry("torchvision:mobilenet_v3_small", "zoo:images", {"dropout": 0.0}),
    "torchvision efficientnet_b0": Entry("torchvision:efficientnet_b0", "zoo:large",
                                         {"dropout": 0.0, "stochastic_depth_prob": 0.0}),
    "torchvision convnext_tiny": Entry("torchvision:convnext_tiny", "zoo:images", {"stochastic_depth_prob": 0.0}),
    "torchvision squeezenet1_1": Entry("torchvision:squeezenet1_1", "zoo:images", {"dropout": 0.0}),
    "torchvision vision transformer": Entry("zoo:Picture", "zoo:images"),
    "torchvision swin transformer": Entry("zoo:Windows", "zoo:images"),
    "timm resnet10t": Entry("timm:resnet10t", "zoo:images"),
    "timm vit_tiny_patch16_224": Entry("timm:vit_tiny_patch16_224", "zoo:images", {"img_size": 32, "depth": 2}),
    "timm mixer_s32_224": Entry("timm:mixer_s32_224", "zoo:images", {"img_size": 32}),
    "HF ViT": Entry("hf:ViTForImageClassification", "zoo:images", SMALL | NO_DROPOUT | {"image_size": 32, "patch_size": 16},
                    "cross_entropy"),
    "HF BERT": Entry("hf:BertForSequenceClassification", "zoo:tokens", WORDS, alone=True),
    "HF DistilBERT": Entry("hf:DistilBertForSequenceClassification", "zoo:tokens", {
        "vocab_size": 40, "max_position_embeddings": 16, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24,
        "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}, alone=True),
    "HF GPT-2": Entry("hf:GPT2LMHeadModel", "zoo:text", GPT, "next_token"),
    "HF Llama": Entry("hf:LlamaForCausalLM", "zoo:text", SMALL | {"vocab_size": 40, "max_position_embeddings": 16,
                                                                  "num_key_value_heads": 1}, "next_token"),
    "HF T5": Entry("hf:T5ForConditionalGeneration", "zoo:pairs", {
        "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0,
        "decoder_start_token_id": 0}, "dense_cross_entropy"),
    "LoRA on HF GPT-2": Entry("hf:GPT2LMHeadModel", "zoo:text", GPT | {"lora": LORA}, "next_token"),
    "LSTM": Entry("zoo:Recurrent", "zoo:sequences", alone=True),
    "GRU": Entry("zoo:Recurrent", "zoo:sequences", {"kind": "GRU"}, alone=True),
    "RNN": Entry("zoo:Recurrent", "zoo:sequences", {"kind": "RNN"}, alone=True),
    "TransformerEncoder": Entry("zoo:Encoder", "zoo:sequences"),
    "graph convolution": Entry("zoo:Graph", "zoo:graphs"),
    "SIREN": Entry("zoo:Siren", "zoo:curves"),
    "hypernetwork": Entry("zoo:Hyper", "zoo:curves"),
    "tied weights": Entry("zoo:Tied", "zoo:text", loss="next_token"),
    "frozen backbone with a head": Entry("zoo:Headed", "zoo:images"),
    "mlp": Entry("mlp", "zoo:curves", {"channels": 8}),
    "conv4": Entry("conv4", "zoo:images", {"channels": 4}),
    "resnet12": Entry("resnet12", "zoo:images", {"channels": 2}),
}


def use_torchvision() -> None:
    """torchvision's wheel is of a CUDA build: beside the CPU build of torch its operators are missing, and its import fails
    where it describes them. Users of a matching pair need nothing."""
    if not hasattr(torch.ops.torchvision, "nms"):
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


use_torchvision()
