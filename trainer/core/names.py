"""The names of the tensors of a training state, as checkpoints hold them, whatever the engine:

    theta.NAME          theta's tensors
    outer.PART.NAME     what theta's step remembers: `previous`, the optimiser's memory, `average`
    outer.count         steps taken
    rates.alpha, rates.beta, rates.PART
"""
from __future__ import annotations

from torch import Tensor

from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.core.rules.rule import Rates

THETA, OUTER, RATES = "theta.", "outer.", "rates."
ALPHA, BETA, COUNT, AVERAGE = f"{RATES}alpha", f"{RATES}beta", f"{OUTER}count", f"{OUTER}average."
NEEDED = (ALPHA, BETA)  # of the rates: the others only a rule remembers


def of_theta(theta: Params, memory: dict[str, Params], count: Tensor) -> dict[str, Tensor]:
    """theta and what its step remembers under their names in a checkpoint."""
    state = {f"{THETA}{name}": p for name, p in theta.items()}
    for part, tensors in memory.items():
        state |= {f"{OUTER}{part}.{name}": t for name, t in tensors.items()}
    return state | {COUNT: count}


def theta_of(state: dict[str, Tensor], parts: list[str]) -> tuple[Params, dict[str, Params], Tensor]:
    """The inverse, for a memory of these parts."""
    return _under(state, THETA), {part: _under(state, f"{OUTER}{part}.") for part in parts}, state[COUNT]


def of_rates(rates: Rates) -> dict[str, Tensor]:
    memory = {f"{RATES}{name}": t for name, t in rates.memory.items()}
    return {ALPHA: rates.alpha, BETA: rates.beta} | memory


def rates_of(state: dict[str, Tensor]) -> Rates:
    """The inverse."""
    memory = _under(state, RATES)
    return Rates(memory.pop("alpha"), memory.pop("beta"), memory)


def without_rates(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if not name.startswith(RATES)}


def learned(state: dict[str, Tensor]) -> Params:
    """What evaluation uses: theta's average where the state holds one, else theta."""
    return _under(state, AVERAGE) or _under(state, THETA)


def _under(state: dict[str, Tensor], prefix: str) -> Params:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
