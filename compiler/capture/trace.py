"""Capture: a model and example inputs become one Program of a whole training step.

torch's ahead-of-time autograd traces the module's forward and backward into one ATen graph, on fake tensors: nothing is
allocated and no weight is read, so a model on `meta` is captured like any other. The model itself is not touched: what
is traced is a copy whose tensors are fake.
"""

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...models.adapters import capturable
from ...passes.program.manager import Record
from ...passes.program.program import Program, note, type_of
from ...passes.program.request import Outputs
from ...passes.program.types import TensorType
from ...runtime.isa import torch_private as private
from ...runtime.isa.errors import CaptureError, SplitError
from ...runtime.isa.fakes import FaithfulFakeMode
from ...runtime.isa.precision import parameter_dtypes
from ...runtime.isa.threads import CAPTURING
from .assignments import followed_assignments, shared_buffers
from .faithful_tracing import FaithfulTracing
from .fake_model import fake, fake_copy
from .guards import Guard, recorded
from .held_elsewhere import HeldElsewhere
from .known import PLAIN
from .numbers import check_only_computed, no_types_asked, number_type, standing_for, taken_out
from .refusals import tell_of_hooks
from .results import gradient_sources
from .shared_memory import check_written
from .to_program import to_program

_ROOMS = ("compiler", "models", "passes", "runtime")


@dataclass(frozen=True)
class Captured:
    """A captured step and how its flat inputs and outputs map to the model's.

    Fields:
        program: the step, with its backward if it trains.
        result_spec, result_leaves: rebuild what the model returned. A leaf that is an int is the position of a program
            output; any other leaf is a constant.
        differentiable: positions of the outputs that take a gradient.
        detached: positions of the outputs that would take one if the loss were not the only output to do so.
        notes: notes in words on what stays eager.
        sources: maps the role of each parameter's or input's gradient to the positions of the outputs it comes from.
        guards: what the trace read from the model's modules; the step is valid only while all of them hold.
        records: the passes that made this process's part of the step, where tensors are sharded.
        examples: how many examples a call brings.
        divide: makes the step that runs them as a number of microbatches; None where that is impossible.
    """

    program: Program
    result_spec: pytree.TreeSpec
    result_leaves: tuple[Any, ...]
    differentiable: tuple[int, ...]
    detached: frozenset[int]
    notes: tuple[str, ...]
    sources: Mapping[str, frozenset[int]]
    guards: tuple[Guard, ...]
    records: tuple[Record, ...] = ()
    examples: int = 0
    divide: "Divide | None" = None

    def by(self, microbatches: int) -> "Captured":
        """The step that runs its batch as `microbatches` microbatches. Raises SplitError if it cannot be divided."""
        if microbatches == 1:
            return self
        if self.divide is None:
            raise SplitError("tensors are sharded over processes, and parallel= already divides the batch among them")
        return self.divide(microbatches)

    @property
    def trains(self) -> bool:
        """Whether the step has a backward."""
        return self.program.name == "training"


class Divide(Protocol):
    """Makes and caches a step's divisions into microbatches; also captures the step anew for another batch size."""

    def __call__(self, count: int) -> Captured: ...

    def resized(self, size: int) -> Captured: ...

    def keep_only(self, count: int) -> None: ...


