"""Models of other libraries: torchvision:NAME, timm:NAME, hf:CLASS or hf:FOLDER, with LoRA by peft. Each library is imported
where it is named; their wheels are the extra `models` of this package."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

Factory = Callable[..., nn.Module]  # (input_shape, outputs, **arguments)


def torchvision(name: str) -> Factory:
    """torchvision.models' NAME with a head of `outputs` classes; further arguments are its own. Random weights."""
    def build(input_shape: tuple[int, ...], outputs: int, **arguments: Any) -> nn.Module:
        import torchvision.models

        return torchvision.models.get_model(name, **{"weights": None, "num_classes": outputs} | arguments)

    return build


def timm(name: str) -> Factory:
    """timm's NAME with a head of `outputs` classes, for the channels of the images; further arguments are its own."""
    def build(input_shape: tuple[int, ...], outputs: int, **arguments: Any) -> nn.Module:
        import timm

        given = {"pretrained": False, "num_classes": outputs, "in_chans": input_shape[0]}
        return timm.create_model(name, **given | arguments)

    return build


def hf(name: str) -> Factory:
    """A class of transformers, built from the arguments of its configuration, or a folder that save_pretrained wrote.

    Arguments: `lora`, a mapping of peft.LoraConfig's arguments, freezes the model and adds adapters; `config`, which class of
    configuration, where it is not the class's own; the others go to the configuration. `outputs` is num_labels.
    """
    def build(input_shape: tuple[int, ...], outputs: int, lora: dict[str, Any] | None = None, **arguments: Any) -> nn.Module:
        import transformers

        settings = {"num_labels": outputs, "attn_implementation": "eager", "use_cache": False} | arguments
        if Path(name).is_dir():
            known = transformers.AutoConfig.from_pretrained(name, **settings)
            kind = getattr(transformers, (known.architectures or ["AutoModel"])[0])
            model = kind.from_pretrained(name, config=known, local_files_only=True, ignore_mismatched_sizes=True)
        else:
            kind = getattr(transformers, name)
            model = kind(kind.config_class(**settings))
        return model if lora is None else with_lora(model, lora)

    return build


def with_lora(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """The model, frozen, with adapters (Hu et al. 2021) by peft, which alone are learned."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(**settings))  # pyright: ignore[reportArgumentType]


KINDS: dict[str, Callable[[str], Factory]] = {"torchvision": torchvision, "timm": timm, "hf": hf}
