"""The rules for alpha and beta: Algorithm 2 by hand, conversions, invariances, guards."""
from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from alpha_maml.data.tasks import TaskBatch, labelled
from alpha_maml.trainer import objective
from alpha_maml.trainer.config.keys import Config, OuterSettings, RatesSettings, TaskSettings
from alpha_maml.trainer.core.decide import Decision, Total, decide
from alpha_maml.trainer.core.decide import signals as core_signals
from alpha_maml.trainer.core.inner import alpha_sizes
from alpha_maml.trainer.core.rules.adaptive import HORIZON, REACH, SLOWER, START
from alpha_maml.trainer.core.rules.rule import CUT, Rates, Signals
from alpha_maml.trainer.core.sweep import MetaGradient
from alpha_maml.trainer.engines.collective import World
from alpha_maml.trainer.engines.replicated import ReplicatedEngine
from alpha_maml.trainer.optim.muon import Muon
from alpha_maml.trainer.optim.sgd import SGD
from alpha_maml.trainer.step import Problem, State, train_step

CURVATURES = torch.tensor([[1.0, 0.5], [2.0, 0.25], [0.3, 1.5]], dtype=torch.float64)
CENTRES = torch.tensor([[1.0, -1.0], [0.5, 2.0], [-2.0, 0.3]], dtype=torch.float64)
SHIFTS = torch.tensor([[0.1, 0.2], [-0.3, 0.1], [0.2, -0.2]], dtype=torch.float64)


class Quadratics:
    """Three tasks 1/2 (p - centre)' diag(curvature) (p - centre), whose test centre is shifted: all known in closed form.
    The "inputs" of a task are its centre, the targets its curvature."""

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def loss(self, outputs: torch.Tensor, batch: tuple) -> tuple[torch.Tensor, dict]:
        return 0.5 * self.scale * (batch[1] * outputs**2).sum(), {}

    def batch(self, split: str, iteration: int, indices: torch.Tensor) -> TaskBatch:
        centres = CENTRES + 0.1 * iteration  # the tasks change from iteration to iteration
        return labelled(*(x[indices] for x in (centres, CURVATURES, centres + SHIFTS, CURVATURES)))


def trajectory(config: Config, iterations: int, scale: float = 1.0) -> list[tuple[float, ...]]:
    theta = {"p": torch.tensor([0.7, -0.4], dtype=torch.float64)}
    def apply(params: dict, batch: tuple) -> torch.Tensor:
        return params["p"] - batch[0]

    source, outer, loop = Quadratics(scale), objective.outer_step(config), objective.inner_loop(config, theta)
    problem = Problem(config, World(), source, source.loss, apply, apply, torch.arange(3), torch.float64, loop,
                      objective.rule(config), (), outer.radius)
    rates = objective.first_rates(config, alpha_sizes(loop, theta), torch.device("cpu"))
    state = State(ReplicatedEngine(theta, outer, objective.divisor(config), World()), rates, 0)
    seen = []
    for _ in range(iterations):
        state, values = train_step(problem, state, False)
        seen.append((*state.engine.theta()["p"].tolist(), float(state.rates.alpha.max()), float(state.rates.beta)))
    return seen


def paper(reduction: str = "sum", steps: int = 1, **changes: float) -> Config:
    settings = {"alpha": 0.05, "beta": 0.02, "alpha_hyperlr": 1e-3, "beta_hyperlr": 1e-4} | changes
    config = Config(task=TaskSettings(batch=3, reduction=reduction), rates=RatesSettings(rule="paper", **settings))
    return replace(config, inner=replace(config.inner, steps=steps))


