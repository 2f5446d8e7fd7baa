"""Every use of torch's private interfaces, behind one version check.

Capture relies on torch's ahead-of-time autograd, whose entry points are not public. They were checked on the versions
below: the import refuses older ones, and warns about newer ones.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

CHECKED = ((2, 11), (2, 13))
"""The oldest and the newest torch release whose private interfaces were checked."""

_version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
if _version < CHECKED[0]:
    raise ImportError(
        f"geminifx needs torch {CHECKED[0][0]}.{CHECKED[0][1]} or newer, found {torch.__version__}; "
        "upgrade with: pip install 'torch>=2.11,<2.14'"
    )
if _version > CHECKED[1]:
    warnings.warn(
        f"geminifx was tested up to torch {CHECKED[1][0]}.{CHECKED[1][1]}, but this is {torch.__version__}; if "
        "capture fails, install 'torch<2.14'",
        stacklevel=2,
    )

try:
    import torch.fx.traceback as fx_traceback
    from torch._export.utils import _compiling_state_context
    from torch._functorch._aot_autograd.descriptors import (
        BufferAOTInput,
        GradAOTOutput,
        InputMutationAOTOutput,
        ParamAOTInput,
        PlainAOTInput,
        PlainAOTOutput,
        TangentAOTInput,
    )
    from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
    from torch._prims_common import suggest_memory_format
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
        UnsupportedFakeTensorException,
    )
    from torch.autograd import forward_ad
    from torch.distributed.pipelining.schedules import get_schedule_class
    from torch.fx._lazy_graph_module import _use_lazy_graph_module
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.optim._muon import muon
    from torch.utils._python_dispatch import (
        TorchDispatchMode,
        _disable_current_modes,
        _get_current_dispatch_mode_stack,
        _pop_mode,
    )
except ImportError as error:
    raise ImportError(
        f"torch {torch.__version__} lacks a private interface that geminifx needs for capture ({error}); install a "
        "checked version: pip install 'torch>=2.11,<2.14'"
    ) from error

DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
"""The errors that tracing raises if a model's Python depends on tensor values."""

__all__ = [
    "DATA_DEPENDENT", "BufferAOTInput", "FakeTensor", "FakeTensorMode", "GradAOTOutput", "InputMutationAOTOutput",
    "ParamAOTInput", "PlainAOTInput", "PlainAOTOutput", "ShapeEnv", "TangentAOTInput", "TorchDispatchMode",
    "annotate_modules", "below_autograd", "calls_by_target", "cuda_driver", "dispatch_modes", "export_joint",
    "has_tangent", "is_torchs_generator", "is_transformed", "leave_mode", "module_of", "muon", "num_references",
    "pipeline_table", "plain_dispatch", "plain_results", "set_arguments", "suggest_memory_format", "tangents_are_on",
    "unmetered", "use_expandable_segments", "variable_functions", "watch_chosen_inputs", "watch_clipping",
    "will_accumulate", "wrapper_parameter",
]  # fmt: skip


def export_joint(stack: ExitStack, module: nn.Module, args: tuple[Any, ...]) -> torch.fx.GraphModule:
    """The ATen graph of forward and backward of `module(*args)`, or of the forward alone under no_grad.

    `stack` keeps the tracing contexts open: read the graph while they are, but run nothing.
    """
    # Hugging Face's code asks whether it is being traced, and then avoids data-dependent Python. A graph module that is
    # not lazy would generate code for the graph, and none of it runs.
    with _compiling_state_context(), fx_traceback.preserve_node_meta(), _use_lazy_graph_module(True):
        return aot_export_joint_with_descriptors(stack, module, args).graph_module


def annotate_modules(module: nn.Module) -> None:
    """Makes every operator traced inside a submodule carry the submodule's fully qualified name."""
    for name, submodule in module.named_modules():
        if name:
            submodule.forward = _annotated(submodule.forward, name)


