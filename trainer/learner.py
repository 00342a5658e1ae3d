"""A trained run put to use: few labelled examples of a new task in, predictions out."""
from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from alpha_maml.data import DATASETS, LOSSES, Description
from alpha_maml.data.build import describe
from alpha_maml.data.function import NOWHERE, FunctionTasks
from alpha_maml.data.losses.contract import answers, as_loss
from alpha_maml.data.tasks import Loss, Tree
from alpha_maml.errors import InputError
from alpha_maml.models.build import build, copied, usable
from alpha_maml.models.functional import for_each_step, function, skeleton
from alpha_maml.models.functional import learned as learned_of
from alpha_maml.models.prepare import prepare
from alpha_maml.trainer import config as configuration
from alpha_maml.trainer import objective
from alpha_maml.trainer.config import Config, storage
from alpha_maml.trainer.core.adaptation import adapt
from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.core.inner import alpha_sizes, per_step_names
from alpha_maml.trainer.core.names import ALPHA, learned
from alpha_maml.trainer.runs import checkpoint
from alpha_maml.trainer.setup import Parts
from alpha_maml.trainer.start import fill, frozen_digest, frozen_tensors, start

FROZEN = "frozen."  # before the names of frozen tensors in a learner's file


class Learner:
    """scikit-learn's habit: `fit` adapts to a task's support set, `predict` answers for its queries. It can be cloned and
    pickled.

    Batch norm normalises by the batch that it is given (MAML's transductive setting): give all queries of a task at once.
    Every `fit` starts from the same theta. Wrong input raises ValueError.
    """

    def __init__(self, config: Config, model: nn.Module, kind: Description, theta: Params, alpha: Tensor,
                 own_loss: Callable[[Any, Any], Any] | None = None):
        self.config, self.model, self.theta, self.alpha, self.own_loss = config, skeleton(model), theta, alpha, own_loss
        self.loop = objective.inner_loop_at(config, objective.inner_loop(config, theta), config.iterations, alpha.device)
        self.input_shape, self.outputs, self.regression = kind.input_shape, kind.outputs, kind.regression
        self.usual_loss = kind.loss
        self.classes_: Any = None  # of the task, sorted: [classes], None for a regression
        self.phi: Params | None = None
        self._ready(kind.prepare)

    def _ready(self, prepare_image: Callable[[Any], np.ndarray] | None) -> None:
        """Makes what is no plain value."""
        named = self.config.task.loss
        self.loss: Loss = as_loss(self.own_loss) if self.own_loss else as_loss(LOSSES.find(named)) if named else self.usual_loss
        self.apply, self.prepare_image = function(self.model, training=False), prepare_image

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("loss", "apply", "prepare_image")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        data = self.config.data
        self._ready(describe(data, self.config.task.ways).prepare if data.name in DATASETS.places else None)

    def __sklearn_clone__(self) -> Learner:
        """Itself, before any task: theta and alpha are what a clone shares."""
        clone = copy.copy(self)
        clone.classes_ = clone.phi = None
        return clone

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """There is nothing to tune: alpha and K are the run's."""
        return {}

    def set_params(self, **params: Any) -> Learner:
        if params:
            raise ValueError(f"{sorted(params)} are no parameters of a trained learner; it has none")
        return self

    def score(self, x: Any, y: Any) -> float:
        """Accuracy of `predict`, or, of a regression, the coefficient of determination."""
        answer, truth = self.predict(x), np.asarray(y)
        if not self.regression:
            return float((answer == truth).mean())
        truth = truth.reshape(answer.shape).astype(float)
        return float(1 - ((truth - answer) ** 2).sum() / ((truth - truth.mean(0)) ** 2).sum())

    def fit(self, support_x: Any, support_y: Any = None, steps: int | None = None) -> Learner:
        """Adapts by `steps` gradient steps (the run's K) to a support set.

        Args:
            support_x: [n, *input_shape]; where images are meant also [n, height, width, channels], or images of PIL; or a dict
                as the run's tasks are.
            support_y: labels [n], any values that numpy can sort; for regression [n, outputs]. None where support_x is a dict.
        """
        steps = self.config.inner.steps if steps is None else steps
        if steps < 0:
            raise ValueError(f"steps is {steps}, it must be 0 or more")
        if isinstance(support_x, dict):
            self.classes_ = None
            return self._adapted(self._inputs(support_x, "support_x"), steps)
        x, y = self._inputs(support_x, "support_x"), np.asarray(support_y)
        if y.shape[:1] != x.shape[:1]:
            raise ValueError(f"support_y has {len(y) if y.ndim else 0} entries, support_x {len(x)}; give one for each")
        if self.regression:
            targets, classes = self._numbers(y.reshape(len(y), -1), "support_y"), None
            if targets.shape[1] != self.outputs:
                raise ValueError(f"support_y has {targets.shape[1]} values an example, the model has {self.outputs} outputs")
        else:
            if y.ndim != 1:
                raise ValueError(f"support_y has shape {y.shape}, it must be [n]: a label for each example")
            classes, indices = np.unique(y, return_inverse=True)
            if not 2 <= len(classes) <= self.outputs:
                raise ValueError(f"support_y holds {len(classes)} classes, the run was trained for {self.outputs}; give from 2 "
                                 f"to {self.outputs}")
            targets = torch.from_numpy(indices.reshape(-1)).to(x.device)
        self.classes_ = classes
        return self._adapted((x, targets), steps)

    def _adapted(self, batch: Tree, steps: int) -> Learner:
        with torch.no_grad():
            self.phi = adapt(self._outputs, self.loss, self.theta, self.alpha, batch, self.loop._replace(steps=steps))
        if not all(bool(torch.isfinite(p).all()) for p in self.phi.values()):
            self.phi = None
            raise ValueError("support_x leads to weights that are not finite; its values should be like those in training")
        return self

    def decision_function(self, x: np.ndarray) -> np.ndarray:
        """Logits [n, classes], or outputs [n, outputs] of a regression, for x [n, *input_shape]."""
        if self.phi is None:
            raise ValueError("predict before fit: call fit(support_x, support_y) first")
        with torch.no_grad():
            return answers(self._outputs(self.phi, self._inputs(x, "x"))).double().cpu().numpy()

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        """Probabilities [n, classes], in the order of `classes_`."""
        if self.regression:
            raise ValueError("predict_proba is for classification; use predict")
        return torch.from_numpy(self.decision_function(x)).softmax(-1).numpy()

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Labels [n], as in support_y; for regression outputs [n, outputs]."""
        values = self.decision_function(x)
        return values if self.regression else values.argmax(-1) if self.classes_ is None else self.classes_[values.argmax(-1)]

    def table(self, x: np.ndarray, names: list[str]) -> list[list]:
        """The predictions for x as the lines of a table, its header first: a name, the label, and each class's probability;
        for regression a name and the outputs."""
        values = self.decision_function(x) if self.regression else self.predict_proba(x)
        if self.regression:
            return [["example", *(f"output_{i}" for i in range(self.outputs))],
                    *([name, *row] for name, row in zip(names, values.tolist()))]
        labels = self.classes_[values.argmax(-1)]
        return [["example", "label", *(f"p_{label}" for label in self.classes_)],
                *([name, label, *(f"{p:.6f}" for p in row)] for name, label, row in zip(names, labels, values))]

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file that `load` reads: theta under the names of the model's own parameters, alpha as ALPHA,
        and in the metadata `inner.steps` and `config`, the keys that decided theta, as JSON. Raises OSError."""
        facts = {"inner.steps": self.config.inner.steps, "config": configuration.trajectory(self.config)}
        tensors = {name: p.contiguous() for name, p in self.theta.items()} | {ALPHA: self.alpha}
        if frozen_digest(self.model) is not None:
            tensors |= {f"{FROZEN}{name}": t.contiguous() for name, t in frozen_tensors(self.model).items()}
        metadata = {"format": "pt"} | {name: json.dumps(value) for name, value in facts.items()}
        Path(path).write_bytes(safetensors.torch.save(tensors, metadata))

    def _outputs(self, params: Params, batch: Tree) -> Any:
        """Of the classes that the task has; the others' outputs take no part."""
        outputs = self.apply(params, batch)
        return outputs if self.classes_ is None else answers(outputs)[..., :len(self.classes_)]

    def _inputs(self, values: Any, name: str) -> Any:
        if isinstance(values, dict):
            return {key: self._numbers(np.asarray(value), f"{name}[{key!r}]", whole=True) for key, value in values.items()}
        if self.prepare_image and isinstance(values, list | tuple) and hasattr(values[0] if values else None, "convert"):
            values = np.stack([self.prepare_image(image) for image in values])
        values = np.asarray(values)
        if len(self.input_shape) == 3 and values.ndim == 4 and values.shape[1:] == (*self.input_shape[1:], self.input_shape[0]):
            values = values if values.shape[1:] == self.input_shape else np.moveaxis(values, -1, 1)
        x = self._numbers(values, name)
        if len(x) == 0 or x.shape[1:] != self.input_shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, it must be [n, {', '.join(map(str, self.input_shape))}] with "
                             "n of 1 or more")
        return x

    def _numbers(self, values: np.ndarray, name: str, whole: bool = False) -> Tensor:
        """As the model's own type; `whole` numbers stay whole where that is wanted."""
        if values.dtype.kind not in "fiub":
            raise ValueError(f"{name} holds {values.dtype}, it must hold numbers")
        if whole and values.dtype.kind in "iub":
            return torch.from_numpy(values.astype(np.int64)).to(self.alpha.device)
        with np.errstate(over="ignore"):  # infinite then
            x = torch.from_numpy(values.astype(np.float64)).to(self.alpha.device, self.alpha.dtype)
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} holds values that are not finite; remove them")
        return x


