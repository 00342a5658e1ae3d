"""The learner as scikit-learn's tools, joblib and Pillow expect it."""
from __future__ import annotations

import pickle
from pathlib import Path

import joblib
import numpy as np
import pytest
from PIL import Image
from processes import succeed
from sklearn.base import clone
from sklearn.metrics import accuracy_score, r2_score
from words import Words, tokens

import alpha_maml
from alpha_maml import load

SMALL = {"iterations": 3, "task.batch": 3, "evaluation.tasks": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, omniglot_root: str) -> Path:
    folder = tmp_path_factory.mktemp("habits") / "run"
    succeed("train", "--iterations", 20, "--evaluation.tasks", 8, "--data.name", "omniglot", "--data.root", omniglot_root,
            "--model.name", "conv4", "--model.channels", 4, "--task.ways", 3, "--task.shots", 1, "--task.queries", 2,
            "--task.batch", 2, "--tracking.uri", "disabled", "--run_dir", folder)
    return folder


def task() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.random((6, 1, 28, 28)), np.array(["a", "b", "c"] * 2), random.random((4, 1, 28, 28))


def test_clone_pickle_joblib_and_score(run: Path, tmp_path: Path):
    x, y, query = task()
    learner = load(run).fit(x, y)
    expected = learner.predict_proba(query)
    fresh = clone(learner)
    with pytest.raises(ValueError, match="predict before fit"):
        fresh.predict(query)
    joblib.dump(learner, tmp_path / "learner.joblib")
    for other in (fresh.fit(x, y), pickle.loads(pickle.dumps(learner)), joblib.load(tmp_path / "learner.joblib")):
        assert np.array_equal(other.predict_proba(query), expected)
    assert learner.score(x, y) == accuracy_score(y, learner.predict(x)) and learner.get_params() == {}
    with pytest.raises(ValueError, match="no parameters of a trained learner"):
        learner.set_params(alpha=1)


def test_images_of_pil_and_channels_last(run: Path):
    x, y, query = task()
    learner = load(run)
    expected = learner.fit(x, y).predict_proba(query)
    assert np.array_equal(learner.fit(np.moveaxis(x, 1, -1), y).predict_proba(np.moveaxis(query, 1, -1)), expected)
    images = [Image.fromarray((255 - 255 * part[0]).astype(np.uint8)) for part in x]  # Omniglot's ink is dark
    assert np.allclose(learner.fit(images, y).predict_proba(query), expected, atol=0.05)


def test_a_regression_scores_as_scikit_learn_does(tmp_path: Path):
    alpha_maml.train("mlp", "sinusoid", config=SMALL, run_dir=tmp_path / "r")
    x = np.linspace(-2, 2, 8)[:, None]
    learner = load(tmp_path / "r").fit(x, np.sin(x))
    assert learner.score(x, np.sin(x)) == pytest.approx(r2_score(np.sin(x), learner.predict(x)))


def test_dicts_of_tokens(tmp_path: Path):
    run = alpha_maml.train(Words(), tokens, config=SMALL, run_dir=tmp_path / "r")
    support, query = tokens("test", 0)
    labels = run.learner.fit(support).predict({"ids": query["ids"]})
    assert labels.shape == (3,) and set(labels.tolist()) <= {0, 1, 2}
