"""Normalisation: what each mode's outputs depend on, and second derivatives."""
from __future__ import annotations

import pytest
import torch
from conftest import Small
from exactness import assert_exact, query_loss, relative
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from alpha_maml.models.norm import MODES, Norm, calibrate


@pytest.mark.parametrize(("mode", "groups"), (("group", 2), ("layer", 1)))
def test_equals_torchs_own(mode: str, groups: int):
    norm, x = Norm(32, mode).double(), torch.rand(3, 32, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.uniform_(), norm.bias.uniform_()
    assert torch.allclose(norm(x), F.group_norm(x, groups, norm.weight, norm.bias), rtol=1e-12)
    assert torch.allclose(Norm(32, "none")(x), x)


@pytest.mark.parametrize(("channels", "groups"), ((64, 4), (640, 40), (40, 2), (8, 1), (37, 1)))
def test_a_group_has_sixteen_channels_or_more(channels: int, groups: int):
    assert Norm(channels, "group").groups == groups


@pytest.mark.parametrize("name", ("conv4", "conv4_pooled", "resnet12"))
def test_frozen_norms_start_as_batch_norm_of_the_given_images_and_keep_its_statistics(name: str):
    batch, frozen = (Small(name, norm=mode, channels=8).model for mode in ("batch", "frozen"))
    images = torch.rand(20, 1, 16, 16, dtype=torch.float64)
    before = frozen(images)
    calibrate(frozen, lambda: images)
    assert not torch.allclose(before, batch(images), rtol=0.1), "the norms would have nothing to do"
    assert torch.allclose(frozen(images), batch(images), rtol=1e-9)
    assert torch.allclose(frozen(images[:3]), batch(images)[:3], rtol=1e-9)
    assert frozen.training and not any(module._forward_pre_hooks for module in frozen.modules())
    calibrate(batch, lambda: pytest.fail("asked for images that no norm needs"))


@pytest.mark.parametrize("mode", MODES)
def test_only_batch_norm_is_transductive(mode: str):
    """What an image gives alone, and beside others."""
    model = Small("conv4", norm=mode, channels=32).model
    x = torch.rand(4, 1, 16, 16, dtype=torch.float64)
    assert torch.allclose(model(x)[:2], model(x[:2]), rtol=1e-9) == (mode != "batch")
    assert (model.forward_tasks is None) == (mode != "batch"), "the fast path is for batch norm alone"


@pytest.mark.parametrize("steps", (1, 2))
@pytest.mark.parametrize(("name", "mode", "channels"), (
    ("conv4", "group", 32), ("conv4", "layer", 4), ("conv4", "none", 4), ("conv4_pooled", "none", 4), ("conv4", "batch", 4),
    ("conv4", "frozen", 4), ("conv4_pooled", "frozen", 4), ("resnet12", "frozen", 2), ("resnet12", "group", 8),
    ("resnet12", "layer", 2), ("resnet12", "none", 2)))
def test_meta_gradients_are_exact(name: str, mode: str, channels: int, steps: int):
    problem, generator = Small(name, norm=mode, channels=channels), torch.Generator().manual_seed(2)
    problem.alpha = problem.alpha / 20  # larger inner steps carry ReLUs over their kinks within a difference
    for parameter, p in problem.theta.items():
        if parameter.endswith("bias"):  # of zero: with no norm, whole channels would stand on the ReLU's kink
            p.uniform_(-0.1, 0.1, generator=generator)
    assert_exact(problem, steps, "second")


@pytest.mark.parametrize("norm", ("batch", "group", "layer", "instance"))
def test_torchs_fused_affine_forms_are_exact_inside_vmap(norm: str):
    """So a user's model may have them."""
    assert_exact(Small("own:FusedNorm", norm=norm), 2, "second")


@pytest.mark.parametrize("form", ("fused batch", "fused layer", "ours batch", "ours layer", "ours group"))
def test_the_affine_part_outside_is_right_even_through_vmap(form: str):
    """grad(vmap(...).sum()), the form of the published examples, is wrong with the fused affine forms."""
    kind, mode = form.split()
    problem = Small("own:FusedNorm", norm=mode)
    if kind == "ours":
        problem.model.norm = Norm(4, mode).double()
        problem.theta = {name: p.detach() for name, p in problem.model.named_parameters()}

    def loss(params: dict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return problem.loss(functional_call(problem.model, params, (x,)), y)[0]

    def one(theta: dict, *task: torch.Tensor) -> torch.Tensor:
        support_x, support_y, query_x, query_y = task
        g = grad(loss)(theta, support_x, support_y)
        return loss({name: p - problem.alpha * g[name] for name, p in theta.items()}, query_x, query_y)

    through = grad(lambda theta: vmap(one, (None, 0, 0, 0, 0))(theta, *problem.tasks.tensors()).sum())(problem.theta)
    problem.apply = lambda params, batch: functional_call(problem.model, params, (batch[0],))
    theta = {name: p.clone().requires_grad_() for name, p in problem.theta.items()}
    right = dict(zip(theta, torch.autograd.grad(query_loss(problem, theta, problem.alpha, 1), list(theta.values()))))
    error = relative(through, right)
    assert error < 1e-12 if kind == "ours" else error > 1e-5, "torch has mended it: the affine part may be fused again"
