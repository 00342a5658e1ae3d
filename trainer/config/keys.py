"""Every configuration key: its type, default, rule, meaning, and what else is true of it. Whatever the project knows of a key
stands in this table. Imports neither torch nor anything slow, so that `--help` answers at once."""
from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal, NamedTuple

from alpha_maml.data import DATASETS, LOSSES
from alpha_maml.errors import PASSWORD
from alpha_maml.models import MODELS
from alpha_maml.registry import Registry
from alpha_maml.trainer.core.rules import RULES
from alpha_maml.trainer.engines import ENGINES
from alpha_maml.trainer.optim import OPTIMIZERS

# Facts of a key.
CIRCUMSTANCE = "circumstance"  # may change between the parts of one run: where and how it runs, not what it computes
EVALUATION = "evaluation"  # an evaluation may differ in it from the training, though it decides theta
NUMBER = "number"  # runs that differ in it can be one program
UNNAMED = "unnamed"  # may differ from run to run without being what a figure compares
LATER = "later"  # younger than the names of derived folders, which leave its default out

Rule = tuple[Callable[[Any], bool], str]
POSITIVE: Rule = (lambda v: v > 0, "must be greater than 0")
NOT_NEGATIVE: Rule = (lambda v: v >= 0, "must be 0 or more")
AT_LEAST_ONE: Rule = (lambda v: 1 <= v <= 10**9, "must be 1 or more, and 10^9 at most")
WEIGHT_DECAY: Rule = (lambda v: 0 <= v <= 10**9, "must be 0 or more, and 10^9 at most")
SEED: Rule = (lambda v: 0 <= v < 2**63, "must be in [0, 2^63)")
SECONDS: Rule = (lambda v: 0 < v <= 10**7, "must be greater than 0, and 10^7 at most")
NOT_EMPTY: Rule = (lambda v: v != "" and v.isprintable(), "must be printable text, not empty")

NO_PASSWORD: Rule = (
    lambda v: NOT_EMPTY[0](v) and not PASSWORD.search(v),
    "must be printable text without a password, which would stay in the run's files (set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD; for a database what its driver reads, as PGPASSWORD)")


def key(default: Any, meaning: str, rule: Rule | None = None, *facts: str, owner: str | None = None,
        registry: Registry | None = None) -> Any:
    """A field of a section. `owner` is the rule for the rates to which it belongs, `registry` what its values are names in."""
    metadata = {"meaning": meaning, "rule": rule, "facts": frozenset(facts), "owner": owner, "registry": registry}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type, *facts: str) -> Any:
    """A section of keys that share facts."""
    return field(default_factory=kind, metadata={"facts": frozenset(facts)})


@dataclass(frozen=True)
class DataSettings:
    name: str = key("sinusoid", "the tasks; folder is images of yours", NOT_EMPTY, registry=DATASETS)
    root: str | None = key(None, "folder of the data set's files; null downloads Omniglot's once", NOT_EMPTY, CIRCUMSTANCE)
    size: int = key(84, "folder: side in pixels that images are resized to", AT_LEAST_ONE)
    colour: bool = key(True, "folder: three channels, or one of grey")
    resident: bool | None = key(
        None, "folder: images on the device; null is on a GPU where they fit half of what is free", None, CIRCUMSTANCE)
    args: dict = key({}, "keyword arguments of your own data set's class")


@dataclass(frozen=True)
class ModelSettings:
    name: str = key("mlp", "the network; also torchvision:NAME, timm:NAME, hf:CLASS or hf:FOLDER", NOT_EMPTY, registry=MODELS)
    init: str | None = key(None, "what it starts from instead of its seed: a .safetensors file, the folder of a run (alpha "
                           "comes along), or one of Hugging Face's; what does not match is named", NOT_EMPTY, LATER)
    init_names: str | None = key(None, "patterns of the tensors' names that start from it; null is all", NOT_EMPTY, LATER)
    learns: str | None = key(None, "patterns of the parameters' names that are learned, as in head.*,*.lora_*; the others are "
                             "frozen. null is what requires a gradient", NOT_EMPTY, LATER)
    channels: int | None = key(None, "width; null takes the model's own", AT_LEAST_ONE)
    args: dict = key({}, "further keyword arguments of the model's class")
    randomness: Literal["error", "different", "same"] = key(
        "error", "random numbers, such as dropout's, that the model draws in training: error refuses them, different draws for "
        "each task, same draws once for all tasks")


@dataclass(frozen=True)
class TaskSettings:
    ways: int = key(1, "classes per task (1 for regression)", AT_LEAST_ONE, EVALUATION)
    shots: int = key(10, "support examples per class", AT_LEAST_ONE, EVALUATION)
    queries: int = key(10, "query examples per class", AT_LEAST_ONE, EVALUATION)
    min_ways: int | None = key(None, "each training iteration draws its ways from here to task.ways; null is task.ways",
                               AT_LEAST_ONE)
    min_shots: int | None = key(None, "the same of its shots; null is task.shots", AT_LEAST_ONE)
    batch: int = key(25, "tasks per iteration, over all ranks", AT_LEAST_ONE)
    reduction: Literal["mean", "sum"] = key("mean", "over tasks; a sum's beta is 1/batch of a mean's, see docs/rates.md")
    loss: str | None = key(None, "of a task; null is the data set's own", NOT_EMPTY, LATER, registry=LOSSES)
    inner_loss: str | None = key(None, "of a task's support set, where it is another", NOT_EMPTY, LATER, registry=LOSSES)
    chunk: int = key(0, "tasks differentiated at once on a rank, to bound memory; 0 is automatic", NOT_NEGATIVE, CIRCUMSTANCE)