@dataclass(frozen=True)
class CaptureRequest:
    """What to capture.

    Fields:
        dtype: the dtype to compute in; None keeps the model's.
        outputs: which outputs take a gradient.
        backward: whether to capture a backward.
        dtypes: the compute dtype of each parameter, if already decided; by default it follows from `dtype`.
        shapes: full shapes of parameters, for processes that may hold only shards by now.
        entry: the submodule that is called; "" is the model itself.
        numbers: positions of the (flattened) arguments that are numbers and become inputs of the program.
        loss_fn: a function outside of the model's modules that its forward calls.
    """

    dtype: torch.dtype | None = None
    outputs: Outputs = "loss"
    backward: bool = True
    dtypes: Mapping[str, torch.dtype] | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None
    entry: str = ""
    numbers: frozenset[int] = frozenset()
    loss_fn: Callable[..., Any] | None = None


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], request: CaptureRequest) -> Captured:
    """Capture `model(*args, **kwargs)`, in the training mode that the model is in.

    Only the shapes, strides and dtypes of tensor inputs matter; everything else is baked into the program, except for
    the numbers that `request` names. Raises CaptureError if the model's Python depends on the values of tensors, naming
    the source line. If it depends on the values of those numbers, some error is raised.
    """
    tell_of_hooks(model)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    named = _named_arguments(model.get_submodule(request.entry), args, kwargs)
    numbers = {i: number_type(leaves[i]) for i in request.numbers}
    mode = FaithfulFakeMode(allow_non_fake_inputs=True, shape_env=private.ShapeEnv() if numbers else None)
    tensors = {i: standing_for(leaf) if i in numbers else leaf for i, leaf in enumerate(leaves)}
    fakes = {i: fake(mode, leaf, None if i in numbers else request.dtype) for i, leaf in tensors.items()
             if isinstance(leaf, Tensor)}  # fmt: skip
    dtypes = request.dtypes or parameter_dtypes(model, request.dtype)
    fake_model, originals = fake_copy(model, mode, dtypes, request.shapes or {})
    step = _Step(fake_model, leaves, spec, tuple(fakes), request)
    private.annotate_modules(step)
    with ExitStack() as stack:
        stack.enter_context(CAPTURING)
        notes = stack.enter_context(capturable(step.model, named))
        stack.enter_context(private.plain_dispatch())
        stack.enter_context(nullcontext() if request.backward else torch.no_grad())
        asked = no_types_asked(model) if numbers else nullcontext()
        with recorded(step.model, model, request.loss_fn) as guards, asked:
            graph_module = _trace(stack, step, tuple(fakes.values()))
        if mode.shape_env is not None:
            check_only_computed(graph_module.graph, mode.shape_env)
        names = {id(value): name for name, value in named.items()}
        names_by_leaf = [names.get(id(leaves[i]), f"input_{i}") for i in fakes]
        program = to_program(graph_module, model, names_by_leaf, list(fakes), originals, numbers)
    if request.backward and not step.differentiable:  # nothing takes a gradient: capture an evaluation
        return capture(model, args, kwargs, replace(request, backward=False))
    program.name = "training" if request.backward else "evaluation"
    program.sources = {name: _forward_line(module) for name, module in model.named_modules()}
    _check_dtypes(program)
    check_written(model, program)
    assert step.result_spec is not None
    return Captured(program, step.result_spec, step.result_leaves, step.differentiable, step.detached, tuple(notes),
                    gradient_sources(program), tuple(guards))  # fmt: skip


class _Step(nn.Module):
    """The model as a function of flat tensors to flat tensors."""

    def __init__(self, model: nn.Module, leaves: list[Any], spec: pytree.TreeSpec, tensors: tuple[int, ...],
                 request: CaptureRequest) -> None:  # fmt: skip
        super().__init__()
        self.is_assigned = "forward" in vars(model.get_submodule(request.entry))  # on the instance, over its class's
        self.model = model
        self.leaves, self.spec, self.tensors, self.request = leaves, spec, tensors, request
        self.result_spec: pytree.TreeSpec | None = None
        self.result_leaves: tuple[Any, ...] = ()
        self.differentiable: tuple[int, ...] = ()
        self.detached: frozenset[int] = frozenset()
        self.replaced: set[str] = set()  # buffers
        self.shared, self.held_elsewhere = shared_buffers(model), HeldElsewhere(model)

    def named_buffers(self, prefix: str = "", recurse: bool = True,
                      remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
        """Yields each buffer once, by its first name: torch miscounts outputs if one with two names is written to."""
        return super().named_buffers(prefix, recurse)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.leaves)
        for position, tensor in zip(self.tensors, inputs, strict=True):
            leaves[position] = taken_out(tensor) if position in self.request.numbers else tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        for buffers, name, first, first_name in self.shared:
            buffers[name] = first[first_name]
        with ExitStack() as stack:
            stack.enter_context(followed_assignments(self.model, self.replaced))
            stack.enter_context(FaithfulTracing())
            stack.enter_context(self.held_elsewhere.standing_in(self.replaced))
            result = self.model.get_submodule(self.request.entry)(*args, **kwargs)
        loss = result.get("loss") if isinstance(result, dict) else None
        leaves, self.result_spec = pytree.tree_flatten(result)
        only_loss = self.request.outputs == "loss" and loss is not None and not self._is_for_a_loss_outside(result)
        outputs: list[Tensor] = []
        detached: set[int] = set()
        described: list[_Constant | int] = []
        owned = (*inputs, *self.model.parameters(), *self.model.buffers())
        seen = {t.untyped_storage()._cdata for t in owned}  # storages that must not be returned as they are
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                described.append(_Constant(_checked(leaf)))
                continue
            if only_loss and leaf is not loss and leaf.requires_grad:
                leaf = leaf.detach()
                detached.add(len(outputs))
            storage = leaf.untyped_storage()._cdata
            outputs.append(leaf.clone() if storage in seen else leaf)
            seen.add(storage)
            described.append(len(outputs) - 1)
        if not outputs:
            raise CaptureError(
                f"{type(self.model).__name__} returned {result!r}, which holds no tensor; expected tensors, alone or "
                "in tuples, lists, dicts or registered pytree classes"
            )
        self.result_leaves, self.detached = tuple(described), frozenset(detached)
        self.differentiable = tuple(i for i, t in enumerate(outputs) if t.requires_grad)
        self.held_elsewhere.check_gradients(outputs)
        return tuple(outputs)

    def _is_for_a_loss_outside(self, result: Any) -> bool:
        """Whether a tool has assigned a forward of its own, as TRL does, whose result has no logits: the tool may
        compute its loss from other outputs, which then need gradients."""
        return self.is_assigned and "logits" not in result