def by_hand(alpha: float, beta: float, alpha_hyperlr: float, beta_hyperlr: float, iterations: int, steps: int) -> list:
    """Algorithm 2 in closed form for diagonal quadratics, in plain floats."""
    p, previous, seen = [0.7, -0.4], [0.0, 0.0], []
    for t in range(iterations):
        S, A = [0.0, 0.0], 0.0
        for b in range(3):
            for i in range(2):
                c, centre = float(CURVATURES[b, i]), float(CENTRES[b, i]) + 0.1 * t
                shrink = 1 - alpha * c  # one inner step: (p - centre) -> (1 - alpha c) (p - centre)
                error = shrink**steps * (p[i] - centre) - float(SHIFTS[b, i])  # theta' - test centre
                S[i] += c * error * shrink**steps
                A += c * error * -c * steps * shrink ** (steps - 1) * (p[i] - centre)
        beta += beta_hyperlr * sum(s * q for s, q in zip(S, previous))
        p = [x - beta * s for x, s in zip(p, S)]
        previous = S
        alpha -= alpha_hyperlr * A
        seen.append((*p, alpha, beta))
    return seen


@pytest.mark.parametrize("steps", (1, 3))
def test_algorithm_2_by_hand(steps: int):
    expected = by_hand(0.05, 0.02, 1e-3, 1e-4, 10, steps)
    for mine, theirs in zip(trajectory(paper(steps=steps), 10), expected):
        assert mine == pytest.approx(theirs, rel=1e-12)
    assert abs(expected[-1][2] / 0.05 - 1) > 0.05 and abs(expected[-1][3] / 0.02 - 1) > 0.05, "the rates hardly moved"


def test_mean_over_tasks_with_converted_rates_is_the_same_trajectory():
    tasks = 3
    means = paper("mean", alpha_hyperlr=tasks * 1e-3, beta=tasks * 0.02, beta_hyperlr=tasks**3 * 1e-4)
    for a, b in zip(trajectory(paper(), 10), trajectory(means, 10)):
        assert a[:3] == pytest.approx(b[:3], rel=1e-12)
        assert a[3] * tasks == pytest.approx(b[3], rel=1e-12)


def adaptive(reduction: str = "mean", beta: float = 1e-3, optimizer: str = "sgd") -> Config:
    return Config(task=TaskSettings(batch=3, reduction=reduction), outer=OuterSettings(optimizer=optimizer),
                  rates=RatesSettings(rule="adaptive", alpha=1e-2, beta=beta, minimum=1e-12, maximum=1e12))


@pytest.mark.parametrize("optimizer", ("muon", "sgd", "adam"))
def test_adaptive_moves_rates_the_same_way_for_a_scaled_loss(optimizer: str):
    """A loss 1000 times as large with an alpha a thousandth: the same theta and beta, and an alpha a thousandth all along."""
    plain = adaptive(optimizer=optimizer)
    scaled = replace(plain, rates=replace(plain.rates, alpha=1e-2 / 1000))
    for a, b in zip(trajectory(plain, 40), trajectory(scaled, 40, scale=1000.0)):
        assert a[:2] == pytest.approx(b[:2], rel=1e-6, abs=1e-7)  # Adam's epsilon
        assert a[2] == pytest.approx(1000 * b[2], rel=1e-5)
        assert a[3] == pytest.approx(b[3], rel=1e-5)


def test_adaptive_does_not_care_for_sum_or_mean():
    for a, b in zip(trajectory(adaptive("mean"), 40), trajectory(adaptive("sum"), 40)):
        assert a == pytest.approx(b, rel=1e-6)


def test_fixed_rates_stay():
    config = replace(paper(), rates=replace(paper().rates, rule="fixed"))
    assert {row[2:] for row in trajectory(config, 5)} == {(0.05, 0.02)}


ONE = torch.ones((), dtype=torch.float64)


def signals(alpha: float, product: float, loss: float) -> Signals:
    """Cosines, given as if all norms were 1."""
    return Signals(loss * ONE, loss * ONE, -alpha * ONE, ONE, 0 * ONE, ONE, product * ONE, ONE)


def first(settings: RatesSettings, sizes: tuple[int, ...] = ()) -> Rates:
    return objective.first_rates(Config(rates=settings), sizes, torch.device("cpu"))


def follow(settings: RatesSettings, alphas: list[float], products: list[float]) -> Rates:
    """Of losses that alpha just reaches while it is put in place, and so small afterwards that every alpha reaches far."""
    state, rule = first(settings), objective.rule(Config(rates=settings))
    for i, (a, b) in enumerate(zip(alphas, products)):
        state = decide(rule, state, signals(a, b, 1e-9 if i > 1 else float(state.alpha) / START)).rates
    return state