@dataclass(frozen=True)
class InnerSettings:
    steps: int = key(1, "K, gradient steps on the support set", AT_LEAST_ONE, EVALUATION)
    order: Literal["second", "first", "reptile"] = key(
        "second", "of the meta-gradient: second is exact, first drops the Hessian, reptile takes the displacement itself")
    adapts: str = key("all", "what moves within a task: all, head (ANIL), body (BOIL), or patterns of tensors' names, as in "
                      "blocks.3.*,head.*", NOT_EMPTY)
    per_step: str | None = key(
        None, "patterns of tensors' names of which each inner step has its own, learned and not adapted, such as *norm*: "
        "MAML++'s gains and shifts", NOT_EMPTY)
    clip: float = key(0.0, "largest norm of a task's inner gradient; 0 is none", NOT_NEGATIVE)
    weight_decay: float = key(0.0, "of the inner loop: weight_decay / 2 |phi|^2 beside the support loss", WEIGHT_DECAY)
    multi_step_iterations: int = key(
        0, "MAML++'s multi-step loss: iterations over which the losses after the earlier inner steps fade out", NOT_NEGATIVE)
    first_order_iterations: int = key(
        0, "MAML++'s derivative-order annealing: iterations at the start that are of first order", NOT_NEGATIVE)
    recompute: bool | None = key(
        None, "compute inner steps anew in the backward sweep instead of keeping their graphs: memory that hardly grows with "
        "steps, for more time; null is above 8 steps, unless model.randomness")


@dataclass(frozen=True)
class OuterSettings:
    optimizer: str | None = key(
        None, "theta's step; null is muon under rule adaptive, else the paper's sgd", NOT_EMPTY, registry=OPTIMIZERS)
    trust: float | None = key(
        None, "largest relative step of a tensor, falling as 1/sqrt(1 + t/20). Under rule adaptive beta is that step: there 0 "
        "takes the optimiser's own instead, of size beta. null is no bound", NOT_NEGATIVE)
    clip: float = key(0.0, "largest norm of the meta-gradient; 0 is none", NOT_NEGATIVE, LATER)
    weight_decay: float = key(
        0.0, "adds weight_decay theta to the meta-gradient; adamw and muon to their direction", WEIGHT_DECAY)
    average: bool | None = key(
        None, "schedule-free: theta lies halfway between a point that takes the steps and that point's average over about the "
        "last fifth of all iterations, which is evaluated; null is true under rule adaptive")


@dataclass(frozen=True)
class RatesSettings:
    rule: str = key("adaptive", "how alpha and beta move", NOT_EMPTY, UNNAMED, registry=RULES)
    alpha_shape: Literal["scalar", "layer", "layer_step", "parameter"] | None = key(
        None, "what has an inner rate of its own: everything one, each tensor, each tensor and step, each number; null is "
        "layer_step under rule adaptive, else scalar")
    alpha: float = key(0.01, "first inner rate; adaptive scales it in the first iteration", POSITIVE, NUMBER)
    beta: float = key(0.001, "first meta rate; adaptive starts from a relative step of its own, unless outer.trust is 0",
                      POSITIVE, NUMBER)
    alpha_hyperlr: float = key(1e-3, "rate of alpha, per hypergradient in task.reduction", NOT_NEGATIVE, NUMBER, owner="paper")
    beta_hyperlr: float = key(1e-3, "rate of beta, per product in task.reduction", NOT_NEGATIVE, NUMBER, owner="paper")
    kappa: float = key(0.5, "largest step of log alpha per iteration; log beta's is a tenth at first", POSITIVE, NUMBER,
                       owner="adaptive")
    tolerance: float = key(0.0, "opposition of successive meta-gradients, as a cosine, that beta endures", NOT_NEGATIVE, NUMBER,
                           owner="adaptive")
    minimum: float = key(1e-6, "lower bound of both rates", POSITIVE, owner="adaptive")
    maximum: float = key(1000.0, "upper bound of both rates", POSITIVE, owner="adaptive")


@dataclass(frozen=True)
class EngineSettings:
    name: str = key("torch", "what holds theta: every rank, or ranks in shards", NOT_EMPTY, registry=ENGINES)
    zero_stage: int = key(1, "deepspeed: what is sharded, more from 0 to 3", (lambda v: 0 <= v <= 3, "must be 0, 1, 2 or 3"))
    timeout: float = key(120.0, "seconds after which a rank that does not answer ends the run", SECONDS)


