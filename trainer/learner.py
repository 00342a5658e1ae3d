"""A trained run put to use: few labelled examples of a new task in, predictions out."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

import data
import models
from data.errors import InputError
from data.tasks import Loss
from trainer import checkpoint, inner
from trainer import config as configuration
from trainer.inner import InnerLoop, Params
from trainer.maml import adapt


class Learner:
    """scikit-learn's habit: `fit` adapts to a task's support set, `predict` answers for its queries.

    Batch norm normalises by the batch that it is given (MAML's transductive setting): give all queries of a task at once.
    Every `fit` starts from the same theta. Wrong input raises ValueError.
    """

    def __init__(self, apply: Callable[[Params, Tensor], Tensor], loss: Loss, theta: Params, alpha: Tensor, loop: InnerLoop,
                 input_shape: tuple[int, ...], outputs: int, regression: bool):
        self.apply, self.loss, self.theta, self.alpha, self.loop = apply, loss, theta, alpha, loop
        self.input_shape, self.outputs, self.regression = input_shape, outputs, regression
        self.classes_: np.ndarray | None = None  # of the task, sorted
        self.phi: Params | None = None

    def fit(self, support_x: np.ndarray, support_y: np.ndarray, steps: int | None = None) -> Learner:
        """Adapts by `steps` gradient steps (the run's K) to support_x [n, *input_shape] and its labels support_y [n], any
        values that numpy can sort; for regression support_y [n, outputs]."""
        x, y = self._inputs(support_x, "support_x"), np.asarray(support_y)
        if len(y) != len(x):
            raise ValueError(f"support_y has {len(y)} entries, support_x {len(x)}; give one for each")
        if self.regression:
            targets, classes = self._numbers(y.reshape(len(y), -1), "support_y"), None
            if targets.shape[1] != self.outputs:
                raise ValueError(f"support_y has {targets.shape[1]} values an example, the model has {self.outputs} outputs")
        else:
            classes, indices = np.unique(y, return_inverse=True)
            if not 2 <= len(classes) <= self.outputs:
                raise ValueError(f"support_y holds {len(classes)} classes, the run was trained for {self.outputs}; give from 2 "
                                 f"to {self.outputs}")
            targets = torch.from_numpy(indices.reshape(-1)).to(x.device)
        self.classes_ = classes
        with torch.no_grad():
            self.phi = adapt(self._outputs, self.loss, self.theta, self.alpha, x, targets,
                             self.loop if steps is None else self.loop._replace(steps=steps))
        if not all(bool(torch.isfinite(p).all()) for p in self.phi.values()):
            self.phi = None
            raise ValueError("support_x leads to weights that are not finite; its values should be like those in training")
        return self

    def decision_function(self, x: np.ndarray) -> np.ndarray:
        """Logits [n, classes], or outputs [n, outputs] of a regression, for x [n, *input_shape]."""
        if self.phi is None:
            raise ValueError("predict before fit: call fit(support_x, support_y) first")
        with torch.no_grad():
            return self._outputs(self.phi, self._inputs(x, "x")).double().cpu().numpy()

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        """Probabilities [n, classes], in the order of `classes_`."""
        if self.regression:
            raise ValueError("predict_proba is for classification; use predict")
        return torch.from_numpy(self.decision_function(x)).softmax(-1).numpy()

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Labels [n], as in support_y; for regression outputs [n, outputs]."""
        values = self.decision_function(x)
        return values if self.regression else self.classes_[values.argmax(-1)]

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

    def _outputs(self, params: Params, x: Tensor) -> Tensor:
        """Of the classes that the task has; the others' outputs take no part."""
        outputs = self.apply(params, x)
        return outputs if self.classes_ is None else outputs[..., :len(self.classes_)]

    def _inputs(self, values: np.ndarray, name: str) -> Tensor:
        x = self._numbers(np.asarray(values), name)
        if len(x) == 0 or x.shape[1:] != self.input_shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, it must be [n, {', '.join(map(str, self.input_shape))}] with "
                             "n of 1 or more")
        return x

    def _numbers(self, values: np.ndarray, name: str) -> Tensor:
        if values.dtype.kind not in "fiub":
            raise ValueError(f"{name} holds {values.dtype}, it must hold numbers")
        x = torch.from_numpy(np.ascontiguousarray(values)).to(self.alpha.device, self.alpha.dtype)
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} holds values that are not finite; remove them")
        return x


def load(run_dir: str | Path, device: str = "cpu") -> Learner:
    """The learner of a trained run: what its newest whole checkpoint learned (theta's average where the run keeps one), its
    alpha, and its K. The data set is not needed. Raises InputError where the folder holds no such run."""
    folder = Path(run_dir)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"run_dir: {folder} is not a run's folder (it has no config.yaml); give one that is")
    config = configuration.build(folder / "config.yaml", {})
    path, _ = checkpoint.newest(folder / "checkpoints")
    if path is None:
        raise InputError(f"run_dir: {folder} has no checkpoint yet; train it first")
    state, dtype = checkpoint.read(path), getattr(torch, config.precision)
    kind = data.described(config.data, config.task.ways)
    model = models.build(config.model.name, kind.input_shape, kind.outputs, config.seed, config.model.channels,
                         config.model.args)
    names = [name for name, _ in model.named_parameters()]
    prefix = "outer.average." if f"outer.average.{names[0]}" in state else "theta."
    if any(prefix + name not in state for name in names):
        raise InputError(f"run_dir: {path} does not hold the parameters of model.name {config.model.name}; use the code that "
                         "the run was trained with")
    theta = {name: state[prefix + name].to(device, dtype) for name in names}
    model = model.to("meta")

    def apply(params: Params, x: Tensor) -> Tensor:
        return functional_call(model, params, (x,))

    loop = inner.at(config, inner.chosen(names, config.inner.adapts), config.iterations, torch.device(device))
    return Learner(apply, kind.loss, theta, state["rates.alpha"].to(device, dtype), loop, kind.input_shape,
                   kind.outputs, kind.regression)