def test_steady_signals_cross_decades_and_stop_at_the_bounds():
    settings = RatesSettings(alpha=1e-5, beta=1e-5, kappa=0.2)
    state = follow(settings, [0.5] * 40, [0.5] * 40)
    # In 40 iterations at kappa 0.2 alpha moves by at most exp(8); the floor beside the RMS takes a sixth, the first one counts
    # for nothing.
    assert 0.78 * 8 < math.log(float(state.alpha) / 1e-5) <= 8
    climb = sum(0.2 * SLOWER / (1 + t / HORIZON) for t in range(2, 41))
    assert math.log(float(state.beta) / 1e-5) == pytest.approx(climb)
    state = follow(replace(settings, minimum=9e-6), [0.5] * 200, [-0.9] * 200)
    assert (float(state.alpha), float(state.beta)) == (settings.maximum, 9e-6)


def test_beta_moves_alike_in_all_decades_of_a_run_and_not_by_noise():
    """Steady, it climbs as a power of the iterations; by noise it does not."""
    settings, noise = RatesSettings(beta=1e-3), torch.randn(4000, generator=torch.Generator().manual_seed(0)).tolist()
    at = [math.log(float(follow(settings, [0.0] * n, [0.5] * n).beta) / 1e-3) for n in (40, 400, 4000)]
    assert at[2] - at[1] == pytest.approx(settings.kappa * SLOWER * HORIZON * math.log(10), rel=0.05)
    assert at[1] - at[0] == pytest.approx(at[2] - at[1], rel=0.25)
    assert abs(math.log(float(follow(settings, [0.0] * 4000, [0.02 * x for x in noise]).beta) / 1e-3)) < 1


def test_alpha_starts_where_it_begins_to_matter_and_is_lifted_there_again():
    def after(alpha: list[float], norms: list[float], loss: float, count: int = 0, mean: float = 0.0) -> list[float]:
        settings = RatesSettings(alpha=1e-5)
        start, lengths = (torch.tensor(x, dtype=torch.float64) for x in (alpha, norms))
        state = first(settings, tuple(start.shape))
        means = torch.full_like(lengths, mean)
        state = state._replace(alpha=start, memory=state.memory | {"count": count * ONE, "alpha_mean": means})
        found = signals(0, 0, loss)._replace(alpha_gradient=torch.zeros_like(lengths), alignment_norm=lengths, norms=0 * ONE)
        return objective.rule(Config(rates=settings)).update(state, found).alpha.tolist()

    for alpha in (1e-5, 0.3, 9.0):
        assert after(alpha, 4.0, 2.0) == pytest.approx(START * 2 / 4)  # alpha norm = START loss
        assert after(alpha, 4.0, 2.0, count=1) == pytest.approx(START * 2 / 4)  # measured once more, from there
    lifted = math.exp(RatesSettings().kappa)
    assert after(0.3, 4.0, 2.0, count=2) == 0.3 and after(0.049, 4.0, 2.0, count=2) == pytest.approx(REACH * 2 / 4)
    assert after(1e-5, 4.0, 2.0, count=2) == pytest.approx(1e-5 * lifted)  # no faster than that
    assert after(1e-5, 4.0, 2.0, count=2, mean=-1e-9) == pytest.approx(1e-5), "lifted where that harms"
    assert after([1e-5, 3e-5], [4.0, 8.0], 2.0) == pytest.approx([START * 2 / 28, 3 * START * 2 / 28])  # together
    assert after(1e-5, 0.0, 2.0) == 1e-5 and after(1e-5, 0.0, 0.0) == 1e-5  # nothing to adapt to
    assert after(1e-5, 1e-9, 2.0) == RatesSettings().maximum and after(1.0, 1.0, 0.0) == RatesSettings().minimum


