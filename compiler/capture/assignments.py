"""State that a model's forward assigns. A program only computes tensors and writes to buffers, so where the forward
replaces a buffer, the program writes to it:

    self.n = self.n + 1                            self.n.copy_(self.n + 1)
    self.average.data = value                      self.average.copy_(value)

A module's other attributes are left as they were. Assigning one is refused if the program may have read a tensor from
it, and warned about if it may not matter, as with a cache.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...runtime.isa.errors import CaptureError
from .contents import Contents
from .guards import attributes_of, changed_attributes
from .known import Snapshot
from .owners import full_name

_set_data = torch.Tensor.data.__set__


class _DataIsWritten(TorchFunctionMode):
    """Turns `tensor.data = value` into a write to the tensor: the trace knows its tensors by identity."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func != _set_data:  # compared by !=: each access makes a new wrapper
            return func(*args, **kwargs or {})
        tensor, value = args
        _check_like(value, tensor, "a tensor's .data")
        with torch.no_grad():
            return tensor.copy_(value)


@contextmanager
def followed_assignments(model: nn.Module, replaced: set[str]) -> Iterator[None]:
    """While open, the forward of `model`, a copy, may assign; on leaving, everything but buffers is restored.

    A forward is traced twice. `replaced` carries over from the first time to the second: it collects the names of the
    buffers that are replaced. The second forward reads copies of those, since the backward may still need the values
    that are then overwritten.

    Warns about attributes whose assignment has no effect. Raises CaptureError on leaving if a parameter was assigned,
    or a tensor whose old value the program may have read, or if a buffer was replaced by one of another shape or dtype.
    """
    before = [(path, module, _State.of(module)) for path, module in model.named_modules()]
    for path, module, _ in before:
        for name, buffer in module._buffers.items():
            if full_name(path, name) in replaced:
                module._buffers[name] = buffer.clone()
    with _DataIsWritten():
        yield
    # Read all values before writing any: they may be other buffers.
    values = [(path, name, buffer, module._buffers.get(name)) for path, module, state in before
              for name, buffer in state.buffers.items() if buffer is not None]  # fmt: skip
    written = [(full_name(path, name), buffer, now) for path, name, buffer, now in values if now is not buffer]
    replaced |= {path for path, _, _ in written}
    shared = next((path for path, buffer, _ in written if sum(b is buffer for _, _, b, _ in values) > 1), None)
    if shared is not None:
        raise CaptureError(
            f"the forward replaces the buffer {shared}, which another module also holds: a compiled program would "
            "replace both, but plain PyTorch keeps the other one. Register a copy in the other module, or write to "
            "the buffer in place"
        )
    news = [None if now is None else now.clone() for _, _, now in written]
    for (path, buffer, _), new in zip(written, news, strict=True):
        _write_back(buffer, new, path)
    for path, module, state in before:
        state.restore(module, path)


_Buffers = dict[str, Tensor | None]


def shared_buffers(model: nn.Module) -> list[tuple[_Buffers, str, _Buffers, str]]:
    """The further places of buffers that modules hold more than once: (buffers, name, first buffers, first name)."""
    first: dict[int, tuple[_Buffers, str]] = {}
    places = [(module._buffers, name) for module in model.modules() for name in module._buffers]
    held = [(buffers, name, *first.setdefault(id(buffers[name]), (buffers, name))) for buffers, name in places]
    return [place for place in held if place[0][place[1]] is not None and place[:2] != place[2:]]


@dataclass(frozen=True)
class _State:
    """What a module held before its forward ran."""

    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    values: dict[str, Any]
    hooks: dict[str, dict[Any, Any]]
    attributes: dict[str, Snapshot]
    contents: Contents

    @classmethod
    def of(cls, module: nn.Module) -> "_State":
        hooks = {
            name: dict(hooks) for name, hooks in vars(module).items() if "_hooks" in name and isinstance(hooks, dict)
        }
        parameters, buffers, values = dict(module._parameters), dict(module._buffers), dict(vars(module))
        return cls(parameters, buffers, values, hooks, attributes_of(module), Contents.of(module))

    def restore(self, module: nn.Module, path: str) -> None:
        """Undoes what the forward assigned. Warns, or raises CaptureError, if the assignment may be missed."""
        prefix = full_name(path, "")
        now = module._parameters
        changed = [name for name in {**self.parameters, **now} if now.get(name) is not self.parameters.get(name)]
        if changed:
            raise CaptureError(
                f"the forward assigns the parameter {prefix}{changed[0]}; expected it to use its existing parameters, "
                "and to write only to buffers"
            )
        if not type(module).__module__.startswith(("torch.nn.", "transformers.")):  # their state is internal
            self._tell(module, prefix)
        vars(module).clear()
        vars(module).update(self.values)
        self.contents.restore()
        module._buffers.clear()
        module._buffers.update(self.buffers)
        for name, hooks in self.hooks.items():
            vars(module)[name].clear()
            vars(module)[name].update(hooks)

    def _tell(self, module: nn.Module, prefix: str) -> None:
        for name, old in self.values.items():
            if isinstance(old, Tensor) and vars(module).get(name) is not old:
                raise CaptureError(
                    f"the forward assigns the tensor {prefix}{name}, which a compiled program cannot follow from call "
                    f'to call; register it: self.register_buffer("{name}", ..., persistent=False)'
                )
        replaced = self.contents.replaced_tensor()
        if replaced is not None:
            raise CaptureError(
                f"the forward replaces the tensor {prefix}{replaced}, which a compiled program cannot follow from call "
                "to call; keep it as a buffer: self.register_buffer(name, ..., persistent=False)"
            )
        now, before = {**vars(module), **module._buffers}, {**self.values, **self.buffers}
        new = {n for n, value in now.items() if isinstance(value, Tensor) and not isinstance(before.get(n), Tensor)}
        told = sorted(changed_attributes(module, self.attributes) | new)
        if told:
            warnings.warn(
                f"the forward assigns {', '.join(prefix + name for name in told)}, but compiled steps do not repeat "
                "such assignments: they only compute tensors and write to buffers. Return what is read outside the "
                "model, and register what the next call reads as a buffer",
                stacklevel=2,
            )


def _write_back(buffer: Tensor, now: Tensor | None, path: str) -> None:
    if now is None:
        raise CaptureError(
            f"the forward removes the buffer {path}; expected it to keep the buffer and write to it in place"
        )
    _check_like(now, buffer, f"buffer {path}")
    with torch.no_grad():
        buffer.copy_(now)


def _check_like(value: Tensor, tensor: Tensor, what: str) -> None:
    if value.shape != tensor.shape or value.dtype != tensor.dtype:
        raise CaptureError(
            f"the forward replaces {what} of {tensor.dtype} {list(tensor.shape)} by one of {value.dtype} "
            f"{list(value.shape)}; a buffer must keep its dtype and shape: allocate it in its largest size beforehand"
        )