def _checked(value: Any) -> Any:
    """Returns a non-tensor leaf of the result; raises CaptureError if its type could hold tensors."""
    if isinstance(value, PLAIN) and not isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    advice = "; call it with use_cache=False" if "Cache" in type(value).__name__ else ""
    raise CaptureError(
        f"the model returned a {type(value).__name__}, whose tensors a compiled program could not fill in; expected "
        f"tensors in tuples, lists, dicts or classes registered with torch.utils._pytree.register_pytree_node{advice}"
    )


@dataclass(frozen=True)
class _Constant:
    """A non-tensor leaf of the model's result."""

    value: Any


def rebuild_result(captured: Captured, outputs: list[Tensor]) -> Any:
    """Puts `outputs` into the model's own kind of result, such as a ModelOutput."""
    leaves = [leaf.value if isinstance(leaf, _Constant) else outputs[leaf] for leaf in captured.result_leaves]
    return pytree.tree_unflatten(leaves, captured.result_spec)


# -- tracing -----------------------------------------------------------------------------------------------


def _trace(stack: ExitStack, step: _Step, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    try:
        return private.export_joint(stack, step, inputs)
    except private.DATA_DEPENDENT as error:
        raise CaptureError(
            f"{_source_line(error)}: the model's Python depends on the values of tensors ({error}), and there are no "
            "values during capture. Expected control flow that depends only on shapes and configuration: use "
            "torch.where or a mask there, or pass the value as a Python argument."
        ) from error
    except RuntimeError as error:
        if "use_reentrant=True" in str(error):
            raise CaptureError(
                f"{_source_line(error)}: checkpoint(use_reentrant=True) cannot be captured; use use_reentrant=False, "
                "or leave the checkpoint out: compile(recompute=) decides what is recomputed"
            ) from error
        if "mutating a non-functional tensor" in str(error):
            raise _written(error) from error
        error.add_note(f"while geminifx captured the model, at {_source_line(error)}")
        raise
    except AssertionError as error:
        if "entirely functional graph" in str(error):
            raise _written(error) from error
        error.add_note(f"while geminifx captured the model, at {_source_line(error)}")
        raise
    except (AttributeError, IndexError, TypeError) as error:
        error.add_note(
            f"while geminifx captured the model, at {_source_line(error)}; if this call runs in plain PyTorch, the "
            "model may expect a mask that it does not get here: load it with attn_implementation='eager'"
        )
        raise


def _written(error: Exception) -> CaptureError:
    return CaptureError(
        f"{_source_line(error)}: the forward writes to a tensor that is neither a buffer nor created in the forward "
        f'({error}); register it, self.register_buffer("name", ..., persistent=False), or create a new tensor in the '
        "forward"
    )


def _source_line(error: BaseException) -> str:
    """The line of the model's source, rather than torch's or ours, at which an error was raised."""
    root = Path(__file__).parents[2]  # holds our source folders, and maybe examples
    ours = tuple(f"{folder}/" for folder in (Path(torch.__file__).parent, *map(root.joinpath, _ROOMS)))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    if not frames:
        return "the model"
    return f"{frames[-1].filename}:{frames[-1].lineno} ({(frames[-1].line or '').strip()})"


def _named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by their names in the model's own signature."""
    try:
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        bound = {}
    return {**bound, **kwargs}


def _forward_line(module: nn.Module) -> str:
    """File and line of a module's forward, or "" if it has no Python source."""
    code = getattr(type(module).forward, "__code__", None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}" if code else ""


def _check_dtypes(program: Program) -> None:
    """Products of different float dtypes pass on fake tensors and fail on real ones."""
    for node in program.computes:
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        if name not in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution"):
            continue
        types = (type_of(value) for value in node.all_input_nodes)
        dtypes = {str(t.dtype).removeprefix("torch.") for t in types if isinstance(t, TensorType)}
        if len(dtypes) > 1:
            advice = "With precision='bf16' parameters and inputs are cast, but buffers are not: cast to the weight's "
            advice += "dtype there, or compile with precision='fp32'"
            if not all("float" in dtype for dtype in dtypes):
                advice = "Only floating inputs are cast to the precision of the weights: pass x.float()"
            raise CaptureError(
                f"{note(node).module or 'the model'} ({program.sources.get(note(node).module, '')}) multiplies "
                f"{' and '.join(sorted(dtypes))}. {advice}"
            )