def test_an_iteration_in_which_adaptation_went_wrong_weighs_more_than_the_others():
    """Nine signals of ten say that alpha is too small, and the tenth, at so many times the norms, that it is too large."""
    settings = RatesSettings(alpha=0.1)

    def after(norm: float) -> float:
        state, rule = first(settings), objective.rule(Config(rates=settings))
        for i in range(40):
            size = norm if i % 10 == 9 else 1.0
            found = signals(-0.1 * size if i % 10 == 9 else 0.1, 0, 1e-9 if i > 1 else float(state.alpha) / START)
            state = decide(rule, state, found._replace(alignment_norm=size * ONE)).rates
        return float(state.alpha)

    assert after(30.0) < 0.5 * after(1.0)


def test_noise_holds_alpha_and_a_signal_moves_it():
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    settings = RatesSettings(alpha=0.1)
    # Noise with a mean of a tenth of its deviation, for 400 iterations: less than what a steady sign does in two.
    assert abs(math.log(float(follow(settings, [0.02 * x + 0.002 for x in noise], [0.0] * 400).alpha) / 0.1)) < 2
    assert float(follow(settings, [0.02 * x + 0.1 for x in noise], [0.0] * 400).alpha) == settings.maximum


def test_beta_endures_opposition_up_to_the_tolerance():
    settings = RatesSettings(beta=1e-3, tolerance=0.3)
    assert float(follow(settings, [0.0] * 50, [-0.2] * 50).beta) > 1e-3
    assert float(follow(settings, [0.0] * 50, [-0.4] * 50).beta) < 1e-3


def test_an_unusable_iteration_cuts_alpha_and_changes_nothing_else():
    """Adapting made the loss worse than not adapting, three times; until an iteration counts, alpha falls faster."""
    settings = RatesSettings(alpha=8.0)
    rule = objective.rule(Config(rates=settings))
    for count, expected in ((5, 1.0), (0, 0.008)):
        begin = first(settings)
        begin = state = begin._replace(memory=begin.memory | {"count": count * ONE})
        for _ in range(3):
            decision = decide(rule, state, signals(0.5, 0.5, 1.0)._replace(support_loss=0.09 * ONE))
            state = decision.rates
            assert not decision.usable and decision.finite
        assert state == begin._replace(alpha=torch.tensor(expected, dtype=torch.float64))


def test_the_first_iteration_places_the_rates_and_moves_nothing_else():
    settings = RatesSettings(alpha=8.0)
    state, rule = first(settings), objective.rule(Config(rates=settings))
    relative = signals(0.5, 0.5, 1.0)._replace(radius=0.02 * ONE)
    decision = decide(rule, state, relative)
    assert decision.usable and not rule.moves(state, relative) and rule.moves(decision.rates, relative)
    assert rule.moves(state, signals(0.5, 0.5, 1.0)), "a loop with steps of its own takes this one too"
    memory = decision.rates.memory
    assert all(float(memory[name]) == 0 for name in memory if name != "count")
    rows = trajectory(adaptive(), 3)
    assert rows[0][:2] == (0.7, -0.4) and rows[1][:2] != rows[0][:2]


@pytest.mark.parametrize("rule", ("adaptive", "paper", "fixed"))
def test_an_exploding_inner_loop_leaves_theta_finite(rule: str):
    """alpha = 1e200 overflows within one inner step of three; theta must stay, and rule adaptive must recover."""
    settings = RatesSettings(rule=rule, alpha=1e200, maximum=1e300)
    config = Config(task=TaskSettings(batch=3), rates=settings)
    config = replace(config, inner=replace(config.inner, steps=3))
    rows = trajectory(config, 5)
    assert all(row[:2] == (0.7, -0.4) for row in rows)
    assert (rows[-1][2] < 1e200) == (rule == "adaptive")


def total(**values: float) -> Total:
    """Of one quiet task, but for `values`."""
    given = {"loss": 1.0, "support_loss": 2.0, "alpha_gradient": -0.1, "alignment_norm": 1.0, "squared_norm": 4.0,
             "product": 2.0} | values
    scalar = {name: torch.tensor(value, dtype=torch.float64) for name, value in given.items()}
    sums = MetaGradient({}, scalar["alpha_gradient"], scalar["alignment_norm"], scalar["loss"], scalar["support_loss"], {})
    return Total(sums, scalar["squared_norm"], scalar["product"], ONE, 0 * ONE, {})