@dataclass(frozen=True)
class EvaluationSettings:
    every: int = key(0, "iterations between evaluations on the validation split; 0 is only at the end", NOT_NEGATIVE)
    tasks: int = key(200, "tasks per evaluation", AT_LEAST_ONE)


@dataclass(frozen=True)
class CheckpointSettings:
    every: int = key(500, "iterations between checkpoints; 0 is only at the end", NOT_NEGATIVE)
    keep: int = key(3, "newest checkpoints kept", AT_LEAST_ONE)


@dataclass(frozen=True)
class TrackingSettings:
    uri: str | None = key(None, "MLflow store; null is mlflow.db beside the run's folder; disabled is none", NO_PASSWORD)
    experiment: str = key("alpha-maml", "MLflow experiment", NOT_EMPTY)
    sweep: str | None = key(None, "tag that the runs of one sweep share", NOT_EMPTY)
    timeout: float = key(30.0, "longest wait in seconds for the store at the end of a run", NOT_NEGATIVE)


@dataclass(frozen=True)
class Config:
    data: DataSettings = section(DataSettings, EVALUATION)
    model: ModelSettings = section(ModelSettings)
    task: TaskSettings = section(TaskSettings)
    inner: InnerSettings = section(InnerSettings)
    outer: OuterSettings = section(OuterSettings)
    rates: RatesSettings = section(RatesSettings)
    engine: EngineSettings = section(EngineSettings, CIRCUMSTANCE)
    evaluation: EvaluationSettings = section(EvaluationSettings, CIRCUMSTANCE, UNNAMED)
    checkpoint: CheckpointSettings = section(CheckpointSettings, CIRCUMSTANCE, UNNAMED)
    tracking: TrackingSettings = section(TrackingSettings, CIRCUMSTANCE, UNNAMED)
    iterations: int = key(1000, "meta-iterations in all", AT_LEAST_ONE, CIRCUMSTANCE, UNNAMED)
    seed: int = key(0, "of the tasks and of theta's initialisation", SEED, EVALUATION)
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto takes a GPU where there is one", None, CIRCUMSTANCE)
    precision: Literal["float32", "tf32", "float64"] = key(
        "float32", "of theta and of every product on the way to it; tf32 is float32 whose products a GPU rounds to 10 bits: "
        "faster, gradients 1 or 2 % off", None, EVALUATION)
    compile: bool | None = key(
        None, "true: on a CPU conv4's blocks as native code, of all else the meta-gradient as one graph of torch.compile; a "
        "minute at the first start, kept for later ones. null: native code where there is a C++ compiler, no graph",
        None, CIRCUMSTANCE)
    capture: bool | None = key(
        None, "on a GPU the whole iteration as one CUDA graph; null is wherever that can be", None, CIRCUMSTANCE)
    on_nonfinite: Literal["skip", "halve", "stop"] = key(
        "skip", "an iteration whose loss, gradient or step is not finite never moves theta; skip: rule adaptive halves alpha; "
        "halve: alpha and beta are halved under every rule; stop: the run ends")
    loss_threshold: float = key(
        2.5, "iterations_to_threshold counts until the training loss is under this", POSITIVE, CIRCUMSTANCE)
    run_dir: str | None = key(
        None, "folder of the run; null derives it from the configuration", NOT_EMPTY, CIRCUMSTANCE, UNNAMED)


class Key(NamedTuple):
    """What is known of one key."""

    default: Any
    kind: Any  # its type
    meaning: str
    rule: Rule | None
    facts: frozenset[str]
    owner: str | None
    registry: Registry | None


@functools.cache  # resolving the types takes milliseconds, and every key that is read asks
def table(of: type = Config, prefix: str = "", shared: frozenset[str] = frozenset()) -> dict[str, Key]:
    """Dotted key -> what is known of it, in order of definition."""
    hints, found = typing.get_type_hints(of), {}
    for item in fields(of):
        facts = shared | item.metadata["facts"]
        if is_dataclass(hints[item.name]):
            found |= table(hints[item.name], f"{prefix}{item.name}.", facts)
            continue
        default = item.default if item.default is not MISSING else item.default_factory()  # pyright: ignore
        about = item.metadata
        found[prefix + item.name] = Key(default, hints[item.name], about["meaning"], about["rule"], facts, about["owner"],
                                        about["registry"])
    return found


def names(fact: str) -> list[str]:
    """The keys of which the fact is true."""
    return [name for name, key in table().items() if fact in key.facts]


def storage(precision: str) -> str:
    """The type of theta's numbers."""
    return "float32" if precision == "tf32" else precision


UNION = (types.UnionType, typing.Union)  # the origins of `int | None` and of `Literal[...] | None`


def values_of(key: Key) -> str:
    """What may be given for a key, as a user would say it."""
    if key.registry:
        return f"{', '.join(key.registry.places)} or package.module:{key.registry.kind}"
    return spelled(key.kind)


def spelled(kind: Any) -> str:
    """A type as a user would say it."""
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if typing.get_origin(kind) in UNION:
        return " or ".join(spelled(k) for k in typing.get_args(kind))
    return {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", dict: "a mapping",
            types.NoneType: "null"}[kind]
