"""The training step as CUDA graphs: the host starts one thing an iteration, from the drawing of the tasks to theta's step with
the sums over ranks in it, instead of a thousand kernels, each of which takes longer to start than to run.

A graph reads and writes fixed memory: the training state stands in tensors that every replay writes anew, and what an iteration
brings from outside, its number and whether to stop, is written to where the graph reads it. Iterations differ in form (the
sizes of their tasks, MAML++'s annealings); each form is captured when it first comes.
"""
from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from alpha_maml.data.tasks import TaskBatch
from alpha_maml.errors import InputError, first_line, say
from alpha_maml.trainer.core.inner import InnerLoop
from alpha_maml.trainer.engines.collective import sum_in_place
from alpha_maml.trainer.step import Problem, State, restored, snapshot, step_on, train_step

WATCHED = 10  # iterations between two signs of life of the ranks
WARM_UP = 2  # steps before a capture: what libraries allocate at first use must not be in the graph


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    weights: Tensor | None  # of the multi-step loss, where the graph reads them
    tasks: TaskBatch | None  # the same of tasks that are drawn outside of it


class Captured:
    """A `train_step` for one run. The tensors of the states that it returns are the same ones every time, written anew."""

    def __init__(self, problem: Problem, state: State):
        self.problem, device = problem, problem.world.device
        self.tensors = {name: t.clone() for name, t in snapshot(state).items()}
        self.state = restored(copy.copy(state.engine), self.tensors, state.iteration)
        self.iteration = torch.tensor(state.iteration, device=device)
        self.stop = torch.zeros((), device=device)
        self.values = torch.zeros(len(problem.metrics) + 1, dtype=torch.float64, device=device)
        self.draws = problem.source.on_device and problem.source.sizes.variety() == 1
        self.forms: dict[tuple, _Captured] | None = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.alive = torch.zeros(1, device=device)

    def __call__(self, state: State, stop: bool) -> tuple[State, Tensor]:
        problem, number = self.problem, state.iteration
        if self.forms is None:
            return train_step(problem, state, stop)
        loop = problem.inner(number)
        tasks = None if self.draws else problem.source.batch("train", number, problem.indices)
        if isinstance(tasks, list):  # of several shapes
            return train_step(problem, state, stop)
        given = [] if tasks is None else tasks.tensors()
        form = (loop.order, loop.weights is None, *(x.shape for x in given))
        self.iteration.fill_(number)
        self.stop.fill_(float(stop))
        if form not in self.forms:
            try:
                self.forms[form] = self._capture(loop, tasks)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._give_up(error)
                return train_step(problem, state, stop)
        graph, weights, fixed = self.forms[form]
        for kept, new in zip((weights, *(fixed.tensors() if fixed else ())), (loop.weights, *given)):
            if kept is not None and new is not None:
                kept.copy_(new)
        graph.replay()
        if number % WATCHED == 0:
            sum_in_place(self.alive, problem.world)  # NCCL's watchdog, which ends a rank that waits too long, sees no graph
        return self.state._replace(iteration=number + 1), self.values.clone()

    def _capture(self, loop: InnerLoop, tasks: TaskBatch | None) -> _Captured:
        weights = None if loop.weights is None else loop.weights.clone()
        loop, tasks = loop._replace(weights=weights), tasks and tasks.map(torch.clone)

        def step() -> tuple[dict[str, Tensor], Tensor]:
            problem = self.problem
            state = restored(copy.copy(self.state.engine), self.tensors, 0)
            drawn = tasks or problem.source.batch("train", self.iteration, problem.indices)
            state, values = step_on(problem, state, drawn, loop, self.stop)
            return snapshot(state), values

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):  # a checkpoint may be on its way meanwhile
            new, values = step()
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                [*self.tensors.values(), self.values], [*(new[name] for name in self.tensors), values])
        return _Captured(graph, weights, tasks)

    def _give_up(self, error: RuntimeError) -> None:
        torch.cuda.synchronize()
        if self.problem.config.capture:
            raise InputError(f"capture: true, but the iteration cannot be a CUDA graph ({first_line(error)}); leave it null, "
                             "or change what waits for the host") from None
        self.forms = None
        if self.problem.world.rank == 0:
            say(f"the iteration cannot be captured as a CUDA graph and runs operation by operation ({first_line(error)})")
