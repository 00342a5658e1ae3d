"""One contender of the benchmark: the summed meta-gradient of the same tasks, from the same weights, in its own library.

Started by bench.py, one process each (ours also as two ranks): it saves its gradient in float64, and then computes it in
float32 once for every line on its standard input.
"""
from __future__ import annotations

import argparse
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn import functional as F

from alpha_maml.data.losses.cross_entropy import cross_entropy
from alpha_maml.data.tasks import labelled
from alpha_maml.launch.runtime import settle
from alpha_maml.models import ops
from alpha_maml.models.build import build as build_model
from alpha_maml.models.functional import function, function_of_tasks
from alpha_maml.models.ops import convolution
from alpha_maml.trainer.compiled import compiled
from alpha_maml.trainer.core.inner import InnerLoop
from alpha_maml.trainer.core.meta_gradient import VMAP_INPUTS, each_task, meta_gradient, one_task
from alpha_maml.trainer.engines.collective import World, sum_in_place
from alpha_maml.trainer.setup import cache

ALPHA = 0.1
Gradient = dict[str, Any]  # by the names of Reference; arrays of the contender's library


class Reference(nn.Module):
    """The net of models.conv4 from torch's own layers, as users of the other libraries write it."""

    def __init__(self, shape: tuple[int, ...], ways: int, channels: int, pooled: bool):
        super().__init__()
        sizes = [shape[0]] + [channels] * 4
        self.pooled = pooled
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, 1 if pooled else 2, 1, bias=False) for i, o in zip(sizes, sizes[1:]))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels, track_running_stats=False) for _ in range(4))
        self.head = nn.Linear(channels * (shape[1] // 16) ** 2 if pooled else channels, ways)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x)))
            x = F.max_pool2d(x, 2) if self.pooled else x
        return self.head(x.flatten(1) if self.pooled else x.mean((2, 3)))


def their_name(name: str) -> str:
    """The name in Reference of a parameter of models.conv4."""
    if name.startswith("head"):
        return name
    _, number, layer, kind = name.split(".")
    return f"{layer}s.{number}.{kind}"


class Problem:
    """Weights from our model's seed, and random tasks."""

    def __init__(self, tasks: int, ways: int, shots: int, steps: int, size: int, colours: int, channels: int,
                 dtype: torch.dtype = torch.float32, device: str = "cpu"):
        self.steps, self.ways, self.pooled = steps, ways, size > 28
        shape = (colours, size, size)
        self.model = build_model("conv4_pooled" if self.pooled else "conv4", shape, ways, 0, channels).to(device, dtype)
        self.theta = {name: p.detach() for name, p in self.model.named_parameters()}
        self.net = Reference(shape, ways, channels, self.pooled).to(device, dtype)
        self.net.load_state_dict({their_name(n): p.permute(0, 3, 1, 2) if p.dim() == 4 else p for n, p in self.theta.items()})
        generator = torch.Generator().manual_seed(1)

        def blobs(images: int) -> torch.Tensor:
            """Smooth random images, as different from each other as drawings are: pure noise looks alike to a net that
            averages. A little noise on top: maxima over equal pixels would be a matter of rounding."""
            coarse, noise = (torch.randn(tasks * images, colours, side, side, generator=generator, dtype=torch.float64)
                             for side in (7, size))
            smooth = F.interpolate(coarse, (size, size), mode="bilinear")
            return (smooth + 0.1 * noise).unflatten(0, (tasks, images)).to(dtype)

        y, query_y = torch.arange(ways).repeat_interleave(shots), torch.arange(ways)
        tasks = labelled(blobs(ways * shots), y.repeat(tasks, 1), blobs(ways), query_y.repeat(tasks, 1))
        self.tasks = tasks.map(lambda x: x.to(device))

    def theirs(self, gradient: dict[str, torch.Tensor]) -> Gradient:
        """A gradient of our model under the names and in the layout of Reference."""
        return {their_name(n): g.permute(0, 3, 1, 2) if g.dim() == 4 else g for n, g in gradient.items()}

    def of_net(self) -> Gradient:
        return {name: p.grad for name, p in self.net.named_parameters()}

    def each(self) -> zip:
        return zip(*self.tasks.tensors())


def ours(problem: Problem, native: bool = True) -> Callable[[], Gradient]:
    """core.meta_gradient, its shard of the tasks, and the sum over ranks; on a CPU as it runs where there is a compiler."""
    if native and problem.tasks.support_x.device.type == "cpu":
        ops.enable_native(problem.model, cache(), "c++")
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tasks = problem.tasks.map(lambda x: x.tensor_split(size)[rank])
    alpha = tasks.support_x.new_tensor(ALPHA)

    def run() -> Gradient:
        found = meta_gradient(None, cross_entropy, problem.theta, alpha, tasks, InnerLoop(problem.steps),
                              forward_tasks=function_of_tasks(problem.model)).gradient
        flat = torch.cat([g.flatten() for g in found.values()])
        sum_in_place(flat, World(rank, size))
        parts = flat.split([g.numel() for g in found.values()])
        return problem.theirs({n: p.view_as(g) for (n, g), p in zip(found.items(), parts)})

    return run


def captured(run: Callable[[], Gradient]) -> Callable[[], Gradient]:
    """`run` as one CUDA graph, as trainer.captured makes one of the whole iteration."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        found = run()

    def replay() -> Gradient:
        graph.replay()
        return found

    return replay


def ours_tf32(problem: Problem) -> Callable[[], Gradient]:
    """With the key `precision: tf32`."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    return captured(ours(problem))


def ours_bf16(problem: Problem) -> Callable[[], Gradient]:
    """With every product's operands rounded to bfloat16: what that would cost in precision. Not offered."""
    def rounded(product: Callable) -> Callable:
        return lambda a, b, *rest: product(a.bfloat16(), b.bfloat16(), *rest).float()

    if problem.tasks.support_x.dtype == torch.float32:
        torch.bmm, convolution._matmul = rounded(torch.bmm), rounded(convolution._matmul)
    return captured(ours(problem))


def ours_any_model(problem: Problem) -> Callable[[], Gradient]:
    """core.meta_gradient as it runs models that know nothing of tasks: small ones by torch.func inside vmap, others in turn."""
    alpha = problem.tasks.support_x.new_tensor(ALPHA)

    def apply(params: dict[str, torch.Tensor], batch: tuple) -> torch.Tensor:
        return functional_call(problem.model, params, (batch[0],))

    tasks = problem.tasks
    in_turn = (tasks.support_x[0].numel() + tasks.query_x[0].numel()) > VMAP_INPUTS  # as trainer.setup decides it
    how = {"chunk": 1, "forward_tasks": one_task(apply)} if in_turn else {}
    return lambda: problem.theirs(meta_gradient(apply, cross_entropy, problem.theta, alpha, tasks,
                                                InnerLoop(problem.steps), **how).gradient)


def ours_compiled(problem: Problem) -> Callable[[], Gradient]:
    """The same as one graph of torch.compile (`compile: true`)."""
    alpha = problem.tasks.support_x.new_tensor(ALPHA)
    apply, way = function(problem.model, training=True), compiled(each_task)
    return lambda: problem.theirs(meta_gradient(apply, cross_entropy, problem.theta, alpha, problem.tasks,
                                                InnerLoop(problem.steps), len(problem.tasks.support_x), each_task=way).gradient)


def loop(problem: Problem) -> Callable[[], Gradient]:
    """Plain torch, one task after the other."""
    theta = {name: p.detach().requires_grad_() for name, p in problem.net.named_parameters()}

    def run() -> Gradient:
        total = [torch.zeros_like(p) for p in theta.values()]
        for x, y, query_x, query_y in problem.each():
            phi = theta
            for _ in range(problem.steps):
                loss = F.cross_entropy(functional_call(problem.net, phi, (x,)), y)
                gradients = torch.autograd.grad(loss, tuple(phi.values()), create_graph=True)
                phi = {name: p - ALPHA * g for (name, p), g in zip(phi.items(), gradients)}
            loss = F.cross_entropy(functional_call(problem.net, phi, (query_x,)), query_y)
            total = [a + b for a, b in zip(total, torch.autograd.grad(loss, tuple(theta.values())))]
        return dict(zip(theta, total))

    return run


def vmapped(problem: Problem) -> Callable[[], Gradient]:
    """torch.func in the published form, grad through vmap. Its second derivatives are wrong with this net."""
    theta = {name: p.detach() for name, p in problem.net.named_parameters()}

    def loss(params: dict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(problem.net, params, (x,)), y)

    def adapted(phi: dict, x: torch.Tensor, y: torch.Tensor, query_x: torch.Tensor, query_y: torch.Tensor) -> torch.Tensor:
        for _ in range(problem.steps):
            g = grad(loss)(phi, x, y)
            phi = {name: p - ALPHA * g[name] for name, p in phi.items()}
        return loss(phi, query_x, query_y)

    def run() -> Gradient:
        total = grad_and_value(lambda p: vmap(adapted, in_dims=(None, 0, 0, 0, 0))(p, *problem.tasks).sum())(theta)[0]
        return total

    return run


def learn2learn(problem: Problem) -> Callable[[], Gradient]:
    """learn2learn's MAML class, from its source distribution: the package itself does not build on this Python."""
    for name in ("learn2learn", "learn2learn.algorithms"):  # their __init__ files import gym and torchvision
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [os.path.join(os.environ["LEARN2LEARN"], *name.split("."))]
    from learn2learn.algorithms.maml import MAML

    maml = MAML(problem.net, lr=ALPHA, first_order=False)

    def run() -> Gradient:
        maml.zero_grad()
        for x, y, query_x, query_y in problem.each():
            learner = maml.clone()
            for _ in range(problem.steps):
                learner.adapt(F.cross_entropy(learner(x), y))
            F.cross_entropy(learner(query_x), query_y).backward()
        return problem.of_net()

    return run


def higher(problem: Problem) -> Callable[[], Gradient]:
    import higher as library

    optimizer = torch.optim.SGD(problem.net.parameters(), lr=ALPHA)

    def run() -> Gradient:
        problem.net.zero_grad()
        for x, y, query_x, query_y in problem.each():
            with library.innerloop_ctx(problem.net, optimizer, copy_initial_weights=False) as (learner, inner):
                for _ in range(problem.steps):
                    inner.step(F.cross_entropy(learner(x), y))
                F.cross_entropy(learner(query_x), query_y).backward()
        return problem.of_net()

    return run


def torchopt(problem: Problem) -> Callable[[], Gradient]:
    import torchopt as library

    net = problem.net
    inner = library.MetaSGD(net, lr=ALPHA)
    start, fresh = (library.extract_state_dict(part, by="reference") for part in (net, inner))
    parameters = dict(net.named_parameters())

    def run() -> Gradient:
        for p in parameters.values():
            p.grad = None
        for x, y, query_x, query_y in problem.each():
            for _ in range(problem.steps):
                inner.step(F.cross_entropy(net(x), y))
            F.cross_entropy(net(query_x), query_y).backward()
            library.recover_state_dict(net, start)
            library.recover_state_dict(inner, fresh)
        return {name: p.grad for name, p in parameters.items()}

    return run


def jax(problem: Problem, precision: str | None = "highest") -> Callable[[], Gradient]:
    """vmap and jit of the same function in JAX. `precision` of its products: None is its default, on a GPU TF32."""
    import jax as library
    from jax import numpy as jnp

    library.config.update("jax_default_matmul_precision", precision)
    library.config.update("jax_enable_x64", True)  # for the comparison; float32 stays float32
    theta = {name: jnp.asarray(p.detach().cpu().numpy()) for name, p in problem.net.named_parameters()}
    tasks = [jnp.asarray(x.cpu().numpy()) for x in problem.tasks.tensors()]

    def forward(params: dict, x: jnp.ndarray) -> jnp.ndarray:
        stride = (1, 1) if problem.pooled else (2, 2)
        for i in range(4):
            x = library.lax.conv_general_dilated(x, params[f"convs.{i}.weight"], stride, ((1, 1), (1, 1)),
                                                 dimension_numbers=("NCHW", "OIHW", "NCHW"))
            x = (x - x.mean((0, 2, 3), keepdims=True)) * library.lax.rsqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
            x = library.nn.relu(x * params[f"norms.{i}.weight"][:, None, None] + params[f"norms.{i}.bias"][:, None, None])
            if problem.pooled:
                x = library.lax.reduce_window(x, -jnp.inf, library.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        x = x.reshape(len(x), -1) if problem.pooled else x.mean((2, 3))
        return x @ params["head.weight"].T + params["head.bias"]

    def loss(params: dict, x: jnp.ndarray, y: jnp.ndarray) -> jnp.ndarray:
        return -jnp.take_along_axis(library.nn.log_softmax(forward(params, x)), y[:, None], 1).mean()

    def adapted(phi: dict, x: jnp.ndarray, y: jnp.ndarray, query_x: jnp.ndarray, query_y: jnp.ndarray) -> jnp.ndarray:
        for _ in range(problem.steps):
            g = library.grad(loss)(phi, x, y)
            phi = {name: p - ALPHA * g[name] for name, p in phi.items()}
        return loss(phi, query_x, query_y)

    step = library.jit(library.grad(lambda p: library.vmap(adapted, (None, 0, 0, 0, 0))(p, *tasks).sum()))
    return lambda: library.block_until_ready(step(theta))


CONTENDERS = {"ours": ours, "ours, captured": lambda problem: captured(ours(problem)), "ours, tf32": ours_tf32,
              "ours, bf16": ours_bf16, "ours, 2 ranks": ours, "ours, uncompiled": lambda problem: ours(problem, native=False),
              "ours, uncompiled, 2 ranks": lambda problem: ours(problem, native=False), "ours, any model": ours_any_model,
              "ours, any model compiled": ours_compiled, "learn2learn": learn2learn,
              "higher": higher, "TorchOpt": torchopt, "loop": loop, "vmap": vmapped, "JAX": jax,
              "JAX, tf32": lambda problem: jax(problem, None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("gradient", type=Path)
    parser.add_argument("problem", type=int, nargs=7, help="tasks ways shots steps size colours channels")
    parser.add_argument("--device", default="cpu")
    settings = parser.parse_args()
    if settings.name.startswith("ours"):
        settle()
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        dist.init_process_group("gloo")
    if settings.device == "cpu":
        torch.set_num_threads(2 // ranks)
    contender, sizes = CONTENDERS[settings.name], settings.problem
    # Compared in float64, on two of the tasks: in float32 one ReLU at its kink, and then any library, is 10 % off.
    save(settings.gradient, contender(Problem(2, *sizes[1:], dtype=torch.float64, device=settings.device))())
    if settings.name == "ours" and settings.device == "cuda":  # what the errors of float32 are measured by
        save(settings.gradient.with_suffix(".exact.npz"), ours(Problem(*sizes, dtype=torch.float64, device="cuda"))())
    if settings.device == "cpu":
        forget_peak()
    run = contender(Problem(*sizes, device=settings.device))
    save(settings.gradient.with_suffix(".timed.npz"), run())
    serve(run, ranks, device=settings.device)


def save(path: Path, gradient: Gradient) -> None:
    if os.environ["RANK"] == "0":
        np.savez(path, **{name: np.asarray(g.cpu() if isinstance(g, torch.Tensor) else g) for name, g in gradient.items()})


def resident(name: str) -> float:
    """VmRSS or VmHWM (its peak) of this process, in MiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def forget_peak() -> float:
    """Begins the peak anew; what is held now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def serve(run: Callable[[], object], ranks: int, held: float = 0.0, device: str = "cpu") -> None:
    """Computes once for every line on rank 0's standard input and prints the seconds; then the peak memory of all ranks
    in MiB, less `held`; on a GPU that of torch's allocator."""
    first = ranks == 1 or dist.get_rank() == 0

    def go() -> bool:
        wanted = torch.tensor(float(bool(sys.stdin.readline())) if first else 0.0)
        if ranks > 1:
            dist.broadcast(wanted, 0)
            sum_in_place(torch.zeros(()), World(size=ranks))  # so that all are awake when the clock starts
        return bool(wanted)

    if first:
        print("ready", flush=True)
    while go():
        begun = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if first:
            print(time.perf_counter() - begun, flush=True)
    peak = torch.cuda.max_memory_reserved() / 2**20 if device == "cuda" else resident("VmHWM") - held
    memory = torch.tensor(peak)
    if ranks > 1:
        dist.all_reduce(memory)
        dist.destroy_process_group()
    if first:
        print(float(memory), flush=True)


if __name__ == "__main__":
    main()
