"""A module as a function: attention's second derivatives, modes, buffers, tied parameters."""
from __future__ import annotations

import pytest
import torch
from conftest import Small
from exactness import assert_exact
from torch import nn
from torch.func import vmap

from alpha_maml.models.functional import function, skeleton


@pytest.mark.parametrize(("steps", "order"), ((1, "second"), (2, "second"), (2, "first")))
@pytest.mark.parametrize("form", ("encoder", "multihead", "function"))
def test_attention_is_exact(form: str, steps: int, order: str):
    assert_exact(Small("own:Attention", form=form), steps, order)


@pytest.mark.parametrize("form", ("encoder", "multihead", "function"))
def test_attention_in_evaluation_mode_and_without_gradients(form: str):
    """Where torch would take its fast path, which vmap does not know; its settings are as before."""
    problem = Small("own:Attention", form=form)
    apply, x = function(problem.model, training=False), problem.tasks.query_x
    with torch.no_grad():
        together = vmap(apply, (None, 0))(problem.theta, x)
        fast = torch.stack([problem.model.eval()(images) for images in x])
    assert torch.allclose(together, fast, rtol=1e-12)
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.cuda.flash_sdp_enabled()


def test_the_model_itself_stays_as_it_is():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
            self.second.weight = self.first.weight
            self.register_buffer("scale", torch.tensor([1.0, 2.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * self.second(self.first(x)) * (1 if self.training else 3)

    model = Tied().eval()
    params, x = {name: 2 * p.detach() for name, p in model.named_parameters()}, torch.rand(4, 2)
    assert set(params) == {"first.weight", "first.bias", "second.bias"}
    train, test = function(model, training=True), function(skeleton(model), training=False)
    middle = x @ params["first.weight"].T + params["first.bias"]
    right = torch.tensor([1.0, 2.0]) * (middle @ params["first.weight"].T + params["second.bias"])
    assert torch.allclose(train(params, x), right) and torch.allclose(test(params, x), 3 * right)
    assert not model.training and all(p.device.type == "cpu" for p in model.parameters())
    assert all(p.device.type == "meta" for p in skeleton(model).parameters())