def load(path: str | Path, device: str = "cpu", parts: Parts = Parts()) -> Learner:  # noqa: B008
    """The learner of a trained run's folder, or of the .safetensors file that `Learner.save` wrote of one: what was learned
    (of a folder, by its newest whole checkpoint; theta's average where the run keeps one), its alpha, and its K. The data set
    is not needed. `parts` are those of a run that was trained from Python. Raises InputError where there is no such run.

    A configuration may name a model or a data set by import path, which runs that code: load only what you trust."""
    path = Path(path)
    config, theta, alpha = _saved(path) if path.suffix == ".safetensors" else _trained(path)
    dtype = getattr(torch, storage(config.precision))
    kind = describe(config.data, config.task.ways) if parts.task is None else FunctionTasks(
        config.data.name, parts.task, NOWHERE, config.task.ways).description()
    model = usable(config.model.name, copied(parts.model, config.model.learns)) if parts.model is not None else build(
        config.model.name, kind.input_shape, kind.outputs, config.seed, config.model.channels, config.model.args)
    prepare(config.model.name, model, config.model.learns)
    if path.is_dir():
        start(config, model, path)
    else:
        fill(model, {name.removeprefix(FROZEN): t for name, t in theta.items() if name.startswith(FROZEN)}, "*")
    for_each_step(model, per_step_names(learned_of(model), config.inner.per_step), config.inner.steps)
    needed = learned_of(model)
    if not alpha.is_floating_point() or any(
            name not in theta or theta[name].shape != p.shape or not theta[name].is_floating_point()
            for name, p in needed.items()):
        raise InputError(f"run_dir: {path} does not hold alpha and the parameters of model.name {config.model.name}; use the "
                         "code that the run was trained with")
    # Copies: the bytes of a file lie anywhere, and products of unaligned memory round differently.
    theta = {name: theta[name].to(device, dtype, copy=True) for name in needed}
    learner = Learner(config, model.to(device, dtype), kind, theta, alpha.to(device, dtype), parts.loss)
    sizes = alpha_sizes(learner.loop, theta)
    if alpha.shape != sizes:
        raise InputError(f"run_dir: {path} holds an alpha of shape {list(alpha.shape)}, rates.alpha_shape "
                         f"{learner.loop.alpha_shape} has {list(sizes)}; use the file as it was written")
    return learner


def _trained(folder: Path) -> tuple[Config, Params, Tensor]:
    config = configuration.of_run(folder, {})
    path, _ = checkpoint.newest(folder / "checkpoints")
    if path is None:
        raise InputError(f"run_dir: {folder} has no checkpoint yet; train it first")
    state = checkpoint.read(path)
    return config, learned(state), state.get(ALPHA, torch.empty(0))


def _saved(path: Path) -> tuple[Config, Params, Tensor]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
            theta = {name: file.get_tensor(name) for name in file.keys()}
        alpha = theta.pop(ALPHA)
        return configuration.from_keys(config, f"in {path}", {}), theta, alpha
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: is not a whole file of `alpha-maml export` ({type(error).__name__}: {error}); write it "
                         "again") from None
