"""A trained run as an MLflow model. MLflow itself runs this file, where it loads or serves one ("models from code")."""
from __future__ import annotations

import copy
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from alpha_maml.trainer.learner import load


class FewShot(PythonModel):
    """{support_x, support_y, query_x} of one task -> what `Learner.predict_proba` gives for query_x, or `predict` for a
    regression, after `inner_steps` steps on the support set."""

    def load_context(self, context: PythonModelContext) -> None:
        self.learner = load(context.artifacts["weights"])

    def predict(self, context: PythonModelContext, model_input: Any, params: dict[str, Any] | None = None) -> np.ndarray:  # pyright: ignore
        learner = copy.copy(self.learner)  # `fit` changes it, and requests may be answered side by side
        try:
            learner.fit(model_input["support_x"], model_input["support_y"], (params or {}).get("inner_steps"))
            return learner.decision_function(model_input["query_x"]) if learner.regression else \
                learner.predict_proba(model_input["query_x"])
        except ValueError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from None


set_model(FewShot())
