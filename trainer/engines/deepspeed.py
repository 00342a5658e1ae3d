"""The engine whose theta, previous direction and moments DeepSpeed shards (the only import of deepspeed).

    stage 0  everything replicated            stage 1  previous direction, moments and theta's master copy sharded
    stage 2  the reduced gradient too         stage 3  theta itself too: gathered for an iteration's adaptation

DeepSpeed reduces and shards. The step is ours (optim.step), on this rank's flat pieces, before DeepSpeed's own, which has
nothing left to do but to hand the moved pieces round. What its defaults would do silently, clip at 1.0, average over ranks, is
undone here. Pieces are float32.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alpha_maml.trainer.core import names
from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.core.decide import Total
from alpha_maml.trainer.core.sweep import MetaGradient
from alpha_maml.trainer.engines.collective import World, sum_in_place
from alpha_maml.trainer.engines.engine import packed, unpacked
from alpha_maml.trainer.optim.optimizer import Optimizer, State
from alpha_maml.trainer.optim.step import Layout, Memory, OuterStep, Whole


def _import_deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("DS_BUILD_OPS", "0")
    import deepspeed
    import deepspeed.ops

    # On CPU, init_distributed would compile an operator of its own: over a minute, or a failure without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    return deepspeed


class Still(torch.optim.Optimizer):
    """An optimiser that leaves its parameters alone: DeepSpeed wants one, to know what to shard."""

    def __init__(self, params: Any):
        super().__init__(params, {"lr": 0.0})

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        pass


class Shards(Layout):
    """The layout of pieces that cut through theta's tensors: `tensor_of` maps each piece's elements to a tensor's number
    (int64, from 1; 0 is padding)."""

    def __init__(self, tensor_of: dict[str, Tensor], like: Params, world: World | None, gathered: Callable[[Params], Params],
                 cut: Callable[[Params], Params]):
        self.tensor_of, self.tensors, self.world, self.gathered, self.cut = tensor_of, len(like), world, gathered, cut
        self.typical = torch.nn.functional.pad(Whole(like).typical, (1, 0))  # the padding's comes first

    def sum(self, values: Tensor) -> Tensor:
        """Over the ranks that hold other elements, which are all or none."""
        return sum_in_place(values, self.world) if self.world else values

    def norms(self, pieces: Params) -> Tensor:
        """float64 [1 + tensors], as `typical`."""
        sums = torch.zeros(self.tensors + 1, dtype=torch.float64, device=next(iter(pieces.values())).device)
        for name, piece in pieces.items():
            sums.index_add_(0, self.tensor_of[name], piece.flatten().double() ** 2)
        return self.sum(sums).sqrt()

    def scaled(self, pieces: Params, factors: Tensor) -> Params:
        return {name: p * factors[self.tensor_of[name]].view_as(p).to(p.dtype) for name, p in pieces.items()}

    def directions(self, optimizer: Optimizer, gradients: Params, state: State, z: Params,
                   count: Tensor) -> tuple[Params, State]:
        if not optimizer.whole:
            return optimizer.update(gradients, state, z, count)
        found, state = optimizer.update(self.gathered(gradients), state, self.gathered(z), count)
        return self.cut(found), state


class ZeroEngine:
    """theta under DeepSpeed at ZeRO's `stage`; float32 only. The other arguments are those of ReplicatedEngine. An optimiser
    that needs whole tensors gets them gathered, and remembers them in full on every rank."""

    def __init__(self, theta: Mapping[str, Tensor], outer: OuterStep, count: int, world: World, stage: int):
        deepspeed = _import_deepspeed(world.device)
        if not dist.is_initialized():  # the plain command: one rank
            dist.init_process_group("nccl" if world.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0,  # pyright: ignore
                                    world_size=1)
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed looks there too
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        self.outer, self.count, self.world, self.stage, self.zero = outer, count, world, stage, deepspeed.zero
        values = {name: p.detach().clone() for name, p in theta.items()}
        self.names, self.sizes = list(values), [p.numel() for p in values.values()]
        # DeepSpeed lays theta out as it likes. Parameters whose bits are their elements' numbers show where each one went,
        # and spare us its private maps. 0 is left to padding.
        model, start = nn.ParameterList(nn.Parameter(p.clone()) for p in values.values()), 1
        for p in model.parameters():
            numbers = torch.arange(start, start + p.numel(), dtype=torch.int32, device=p.device)
            p.data.view(torch.int32).copy_(numbers.view_as(p))
            start += p.numel()
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # memory it does not write, its padding, is filled with nan
        self.engine: Any = deepspeed.initialize(
            model=model, optimizer=Still(model.parameters()), dist_init_required=False, config={
                "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
                # One sub-group: one piece. No bucket larger than theta: stage 3 allocates it.
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 10**12,
                                      "reduce_bucket_size": min(sum(self.sizes), 5 * 10**8)}})[0]
        torch.use_deterministic_algorithms(deterministic)
        pieces = {0: lambda: [p for _, p in self._named()], 3: lambda: self.engine.optimizer.fp32_partitioned_groups_flat}.get(
            stage, lambda: self.engine.optimizer.single_partition_of_fp32_groups)()
        self.pieces: Params = {str(i): p.detach() for i, p in enumerate(pieces)}  # of theta, on this rank
        numbers = {name: p.clone().view(torch.int32).long().flatten() for name, p in self.pieces.items()}
        self.number_of = {name: torch.where((n > 0) & (n < start), n, 0) for name, n in numbers.items()}
        ends = torch.tensor([0, *self.sizes], device=world.device).cumsum(0)
        self.layout = Shards({name: torch.searchsorted(ends, n) for name, n in self.number_of.items()}, values,
                             world if stage > 0 and world.size > 1 else None, self._whole, self._cut)
        self._write_theta(values)
        self.memory = outer.init({name: p.clone() for name, p in self.pieces.items()}, values)

    @classmethod
    def build(cls, theta: Mapping[str, Tensor], outer: OuterStep, count: int, world: World, zero_stage: int) -> ZeroEngine:
        return cls(theta, outer, count, world, zero_stage)

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return list(zip(self.names, self.engine.module.parameters()))

    def _gathered(self, write: bool = False) -> Any:
        if self.stage < 3:
            return nullcontext()
        return self.zero.GatheredParameters([p for _, p in self._named()], modifier_rank=0 if write else None)

    def theta(self) -> Params:
        with self._gathered():
            return {name: p.detach().clone() if self.stage == 3 else p.detach() for name, p in self._named()}

    def learned(self) -> Params:
        return self._whole(self.memory.parts["average"]) if self.outer.average else self.theta()

    def reduce(self, local: MetaGradient, stop: Tensor) -> Total:
        sums, stopping = unpacked(sum_in_place(packed(local, stop, torch.float64), self.world), local)
        # DeepSpeed reduces in its own backward hooks only. This surrogate's gradient is the meta-gradient; the factor
        # undoes its average over ranks and takes the mean over tasks.
        with self._gathered():
            surrogate = torch.stack([(p * local.gradient[name]).sum() for name, p in self._named()]).sum()
            self.engine.backward(surrogate * (self.world.size / self.count))
        decay, products = self.outer.gradient_decay, torch.zeros(3, dtype=torch.float64, device=self.world.device)
        gradients = {name: torch.add(g, self.pieces[name], alpha=decay) for name, g in self._reduced().items()}
        for name, gradient in gradients.items():
            g, previous = gradient.double(), self.memory.parts["previous"][name].double()
            products += torch.stack([(g * g).sum(), (g * previous).sum(), (previous * previous).sum()])
        squared, product, previous_squared = self.layout.sum(products).unbind()
        return Total(sums, squared, product, previous_squared, stopping, gradients)

    def _reduced(self) -> Params:
        """The gradient that DeepSpeed has reduced, on this rank's pieces."""
        if self.stage == 0:
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in self._named()]
            return {str(i): part for i, part in enumerate(parts)}
        found = torch.cat([g.flatten() for g in self.engine.optimizer.averaged_gradients[0]])
        (name, piece), = self.pieces.items()
        padding = piece.numel() - found.numel()
        return {name: torch.nn.functional.pad(found.to(piece.dtype), (0, padding)).view_as(piece)}

    def apply(self, total: Total, beta: Tensor, usable: Tensor) -> None:
        theta, memory = self.outer.move(self.pieces, total.gradient, total.squared_norm, beta, usable, self.memory, self.layout)
        self._hold(theta, memory)
        self.engine.step()  # what is not finite it drops by itself, on all ranks: then it is not usable either

    def _hold(self, theta: Params, memory: Memory) -> None:
        """The new pieces into DeepSpeed's own memory."""
        for name, p in self.pieces.items():
            p.copy_(theta[name])
        self.memory = memory

    def _whole(self, pieces: Params) -> Params:
        """theta, or what is laid out like it, in full on every rank: copies."""
        flat = torch.zeros(1 + sum(self.sizes), device=self.world.device)
        for name, numbers in self.number_of.items():
            flat[numbers] = pieces[name].flatten()
        flat[0] = 0
        flat = self.layout.sum(flat)
        parts = flat[1:].split(self.sizes)
        return {key: part.view(p.ds_shape if self.stage == 3 else p.shape)  # pyright: ignore[reportAttributeAccessIssue]
                for (key, p), part in zip(self._named(), parts)}

    def _cut(self, values: Params) -> Params:
        """The inverse: this rank's pieces."""
        flat = torch.cat([torch.zeros(1, device=self.world.device), *(values[key].flatten() for key, _ in self._named())])
        return {name: (flat[numbers] * (numbers > 0)).view_as(self.pieces[name]) for name, numbers in self.number_of.items()}

    def _write_theta(self, values: Params) -> None:
        for name, p in self._cut(values).items():
            self.pieces[name].copy_(p)
        with self._gathered(write=True):  # the copy that DeepSpeed computes with
            for key, p in self._named():
                p.data.copy_(values[key])

    def state(self) -> dict[str, Tensor]:
        parts = {part: self._whole(held) if part in self.outer.in_pieces else {name: t.clone() for name, t in held.items()}
                 for part, held in self.memory.parts.items()}
        return names.of_theta(self._whole(self.pieces), parts, self.memory.steps.clone())

    def load(self, state: dict[str, Tensor]) -> None:
        theta, parts, count = names.theta_of(state, self.outer.parts)
        self._write_theta(theta)
        self.memory = Memory({part: self._cut(values) if part in self.outer.in_pieces else values
                              for part, values in parts.items()}, count.clone())
