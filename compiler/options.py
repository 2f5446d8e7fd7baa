"""The options of `geminifx.compile`, as one frozen dataclass with the checks of each field."""

import inspect
import math
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from ..passes.program.manager import Pass
from ..passes.program.plan import Plan
from ..passes.program.request import Kernels, Outputs, Policy
from ..runtime.isa.errors import ArgumentError, check_path, did_you_mean, wrong_argument
from ..runtime.isa.precision import ReduceDtype
from ..runtime.isa.quantized import Quantized
from ..runtime.isa.schedule import Schedule
from ..runtime.isa.units import parse_bytes
from ..runtime.optimizer.hyper_checks import is_number
from .parallel import Parallel, cannot_run
from .rates.choice import given_rates
from .rates.clusters import Cluster, given_cluster
from .rates.rates import Rates

F = TypeVar("F", bound=Callable[..., Any])
Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

WARMUP_STEPS = 2

LossFn = Callable[..., Any]
LOSS = "a function of the model's output and of further arguments by name, such as lambda output, labels: ..."


@dataclass(frozen=True)
class Options:
    """Options of `geminifx.compile`.

    Fields:
        device_budget: device memory the whole process may use, as bytes or text ("24GB", "24GiB", "80%").
        host_budget: memory of one host that training may use, shared by the processes on it; default 90% of what is
            free.
        world_size: number of processes to train on; by default those that torchrun launched.
        example_inputs: keyword arguments (a dict) or positional ones (a tuple) to capture the model with.
        placement: "cuda" keeps the training state on the device, "cpu" on the host, "auto" fills the budget.
        parallel: how the processes share the work, see `Parallel`: {"data": 2, "tensor": {"mode": "2d", "size": 4}}.
            "auto" lets the planner choose, for a training step on a batch like `example_inputs` per process; this is
            the default if `world_size` or `cluster` is given. Otherwise training is data parallel.
        cluster: the machines to train on, for the planner to choose by: a name such as "4x8-infiniband", the path of a
            TOML file, or a dict of nodes, devices, card, and the links within and between nodes. By default one node
            with as many of this machine's devices as there are processes.
        precision: "bf16" casts parameters for computing and keeps float32 masters; default bf16 on CUDA, otherwise the
            model's own. "fp16" needs a loss scale: `model.optimizer(...)` has a dynamic one.
        reduce_dtype: the dtype in which gradients are summed over processes: "fp32" rounds their mean to the compute
            dtype once; "compute" sums in the compute dtype, which moves half the bytes with an error that grows with
            the number of processes.
        microbatches: number of parts that a training step's batch is split into; each block of the model runs for all
            parts before the next block does. "auto" splits the batch only if it does not fit whole. In a pipeline the
            parts go through its stages, by default two for each rank.
        rounds: number of rounds that the microbatches run in, equally many in each; the forward and backward of a round
            finish before the next round begins. "auto" takes more than one if that makes the step faster or lets it
            fit. All backwards but the last run before `loss.backward()`, whose incoming gradient then scales their
            results.
        schedule: the order in which a pipeline's ranks run forwards and backwards: "gpipe", "1f1b", "interleaved",
            "zb1p", "zbv", "roundrobin", whose stages have no rank of their own, or a `Schedule`. Default 1f1b, or
            interleaved if ranks have several stages each.
        recompute: "auto", "none", "all", or names of the blocks to recompute in the backward.
        offload: "auto", "none", "all", or names of the blocks whose activations are kept on the host until the
            backward: for a recomputed block its input, for any other everything that its backward reads. "auto"
            offloads if that makes the step faster or lets it fit.
        fuse_loss: whether to compute a loss over a vocabulary in pieces, so that its logits never exist and reading
            them raises; "auto" does so if that makes the step faster or lets it fit; in a round-robin, if the logits
            are more than a tenth of the budget.
        kernels: "exact" runs torch's kernels, one for each operator, with the bits of plain PyTorch; "fused" lets
            Inductor compile what lies between matrix products into one kernel, which is faster on a GPU and rounds
            differently.
        loss_fn: computes the loss if the model does not: a function, or a module without parameters, that takes the
            model's output and further arguments by name. The compiled model takes those arguments beside its own, and
            then returns the loss: `model(x, labels=y)`. It is captured like the model, and again when an attribute that
            it read, of its modules or of objects it is made of, has changed.
        outputs: "loss" makes only the loss differentiable if the model returns one, "all" every output. Sharded outputs
            other than the loss, such as logits, are gathered only with "all".
        plan: a Plan to use instead of planning, or the path of one saved as JSON, which is read here.
        rates: the speed of the machine to plan for: the name of a card, such as "rtx4090", the path of a file that
            `geminifx calibrate` wrote, or `Rates`. By default those measured on this machine. Changes no results.
        warmup: how many of the first steps to measure before deciding the plan again; True means 2. Only for
            placement="auto" without `plan=`.
        frozen: how frozen weights of linear layers are kept: "nf4", 4 bits each and a scale for 64, or "int8", with a
            scale for each row; by default as they are. They are dequantised on the device where they are read; the
            model computes with the rounded values, and itself holds codes and scales from then on.
        passes: further passes, each run after the pass that its `after` names.
        optimizer_state_bytes: bytes of optimizer state per parameter to plan for (AdamW: 8).
        device: "cuda" or "cpu"; default cuda if there is one. On "cpu" the budget bounds an arena in RAM.
        timeout_s: seconds a process waits for the others before it takes them for dead, if compile() itself starts
            torch.distributed.
        dump: a directory for the program after every pass.
        config: a TOML file with any of these options; arguments take precedence, but for those that are None.
    """

    device_budget: int | str | None = None
    host_budget: int | str | None = None
    world_size: int | None = None
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None
    placement: Policy = "auto"
    parallel: Mapping[str, Any] | Literal["auto"] | None = None
    cluster: Cluster | None = None
    precision: Precision | None = None
    reduce_dtype: ReduceDtype = "fp32"
    microbatches: int | Literal["auto"] = "auto"
    rounds: int | Literal["auto"] = "auto"
    schedule: str | Schedule | None = None
    recompute: str | tuple[str, ...] = "auto"
    offload: str | tuple[str, ...] = "auto"
    fuse_loss: bool | Literal["auto"] = "auto"
    kernels: Kernels = "exact"
    loss_fn: LossFn | None = None
    outputs: Outputs = "loss"
    plan: Plan | None = None
    rates: Rates | None = None
    warmup: int = False
    frozen: Quantized | None = None
    passes: tuple[Pass, ...] = ()
    optimizer_state_bytes: int = 8
    device: str | None = None
    timeout_s: float = 300.0
    dump: str | Path | None = None
    config: str | Path | None = None

    @classmethod
    def shown_by(cls, function: F) -> F:
        """Gives `function` a signature with every option in place of `**options`, for help() and editors."""
        own = inspect.signature(function)
        *named, _ = own.parameters.values()
        kind = inspect.Parameter.KEYWORD_ONLY
        options = [
            inspect.Parameter(field.name, kind, default=field.default, annotation=field.type)
            for field in fields(cls)
            if field.name not in own.parameters
        ]
        function.__signature__ = own.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
        return function

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Options":
        """Options from arguments and the config file. Raises ArgumentError for an unknown one, naming the nearest, and
        for values that make no sense."""
        values = {**_read_config(given.get("config")), **{k: v for k, v in given.items() if v is not None}}
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                hint = did_you_mean(name, names, f"the options are {', '.join(names)}")
                raise ArgumentError(f"geminifx.compile has no option {name!r}; {hint}")
        values["passes"] = _passes(values.get("passes", ()))
        if isinstance(values.get("plan"), str | PathLike):
            values["plan"] = Plan.load(values["plan"])
        values["cluster"] = given_cluster(values.get("cluster"))
        values["rates"] = given_rates(values.get("rates")) or (values["cluster"] and values["cluster"].rates)
        for name in ("recompute", "offload", "example_inputs"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        options = cls(**values)
        options._check_kinds()
        options._check_values()
        options._check_parallel()
        options._check_machine()
        return options

    def _check_kinds(self) -> None:
        for name in ("device_budget", "host_budget"):
            _check_budget(name, getattr(self, name))
        for name, (is_kind, expected) in _KINDS.items():
            if not is_kind(getattr(self, name)):
                raise wrong_argument(name, getattr(self, name), expected)
        if self.dump is not None:
            check_path("dump", self.dump, "a directory for programs")
        if self.loss_fn is not None:
            loss_targets(self.loss_fn)

    def _check_values(self) -> None:
        _one_of("placement", self.placement, get_args(Policy))
        _one_of("outputs", self.outputs, get_args(Outputs))
        _one_of("kernels", self.kernels, get_args(Kernels))
        _one_of("precision", self.precision, (None, *DTYPES))
        _one_of("reduce_dtype", self.reduce_dtype, get_args(ReduceDtype))
        _one_of("frozen", self.frozen, (None, *get_args(Quantized)))
        _one_of("device", self.device, (None, "cpu", "cuda"))
        for name in ("recompute", "offload"):
            if isinstance(getattr(self, name), str):
                _one_of(name, getattr(self, name), ("auto", "none", "all"))
        if self.fuse_loss is True and self.outputs == "all":
            raise ArgumentError(
                "fuse_loss=True does not compute the logits that outputs='all' would return; leave one of them out"
            )

    def _check_parallel(self) -> None:
        if self.schedule is not None and not self.degrees.is_staged:
            raise ArgumentError(
                f"schedule={str(self.schedule)!r} is for a pipeline, but parallel= has none; add one, such as "
                "{'pipeline': 4}"
            )
        self._check_rounds()
        asked = 1 if self.microbatches == "auto" else self.microbatches
        why_not = cannot_run(self.degrees, asked, self.schedule if self.plan is None else self.plan.schedule)
        if why_not:
            raise ArgumentError(why_not)
        if self.frozen is not None and self.degrees.mode is not None:
            raise ArgumentError(
                f"frozen={self.frozen!r} does not support sharded tensors yet; leave it out, or leave tensor= out of "
                "parallel="
            )
        if self.fuse_loss is True and self.degrees.mode is not None:
            raise ArgumentError("fuse_loss=True does not support sharded tensors; leave it out")
        if self.cluster is not None and self.world_size not in (None, self.cluster.size):
            raise ArgumentError(
                f"world_size={self.world_size}, but the cluster has {self.cluster.nodes} x {self.cluster.devices} "
                "devices; expected one process per device: leave world_size out, or describe another cluster"
            )
        if self.world is not None:
            self.degrees.mesh(self.world, 1)

    def _check_rounds(self) -> None:
        if self.rounds == "auto" or self.rounds == 1:
            return
        if self.degrees.is_staged:
            raise ArgumentError(
                f"rounds={self.rounds} is not for pipelines, which have a schedule instead; leave rounds out"
            )
        if self.plan is not None and self.plan.rounds != self.rounds:
            raise ArgumentError(f"rounds={self.rounds}, but plan= has {self.plan.rounds}; leave one of them out")
        if self.plan is None and (self.microbatches == "auto" or self.microbatches % self.rounds):
            raise ArgumentError(
                f"rounds={self.rounds} need the same number of microbatches each, but "
                f"microbatches={self.microbatches!r}; expected a multiple of {self.rounds}"
            )

    def _check_machine(self) -> None:
        """Checks that the device exists and `dump` can be written to. Runs last, as it creates the directory."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ArgumentError("device='cuda', but torch sees no CUDA device; leave it out to run in the arena in RAM")
        if self.dump is not None:
            try:
                Path(self.dump).mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.dump).close()
            except OSError as error:
                raise ArgumentError(f"dump={str(self.dump)!r} cannot be written to: {error}") from error

    @property
    def warmup_steps(self) -> int:
        """How many steps are measured; `warmup` as a number."""
        return WARMUP_STEPS if self.warmup is True else int(self.warmup)

    @property
    def degrees(self) -> Parallel:
        """`parallel` as degrees; the default ones if it is None or "auto"."""
        return Parallel.of(self.parallel if isinstance(self.parallel, Mapping) else None)

    @property
    def world(self) -> int | None:
        """How many processes are asked for; None: as many as were launched."""
        return self.world_size or (None if self.cluster is None else self.cluster.size)

    @property
    def of_ranks(self) -> tuple[ReduceDtype, float, int | None]:
        """Arguments of `Ranks.of`: the dtype that gradients are summed in, the timeout in seconds, and how many
        processes run on one host when planning for more than were launched (None: all of them)."""
        return self.reduce_dtype, self.timeout_s, None if self.cluster is None else self.cluster.devices

    @property
    def leaves_the_world_open(self) -> bool:
        """Whether the planner is to choose how the processes share the work."""
        asked = self.parallel == "auto" or (self.parallel is None and self.world is not None)
        return asked and self.plan is None


def _is_count(value: Any, least: int) -> bool:
    """Whether the value is an int, which True and False are not meant to be."""
    return type(value) is int and value >= least


_BLOCKS = "'auto', 'none', 'all' or names of blocks"
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "example_inputs": (
        lambda value: isinstance(value, Mapping | tuple | None),
        "the model's arguments: a dict of keyword ones, or a tuple of positional ones, such as example_inputs=(x,)",
    ),
    "microbatches": (
        lambda value: value == "auto" or _is_count(value, 1), "'auto', or a number of parts of a batch, 1 or more",
    ),
    "rounds": (
        lambda value: value == "auto" or _is_count(value, 1),
        "'auto', or a number of rounds of microbatches, 1 or more",
    ),
    "warmup": (
        lambda value: isinstance(value, bool) or _is_count(value, 0), "True, False, or a number of steps to measure",
    ),
    "recompute": (lambda value: isinstance(value, str | tuple), _BLOCKS),
    "offload": (lambda value: isinstance(value, str | tuple), _BLOCKS),
    "plan": (
        lambda value: isinstance(value, Plan | None), "a geminifx.Plan, or the path of one written by plan.save",
    ),
    "optimizer_state_bytes": (
        lambda value: _is_count(value, 0),
        "a whole number of bytes per parameter, 0 or more (AdamW: 8, SGD with momentum: 4)",
    ),
    "parallel": (
        lambda value: value == "auto" or isinstance(value, Mapping | None),
        "'auto', or degrees by name, such as parallel={'data': 1}",
    ),
    "world_size": (lambda value: value is None or _is_count(value, 1), "a number of processes, 1 or more"),
    "timeout_s": (
        lambda value: is_number(value) and 0 < value < math.inf, "a positive number of seconds",
    ),
    "fuse_loss": (lambda value: value == "auto" or isinstance(value, bool), "'auto', True or False"),
    "schedule": (
        lambda value: isinstance(value, str | Schedule | None),
        "the name of a schedule, such as '1f1b', or a Schedule",
    ),
}  # fmt: skip
"""Options that are not one of a few fixed values: a check for each, and what its error message says is expected."""

_ALIASES = {"gpu": "cuda", "host": "cpu", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""Other names that people use for our values, which are spelled too differently for `did_you_mean`."""


def _one_of(name: str, value: Any, valid: tuple[Any, ...]) -> None:
    if (value is None or isinstance(value, str)) and value in valid:
        return
    meant = _ALIASES.get(value, "") if isinstance(value, str) else ""
    hint = f"did you mean {meant!r}?" if meant in valid else did_you_mean(value, filter(None, valid))
    raise wrong_argument(name, value, f"one of {', '.join(map(repr, valid))}", hint)


def loss_targets(loss_fn: LossFn) -> list[inspect.Parameter]:
    """The parameters that a loss function takes after the model's output. Raises ArgumentError if it is no such
    function."""
    if not callable(loss_fn):
        raise wrong_argument("loss_fn", loss_fn, LOSS)
    if isinstance(loss_fn, nn.Module) and next(loss_fn.parameters(), None) is not None:
        raise ArgumentError("loss_fn has parameters, which would not be trained; make it a part of the model")
    try:
        signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except ValueError:
        raise wrong_argument("loss_fn", loss_fn, LOSS) from None
    _, *behind = signature.parameters.values() or (None,)
    if not behind or any(p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in behind):
        raise ArgumentError(f"loss_fn takes {signature}; expected {LOSS}")
    return behind


def _check_budget(name: str, budget: Any) -> None:
    """Raises ArgumentError if the budget cannot be parsed. A percentage is resolved later, by the device."""
    if budget is not None:
        try:
            parse_bytes(budget, of=10**12)
        except ValueError as error:
            raise ArgumentError(f"{name}: {error}") from None


def _passes(given: Any) -> tuple[Pass, ...]:
    passes = (given,) if isinstance(given, Pass) else given
    if not isinstance(passes, tuple | list) or not all(isinstance(each, Pass) for each in passes):
        raise wrong_argument("passes", given, "functions decorated with @geminifx.graph_pass(after='chunk')")
    return tuple(passes)


def _read_config(path: Any) -> dict[str, Any]:
    if path is None:
        return {}
    check_path("config", path, "the path of a TOML file")
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArgumentError(f"config={str(path)!r}: there is no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ArgumentError(f"config={str(path)!r} is not TOML: {error}") from error
    except OSError as error:
        raise ArgumentError(f"config={str(path)!r} cannot be read: {error}") from error
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