def _annotated(forward: Any, name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with fx_traceback.annotate({"module_fqn": name}):
            return forward(*args, **kwargs)

    call.__wrapped__ = forward  # type: ignore[attr-defined]  # inspect.signature still sees the model's own
    return call


@contextlib.contextmanager
def plain_dispatch() -> Iterator[None]:
    """Traces operators as written: no autocast, and none that only one CPU library has."""
    enabled = torch._C._get_mkldnn_enabled()
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        torch._C._set_mkldnn_enabled(False)  # its LSTM's backward cannot be called from a program
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(enabled)


def tangents_are_on() -> bool:
    """Whether a context of forward-mode differentiation is open."""
    return forward_ad._current_level >= 0


def is_torchs_generator(generator: torch.Generator) -> bool:
    """Whether a generator is one that torch's operators draw from unless they are given another; several objects of
    Python's may stand for it."""
    own = (torch.default_generator, *torch.cuda.default_generators)
    return generator._cdata in {each._cdata for each in own}


def is_transformed() -> bool:
    """Whether this runs within a transform of `torch.func`, such as `grad` or `vmap`."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def has_tangent(tensor: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


below_autograd = torch._C._AutoDispatchBelowAutograd
"""A context in which operators pass autograd by. Under no_grad it would only look at each of them."""

variable_functions = torch._VF
"""Where modules of `torch.nn` look for functions without a Python form, such as `lstm`."""

plain_results = torch._C._disabled_torch_function_impl
"""A `__torch_function__` of tensor classes whose operators return plain tensors."""


def num_references(tensor: torch.Tensor) -> int:
    """The reference count of a tensor's storage: how many tensors and storage objects share it."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def unmetered() -> contextlib.AbstractContextManager[Any]:
    """A context in which dispatch modes, such as the memory meter, see nothing."""
    return _disable_current_modes()


def dispatch_modes() -> list[TorchDispatchMode]:
    """The dispatch modes that are on in this thread, the innermost last."""
    return _get_current_dispatch_mode_stack()


def leave_mode() -> None:
    """Switches the innermost dispatch mode off, also where an interrupt came into its `__exit__`."""
    try:
        dispatch_modes()[-1].__exit__(None, None, None)
    except IndexError:  # its flags are restored already
        _pop_mode()


def wrapper_parameter(cls: type, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype,
                      requires_grad: bool, device: torch.device | str = "cpu") -> Any:  # fmt: skip
    """A tensor of class `cls` with metadata but no memory; `cls` implements every operator itself."""
    options = {"dtype": dtype, "device": device, "requires_grad": requires_grad}
    return torch.Tensor._make_wrapper_subclass(cls, shape, strides, **options)


def module_of(node: torch.fx.Node) -> str:
    return (node.meta.get("custom") or {}).get("module_fqn", "")


def set_arguments(node: torch.fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Sets a node's arguments, as `node.args = args` and `node.kwargs = kwargs` do. Each of these takes the node out of
    its graph's table of targets and back in, which takes longer than all else that copying a node does."""
    node._update_args_kwargs(args, kwargs)


def calls_by_target(graph: torch.fx.Graph) -> Counter[Any]:
    """How often each function and, by name, each submodule is called, from the graph's own table of targets: it takes
    no time for each node."""
    table = graph._find_nodes_lookup_table.table
    found = Counter({target: len(nodes) for (op, target), nodes in table.items() if op == "call_function" and nodes})
    found.update(node.target for node in table.get(("call_module", None), ()))
    return found


def cuda_driver() -> str:
    """The newest CUDA version that the driver supports, such as "13000"; "" if torch has no CUDA."""
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return "" if version is None else str(version())


def use_expandable_segments() -> None:
    """Lets the CUDA caching allocator grow its segments, which limits fragmentation."""
    with contextlib.suppress(AttributeError, RuntimeError):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def watch_chosen_inputs(check: Callable[[Sequence[Any], Sequence[Any]], None]) -> None:
    """Makes autograd call `check(outputs, inputs)` before it computes the gradients of chosen inputs only. It is the
    only way to see inputs that the outputs' graph does not reach."""
    plain = torch.autograd._engine_run_backward

    def run(outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        inputs = args[3]
        if inputs:
            check(outputs, inputs)
        return plain(outputs, *args, **kwargs)

    torch.autograd._engine_run_backward = run


def watch_clipping(check: Callable[[Sequence[Any]], None]) -> None:
    """Makes torch's gradient clipping call `check(parameters)` before it writes, and its GradScaler before it unscales
    or steps."""
    clipping, scaler = torch.nn.utils.clip_grad, torch.amp.GradScaler
    plain, plain_step, plain_unscale = clipping._clip_grads_with_norm_, scaler.step, scaler.unscale_

    def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        check(parameters)
        return plain(parameters, *args, **kwargs)

    def of_scaler(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if self.is_enabled():
                check([parameter for group in optimizer.param_groups for parameter in group["params"]])
            return method(self, optimizer, *args, **kwargs)

        return call

    clipping._clip_grads_with_norm_ = clip
    scaler.step, scaler.unscale_ = of_scaler(plain_step), of_scaler(plain_unscale)


def default_store() -> Any:
    """The store that the processes of torch.distributed met at."""
    return torch.distributed.distributed_c10d._get_default_store()


def will_accumulate(leaf: torch.Tensor) -> bool:
    """Called in a node's backward: whether this run of autograd accumulates into `leaf`, an input of the node, as
    `loss.backward()` does and `torch.autograd.grad(loss, others)` does not."""
    return torch._C._will_engine_execute_node(get_gradient_edge(leaf).node)


def pipeline_table(schedule: str, ranks: int, microbatches: int, stages_per_rank: int) -> list[list[tuple[Any, ...]]]:
    """The actions of one of torch's schedules, by its name there, with several stages per rank: for each rank, in
    order, (stage, microbatch, F, B, I or W)."""

    class Table(get_schedule_class(schedule)):  # type: ignore[misc]  # whichever it is
        def _prepare_schedule_with_comms(self, *_: Any, **__: Any) -> None:
            """Skipped: torch's messages are not used, and take long to compute."""

    stage = SimpleNamespace(
        num_stages=ranks * stages_per_rank, group_size=ranks, group_rank=0, submod=None, stage_index_to_group_rank=None
    )
    order = Table([stage] * stages_per_rank, microbatches).pipeline_order
    return [
        [
            (action.stage_index, action.microbatch_index, action.computation_type.value)
            for action in order[rank]
            if action
        ]
        for rank in range(ranks)
    ]
