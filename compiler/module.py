"""CompiledModule: the model, trained by generated programs within a budget."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.program.manager import Record
from ..passes.program.plan import Plan
from ..passes.program.text import print_program
from ..runtime.distributed.ranks import Ranks
from ..runtime.executor import NoGradient, Outlets, Step, TrainingRun
from ..runtime.isa.errors import StateError
from ..runtime.memory.stats import Stats
from ..runtime.optimizer.chunk_optimizer import ChunkOptimizer, Declared
from ..runtime.state_io.atomic_directory import shared_directory
from ..runtime.state_io.checksums import seal
from ..runtime.state_io.pretrained import carry_over, save_weights
from .capture.materialize import materialize
from .capture.results import AbsentOutput
from .capture.trace import rebuild_result
from .inspect.nonfinite import first_nonfinite
from .inspect.profile import Profile, profile
from .options import Options
from .programs import Compiled
from .session import Session
from .state_dict import local_shards_of, whole_state


class CompiledModule(nn.Module):
    """A drop-in for the model it was compiled from.

    Same call, same outputs, same parameter names; `parameters()` are the float32 masters, each on the device
    or on the host as planned, and take any element-wise optimizer. Programs are made per mode (training,
    evaluation) and input shapes, once each, and share the parameters. `plan`, `graph` and `stats` tell what
    was decided, what runs, and what it used.

    The source model shares its modules with this one: it stays usable for what reads its parameters, such as
    `save_pretrained`, and anything that is not found here is looked up there.
    """

    def __init__(self, source: nn.Module, options: Options) -> None:
        super().__init__()
        # The very dictionaries of the source: every name and traversal is then the source's own.
        for shared in ("_parameters", "_buffers", "_modules"):
            self.__dict__[shared] = source.__dict__[shared]
        self.__dict__["source"] = source
        self.session = Session(source, options)
        self._anchor = torch.zeros((), requires_grad=True)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._step(args, kwargs)

        # Training loops read the signature to learn which columns of a batch the model takes.
        self.__signature__ = inspect.signature(source.forward)
        forward.__signature__ = self.__signature__  # type: ignore[attr-defined]
        self.forward = forward

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The source's, for `isinstance` and for loops that go by a model's class, its name and its signature; the
        object is a CompiledModule all the same."""
        source = self.__dict__.get("source")
        return CompiledModule if source is None else type(source)

    @property
    def training(self) -> bool:  # what the source's own forward reads
        return self.__dict__["source"].training if "source" in self.__dict__ else True

    @training.setter
    def training(self, mode: bool) -> None:
        if "source" in self.__dict__:
            self.__dict__["source"].training = mode

    def __setattr__(self, name: str, value: Any) -> None:
        """What the source has is the source's to keep: its forward reads it there."""
        source = self.__dict__.get("source")
        own = source is None or name in self.__dict__ or hasattr(CompiledModule, name)
        if not own and (name in vars(source) or hasattr(type(source), name)):
            setattr(source, name, value)
        else:
            super().__setattr__(name, value)

    def train(self, mode: bool = True) -> "CompiledModule":
        """As the source's own `train`, which may keep some modules in evaluation."""
        self.source.train(mode)
        return self

    # -- the call ------------------------------------------------------------------------------------------

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # What is captured is the source's own forward.
        source = vars(self.source)
        is_lent = source.get("forward") is self.forward
        if is_lent:
            del source["forward"]
        try:
            compiled = self.session.program(args, kwargs)
        finally:
            if is_lent:
                source["forward"] = self.forward
        backward = compiled.program.name == "training"
        self.session.ready(backward)
        inputs = self.session.inputs(compiled, args, kwargs)
        self.session.begin_step(backward)
        if backward:
            outputs = self._train(compiled, inputs)
        else:
            results = compiled.executor.evaluate(inputs)
            outputs = [results[f"output:{i}"] for i in range(len(results))]
        return rebuild_result(compiled.captured, outputs)

    def _train(self, compiled: Compiled, inputs: list[Tensor]) -> list[Any]:
        code, captured = compiled.executor.code, compiled.captured
        by_role = dict(zip(code.inputs, inputs, strict=True))
        tracked = [by_role[role.removeprefix("gradient:")] for role in code.input_gradients]
        outlets = Outlets(captured.differentiable, compiled.saved, captured.sources)
        run = TrainingRun(compiled.executor, inputs, outlets)
        inputs.clear()
        outputs: list[Any] = list(Step.apply(run, self._anchor, *tracked))
        for i in captured.detached:
            outputs[i] = NoGradient.apply(self._anchor, outputs[i])
        for i in compiled.absent:
            outputs[i] = AbsentOutput()
        return outputs

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Capture, plan and generate the program for a call with these arguments, without running it."""
        self.session.program(args, kwargs)

    def optimizer(self, kind: type[torch.optim.Optimizer], params: Any = None, *, max_grad_norm: float | None = None,
                  in_backward: bool = False, accumulate: int = 1, **hyper: Any) -> ChunkOptimizer:  # fmt: skip
        """An optimizer whose updates run while the model computes; AdamW keeps 12 bytes per bfloat16 parameter.

        From here on parameters are read as float32 copies, and only this optimizer changes them. Make it before
        the first step: the plan is made anew for it.

        Args:
            kind: torch.optim.AdamW, Adam or SGD, which has the same numbers.
            params: parameters or groups of them, as torch.optim takes them; by default all that are trained.
            max_grad_norm: clip the norm of all gradients to this in every step.
            in_backward: update each chunk as soon as its gradient is complete. Faster, and leaves no gradients to
                look at or to clip.
            accumulate: how many backwards make one step. Needed for in_backward; otherwise it plans the memory.
            hyper: keyword arguments of `kind`, such as lr, betas and weight_decay.

        Raises:
            ValueError: the arguments do not make sense, alone or together.
            StateError: there is no plan yet, or an optimizer of this model was made before.
            BudgetError: nothing fits the budget.
        """
        declared = Declared(kind, hyper, max_grad_norm, in_backward, accumulate)
        declared.check(self.session.dtypes.values())
        groups = [p for p in self.parameters() if p.requires_grad] if params is None else params
        return ChunkOptimizer(declared, groups, self.session.use, self.session.placed, self.session.names())

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_ over all parameters, for torch's optimizers; returns the norm.

        Where parameters are sharded over processes, that function would see this process's parts alone, and clip
        otherwise on each. For `model.optimizer(...)` its `max_grad_norm` needs less memory.
        """
        return self.session.store().clip_grad_norm(max_norm)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the source's own; with `model.optimizer(...)`, as that optimizer's."""
        if self.session.machine is None:
            super().zero_grad(set_to_none)
        else:
            self.session.machine.store.zero_grad(set_to_none)

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, first_only: bool = False, **kwargs: Any) -> Any:
        """As the source's own, in its names; the values are the masters'.

        With `model.optimizer(...)` they are copies on the CPU, made here. So are those of parameters that are sharded
        over processes: they are whole, and all processes make them together. With `first_only` rank 0 alone keeps
        what it gets, and the others get an empty dict.
        """
        keep = not first_only or self.session.ranks.rank == 0
        return whole_state(self.session, *args, keep=keep, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module's; values are copied into the masters, and weights on `meta` come to life. They are whole, also
        where parameters are sharded over processes, each of which takes its part.

        Raises ValueError for assign=True, which would take the parameters out of their chunks.
        """
        if assign:
            raise ValueError("load_state_dict(assign=True) would take parameters out of their chunks; leave it out")
        if any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers())):
            materialize(self.source, state_dict)
            loaded = self.source.load_state_dict(state_dict, strict=strict)
            self.session.place()
            return loaded
        machine = self.session.machine
        with nullcontext() if machine is None else machine.store.writable():
            loaded = self.source.load_state_dict(local_shards_of(self.session, state_dict), strict=strict)
        if strict:
            self.session.half_loaded.discard("model")
        return loaded

    def save_pretrained(self, directory: str | Path, **options: Any) -> None:
        """Save in Hugging Face's format (for other models, the weights as safetensors).

        What `directory` holds is replaced only when the new checkpoint is complete; other files in it stay. Of
        several processes all call it, and rank 0 writes; what fails there raises on all of them.
        """
        with shared_directory(directory, self.session.ranks) as temporary:
            self.write_pretrained(temporary, **options)
            if self.session.ranks.rank == 0:
                seal(temporary)
                carry_over(Path(directory), temporary)

    def write_pretrained(self, directory: Path, **options: Any) -> None:
        """What `save_pretrained` saves, into a directory of one that is replaced as a whole."""
        self.session.check_loaded()
        weights = self.state_dict(first_only=True)
        if self.session.ranks.rank != 0:
            return
        if hasattr(self.source, "save_pretrained"):
            given = options.pop("state_dict", None)
            self.source.save_pretrained(directory, state_dict=weights if given is None else given, **options)
        else:
            save_weights(weights, directory)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self.__dict__["source"], name)
        return self._lent(found) if inspect.ismethod(found) else found

    def _lent(self, method: Any) -> Any:
        """A method of the source. Where it calls the model, as a `training_step` does, the compiled step runs, and it
        may write to parameters, as one does that merges adapters."""

        @contextmanager
        def lending() -> Iterator[None]:
            setup, source = self.session.setup, vars(self.source)
            lends = "forward" not in source and method.__name__ != "generate"
            with nullcontext() if setup is None else setup.machine.store.writable():
                source |= {"forward": self.forward} if lends else {}
                try:
                    yield
                finally:
                    if lends:
                        source.pop("forward", None)

        def call(*args: Any, **kwargs: Any) -> Any:
            if method.__name__ == "generate":  # every token would be a program of its own
                warnings.warn(
                    "generate() runs the source model as it is, in the masters' dtype and outside of plan and budget; "
                    "for much of it load what was saved into a model of its own",
                    stacklevel=2,
                )
            with lending():
                return method(*args, **kwargs)

        def iterate(*args: Any, **kwargs: Any) -> Any:
            with lending():
                return (yield from method(*args, **kwargs))

        return wraps(method)(iterate if inspect.isgeneratorfunction(method) else call)

    # Python looks these up in the class, where __getattr__ has no say.

    def __bool__(self) -> bool:
        return bool(self.source)

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.source)

    def __getitem__(self, index: Any) -> Any:
        return self.source[index]

    def __deepcopy__(self, memo: Any) -> "CompiledModule":
        raise StateError("a compiled module cannot be copied: its chunks are its own. Copy the model, then compile.")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StateError("a compiled module cannot be pickled; save its state_dict(), or use save_pretrained()")

    def _apply(self, fn: Any, recurse: bool = True) -> "CompiledModule":
        """`.to(device)`, `.cuda()` and `.cpu()` change nothing: where parameters live is the plan's choice, and inputs
        are brought to where programs run. Training loops call them as a matter of course.

        Raises StateError for what would change parameters in another way, such as `.half()`.
        """
        device = self.session.device.torch_device
        probe = torch.zeros(1, device=device)
        dtype, is_shared = probe.dtype, probe.is_shared()
        found = fn(probe)
        if found.dtype != dtype or found.is_meta or (found.is_shared() != is_shared and found.device == device):
            raise StateError(
                "this would take parameters out of their chunks or change their dtype (.half(), .to(dtype), "
                ".share_memory()); masters stay float32, and what is computed in is chosen by compile(precision=)"
            )
        if found.device.type != device.type:
            warnings.warn(
                f".to({found.device}) leaves a compiled model where it is: its plan decides what lies on {device} and "
                "what on the host; compile(device=) chooses the device",
                stacklevel=3,
            )
        return self

    # -- inspection ----------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan in force. Raises StateError where there is none and nothing to make one by."""
        return self.session.demanded().plan

    @property
    def ranks(self) -> Ranks:
        """The processes that train it together, of which this is one."""
        return self.session.ranks

    @property
    def graph(self) -> dict[str, str]:
        """The text of the programs in use, by phase: "training" and "evaluation"."""
        self.session.setup or self.session.plan_by_guess()
        return {name: print_program(compiled.program) for name, compiled in self.session.last.items()}

    @property
    def history(self) -> dict[str, tuple[Record, ...]]:
        """What each pass did to the programs in use."""
        return {name: compiled.records for name, compiled in self.session.last.items()}

    @property
    def stats(self) -> Stats:
        """Bytes at the peak and bytes moved, since compilation and in the last step."""
        return self.session.stats

    def profile(self, step: Callable[[], object], steps: int = 1, trace: str | Path | None = None) -> Profile:
        """Run a training step of yours under torch's profiler and tell where its time goes.

        Args:
            step: one step of the loop, optimizer included; called `steps` times. Run some before for it to be warm.
            steps: how many to run; figures are per step.
            trace: a file for the trace, to be read by chrome://tracing or Perfetto.
        """
        machine = self.session.machine
        return profile(step, steps, trace, None if machine is None else machine.store)

    def first_nonfinite(self, *args: Any, **kwargs: Any) -> str | None:
        """The name of the first module whose forward makes an infinite or NaN value of finite ones, or None."""
        compiled = self.session.program(args, kwargs)
        self.session.ready(backward=False)
        return first_nonfinite(compiled.flat, compiled.executor, self.session.inputs(compiled, args, kwargs))
