"""What a model starts from beside its seed: `model.init`, and what a run keeps of frozen parameters."""
from __future__ import annotations

import hashlib
from fnmatch import fnmatchcase
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from alpha_maml.errors import InputError, reading
from alpha_maml.trainer.config import Config
from alpha_maml.trainer.core.names import ALPHA, learned
from alpha_maml.trainer.runs import checkpoint

FROZEN = "frozen.safetensors"  # in a run's folder: what started from `model.init` and is in no checkpoint


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are not learned, and buffers."""
    return {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())


def frozen_digest(model: nn.Module) -> str | None:
    """A digest of the frozen parameters, None where there are none."""
    held = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    if not held:
        return None
    digest = hashlib.sha256()
    for name, p in held.items():
        digest.update(name.encode() + p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def start(config: Config, model: nn.Module, folder: Path) -> tuple[Tensor | None, list[str]]:
    """Fills the model from `model.init`, or, in the `folder` of a run that has a checkpoint, frozen tensors from what it keeps.

    Returns:
        alpha of the run that it starts from, where there is one, and lines for the user: what did not match.

    Raises:
        InputError: there is nothing to start from, or nothing of it fits.
    """
    if (folder / FROZEN).is_file() and checkpoint.saved(folder / "checkpoints"):
        fill(model, safetensors.torch.load_file(folder / FROZEN), "*")
        return None, []
    if config.model.init is None or checkpoint.saved(folder / "checkpoints"):
        return None, []
    path = Path(config.model.init)
    held = _held(path)
    alpha = held.pop(ALPHA, None)
    taken, odd = fill(model, held, config.model.init_names or "*")
    if not taken:
        raise InputError(f"model.init: no tensor of {path} has the name and the shape of one of {config.model.name}'s "
                         f"({_listed(list(dict(model.named_parameters())))}); give another file, or change model.init_names")
    notes = [f"model.init: {len(taken)} tensors start from {path}"]
    return alpha, notes + ([f"model.init: others start anew, whose name or shape is not in it: {_listed(odd)}"] if odd else [])


def fill(model: nn.Module, held: dict[str, Tensor], patterns: str) -> tuple[list[str], list[str]]:
    """Copies what has a tensor's name and shape; the names that were taken, and the parameters that were not."""
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    taken, odd = [], []
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, t in own.items():
            fits = name in held and held[name].shape == t.shape and any(fnmatchcase(name, pattern) for pattern in wanted)
            if fits:
                t.copy_(held[name])
                taken.append(name)
            elif isinstance(t, nn.Parameter):
                odd.append(name)
    return taken, odd


def keep_frozen(model: nn.Module, config: Config, folder: Path) -> None:
    """Leaves in the run's folder what a later part of the run would need `model.init` for."""
    if config.model.init is not None and frozen_digest(model) is not None and not (folder / FROZEN).is_file():
        content = safetensors.torch.save({name: t.cpu().contiguous() for name, t in frozen_tensors(model).items()})
        partial = folder / f".{FROZEN}"
        partial.write_bytes(content)
        partial.replace(folder / FROZEN)


def _held(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of a run's folder, or of a folder of Hugging Face's."""
    with reading("model.init"):
        if (path / "config.yaml").is_file():
            newest, _ = checkpoint.newest(path / "checkpoints")
            if newest is None:
                raise InputError(f"model.init: {path} is a run without a checkpoint; train it first, or give another")
            state = checkpoint.read(newest)
            kept = safetensors.torch.load_file(path / FROZEN) if (path / FROZEN).is_file() else {}
            return kept | learned(state) | {ALPHA: state[ALPHA]}
        file = path / "model.safetensors" if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"model.init: {path} is neither a .safetensors file, nor the folder of a run, nor one with a "
                             "model.safetensors; correct it")
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise InputError(f"model.init: {file} is no safetensors file ({error}); give one that is") from None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