def after(config: Config, state: Rates, sums: Total) -> Decision:
    """What an iteration with these sums over all ranks decides."""
    outer = objective.outer_step(config)
    found = core_signals(sums, objective.divisor(config), outer.radius)
    return decide(objective.rule(config), state, found, config.on_nonfinite)


def test_beta_starts_from_the_optimisers_radius_wherever_it_was():
    """Once, and only where theta's steps are relative; outer.trust bounds it."""
    def beta_after(beta: float, count: int = 0, **of_outer: object) -> float:
        config = Config(task=TaskSettings(batch=5), outer=OuterSettings(**of_outer), rates=RatesSettings(beta=beta))
        state = first(config.rates)
        state = state._replace(memory=state.memory | {"count": count * ONE})
        return float(after(config, state, total(loss=10.0, support_loss=10.0, product=0.0)).rates.beta)

    assert beta_after(1e-5) == beta_after(0.4) == beta_after(3.0) == Muon.radius
    assert beta_after(1e-5, optimizer="sgd") == SGD.radius and beta_after(3.0, trust=1e-4) == 1e-4
    for beta in (beta_after(1e-5, count=1), beta_after(1e-5, trust=0.0), beta_after(1e-5, trust=0.0, optimizer="adam")):
        assert beta == pytest.approx(1e-5)


def begun(state: Rates) -> Rates:
    """After an iteration or two."""
    return state._replace(memory=state.memory | ({"count": 2 * ONE} if state.memory else {}))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("action", ("skip", "halve", "stop"))
@pytest.mark.parametrize("rule", ("adaptive", "paper", "fixed"))
@pytest.mark.parametrize("values", ({"loss": NAN}, {"loss": INF}, {"squared_norm": NAN}, {"squared_norm": INF}), ids=str)
def test_an_iteration_that_is_not_finite_moves_nothing_and_the_rates_as_asked(values: dict, rule: str, action: str):
    config = Config(rates=RatesSettings(rule=rule, alpha=0.4, beta=0.2), on_nonfinite=action)
    before = begun(first(config.rates))
    decision = after(config, before, total(**values))
    assert not decision.usable and not decision.finite
    alpha = 0.2 if action == "halve" or rule == "adaptive" else 0.4
    found = decision.rates
    assert (float(found.alpha), float(found.beta)) == (alpha, 0.1 if action == "halve" else 0.2)
    assert found.memory == before.memory, "moments changed"
    quiet = after(config, begun(before), total())
    assert quiet.usable and quiet.finite


@pytest.mark.parametrize(("rule", "settings", "values"), (
    ("adaptive", {}, {"alpha_gradient": NAN}), ("adaptive", {}, {"alpha_gradient": -INF, "alignment_norm": INF}),
    ("paper", {}, {"alpha_gradient": INF}), ("paper", {"beta_hyperlr": 1e308}, {}),
    ("paper", {"beta": 1e29}, {"squared_norm": 1e4}), ("fixed", {"beta": 1e29}, {"squared_norm": 1e4}),
    ("fixed", {"beta": 1e300}, {"squared_norm": 0.0})), ids=str)
def test_a_finite_loss_that_would_poison_a_rate_or_theta_is_caught(rule: str, settings: dict, values: dict):
    config = Config(rates=RatesSettings(rule=rule, **settings))
    before = begun(first(config.rates))
    found, usable, finite = after(config, before, total(**values))
    assert not usable and not finite and all(torch.isfinite(x) for x in (found.alpha, found.beta, *found.memory.values()))
    assert found == (before if rule != "adaptive" else before._replace(alpha=before.alpha / CUT))


def test_plain_maml_does_not_need_the_hypergradient():
    config = Config(rates=RatesSettings(rule="fixed"))
    decision = after(config, first(config.rates), total(alpha_gradient=INF, alignment_norm=INF))
    assert decision.usable and decision.finite


def test_an_adaptation_that_made_the_loss_worse_is_finite():
    """It is undone, and counted as skipped, but on_nonfinite has no say in it."""
    config = Config(on_nonfinite="halve")
    before = begun(first(config.rates))
    found, usable, finite = after(config, before, total(loss=21.0))
    assert not usable and finite
    assert found == before._replace(alpha=before.alpha / CUT)
