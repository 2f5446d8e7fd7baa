"""Capture: a model and example inputs become one Program of a whole training step.

torch's ahead-of-time autograd traces forward and backward of the module itself into one ATen graph, on fake
tensors: nothing is allocated and no weight is read, so that a model on `meta` is captured like any other.
The model is not touched: a copy is traced whose tensors are fake.
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
from .draws import SameDraws
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

    `results` rebuilds what the model returned: a pytree spec and its leaves, an int being the position of a
    program output, anything else a constant. `differentiable` are the positions that take a gradient,
    `detached` those that would, had the loss not been chosen to be the only one. `sources` tells of every gradient of
    a parameter or input, by its role, the positions of the outputs that it comes from. `guards` are of what was read
    of the model's modules: it is another step's where one does not hold. `records` are of the passes
    that made it one process's, where tensors are sharded. `examples` are how many a call brings; `divide` makes the
    step that runs them as so many microbatches.
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
        """The step that runs its batch as so many microbatches. Raises SplitError where there is none."""
        if microbatches == 1:
            return self
        if self.divide is None:
            raise SplitError("tensors are sharded over processes, among which parallel= divides the batch")
        return self.divide(microbatches)

    @property
    def trains(self) -> bool:
        """Whether it has a backward."""
        return self.program.name == "training"


class Divide(Protocol):
    """Makes the steps of one batch as so many microbatches, and keeps them; and that of another number of examples."""

    def __call__(self, count: int) -> Captured: ...

    def resized(self, size: int) -> Captured: ...

    def keep_only(self, count: int) -> None: ...


@dataclass(frozen=True)
class CaptureRequest:
    """What to capture: `dtype` to compute in (None: as the model has it), outputs that take a gradient, and
    whether a backward is wanted at all. `dtypes` tells the compute dtype of each parameter where that was
    decided before; by default it follows from `dtype`. `shapes` are the whole parameters', where a process may have
    only its parts by now. `entry` names the submodule that is called; by default the model itself is. `numbers` are the
    positions of the arguments that are numbers, and inputs of the program. `loss_fn` is what the model's forward calls
    beside its own modules."""

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

    Tensor inputs are known by their shapes and dtypes alone; everything else is baked into the program, but for the
    numbers that `request` tells. Raises CaptureError where Python depends on the values of tensors, naming the model's
    source line, and some error where it depends on those of such numbers.
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
    if request.backward and not step.differentiable:  # nothing takes a gradient: what is left is an evaluation
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
        self.is_assigned = "forward" in vars(model.get_submodule(request.entry))  # and not its class's
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
        """Each by its first name alone: torch miscounts the outputs where one is written to that has another, too."""
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
            stack.enter_context(SameDraws())
            stack.enter_context(self.held_elsewhere.standing_in(self.replaced))
            result = self.model.get_submodule(self.request.entry)(*args, **kwargs)
        loss = result.get("loss") if isinstance(result, dict) else None
        leaves, self.result_spec = pytree.tree_flatten(result)
        only_loss = self.request.outputs == "loss" and loss is not None and not self._is_for_a_loss_outside(result)
        outputs: list[Tensor] = []
        detached: set[int] = set()
        described: list[_Constant | int] = []
        owned = (*inputs, *self.model.parameters(), *self.model.buffers())
        seen = {t.untyped_storage()._cdata for t in owned}  # what must not be handed out itself
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
        """Whether a tool has put in its own forward, as TRL does, and leaves out the logits: it has no use for the loss
        alone."""
        return self.is_assigned and "logits" not in result


def _checked(value: Any) -> Any:
    """A part of the result that is no tensor, if it cannot hold one."""
    if isinstance(value, PLAIN) and not isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    advice = "; call it with use_cache=False" if "Cache" in type(value).__name__ else ""
    raise CaptureError(
        f"the model returned a {type(value).__name__}, which may hold tensors that nobody would fill in; expected "
        f"tensors in tuples, lists, dicts or classes registered with torch.utils._pytree.register_pytree_node{advice}"
    )


@dataclass(frozen=True)
class _Constant:
    """A part of the model's result that is no tensor."""

    value: Any


def rebuild_result(captured: Captured, outputs: list[Tensor]) -> Any:
    """The model's own kind of result, such as a ModelOutput, around `outputs`."""
    leaves = [leaf.value if isinstance(leaf, _Constant) else outputs[leaf] for leaf in captured.result_leaves]
    return pytree.tree_unflatten(leaves, captured.result_spec)


# -- tracing -----------------------------------------------------------------------------------------------


def _trace(stack: ExitStack, step: _Step, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    try:
        return private.export_joint(stack, step, inputs)
    except private.DATA_DEPENDENT as error:
        raise CaptureError(
            f"{_source_line(error)}: the model's Python depends on the values of tensors ({error}), and a "
            "captured program has no values to look at. Expected control flow that depends on shapes and "
            "configuration alone: use torch.where or a mask there, or pass the value as a Python argument."
        ) from error
    except RuntimeError as error:
        if "use_reentrant=True" in str(error):
            raise CaptureError(
                f"{_source_line(error)}: checkpoint(use_reentrant=True) cannot be captured; use use_reentrant=False, "
                "or leave the checkpoint out: compile(recompute=) decides what is computed again"
            ) from error
        if "mutating a non-functional tensor" in str(error):
            raise _written(error) from error
        error.add_note(f"while geminifx captured the model, at {_source_line(error)}")
        raise
    except AssertionError as error:
        if "entirely functional graph" in str(error):
            raise _written(error) from error
        raise
    except (AttributeError, IndexError, TypeError) as error:
        error.add_note(
            f"while geminifx captured the model, at {_source_line(error)}; where plain PyTorch runs this call, the "
            "model may read a mask that is not there: load it with attn_implementation='eager'"
        )
        raise


def _written(error: Exception) -> CaptureError:
    return CaptureError(
        f"{_source_line(error)}: the forward writes to a tensor that is neither a buffer nor made by it ({error}); "
        'register it, self.register_buffer("name", ..., persistent=False), or let the forward make a new one'
    )


def _source_line(error: BaseException) -> str:
    """Where in the model, not in torch or here, an error arose."""
    root = Path(__file__).parents[2]  # of the package's rooms; examples may lie beside them
    ours = tuple(f"{folder}/" for folder in (Path(torch.__file__).parent, *map(root.joinpath, _ROOMS)))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    if not frames:
        return "the model"
    return f"{frames[-1].filename}:{frames[-1].lineno} ({(frames[-1].line or '').strip()})"


def _named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by the names that the model's own signature gives them."""
    try:
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        bound = {}
    return {**bound, **kwargs}


def _forward_line(module: nn.Module) -> str:
    """Where a module's forward stands in its source, or "" where there is none."""
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
            advice = "Under precision='bf16' parameters and inputs are cast and buffers are not: cast to the weight's "
            advice += "dtype there, or compile with precision='fp32'"
            if not all("float" in dtype for dtype in dtypes):
                advice = "Only floating inputs are cast to the precision of the weights: pass x.float()"
            raise CaptureError(
                f"{note(node).module or 'the model'} ({program.sources.get(note(node).module, '')}) multiplies "
                f"{' and '.join(sorted(dtypes))}. {advice}"
            )
