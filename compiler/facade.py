"""What looks like a module that was compiled: the model itself, and parts of it that are called alone."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial, wraps
from types import MethodType
from typing import Any, Protocol

from torch import nn

from ..models.adapters import exchanges_modules
from ..runtime.isa.errors import StateError
from .forward import Forward


class _Calls(Protocol):
    """See `calls.Calls`."""

    def facade(self, module: nn.Module) -> nn.Module: ...
    def run(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def lending(self) -> AbstractContextManager[None]: ...
    def generate(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class Facade(nn.Module):
    """An object with the attributes, methods and modules of `source`, but for its forward: `calls` runs that.

    Called alone, a part runs a program of its own, within the model's plan. Methods run with the facade as their
    `self`, so that what they call are compiled steps; what they find of modules are facades, too. PEFT's alone run on
    the modules themselves, which they exchange for others.
    """

    def __init__(self, source: nn.Module, calls: _Calls) -> None:
        super().__init__()
        # The very dictionaries of the source: every name and traversal is then the source's own.
        for shared in ("_parameters", "_buffers", "_modules"):
            self.__dict__[shared] = source.__dict__[shared]
        self.__dict__ |= {"source": source, "_calls": calls}
        forward = self._forward_of_source()
        # Training loops read the signature to learn which columns of a batch the model takes.
        self.__dict__ |= {"forward": forward, "_compiled": forward, "__signature__": forward.__signature__}

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The source's, for `isinstance` and for loops that go by a model's class, its name and its signature; the
        object is a facade all the same."""
        source = self.__dict__.get("source")
        return Facade if source is None else type(source)

    @property
    def training(self) -> bool:  # what the source's own forward reads
        return self.__dict__["source"].training if "source" in self.__dict__ else True

    @training.setter
    def training(self, mode: bool) -> None:
        if "source" in self.__dict__:
            self.__dict__["source"].training = mode

    def train(self, mode: bool = True) -> "Facade":
        """As the source's own `train`, which may keep some modules in evaluation."""
        self.source.train(mode)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """What the source has is the source's to keep: its forward reads it there."""
        source = self.__dict__.get("source")
        if name == "forward":
            value = self._new_forward(value)
        own = source is None or name in self.__dict__ or hasattr(type(self), name)
        if type(value) is Facade:  # a part that is given another name
            value = value.source
        if not own and (name in vars(source) or hasattr(type(source), name)):
            setattr(source, name, value)
        else:
            super().__setattr__(name, value)

    def _new_forward(self, value: Callable[..., Any]) -> Callable[..., Any]:
        """A method for the forward is one to compile, a function runs around what is compiled. A part is patched for
        the whole model, too."""
        is_part, before = type(self) is Facade, self._compiled
        if isinstance(value, Forward):
            new = value
        elif inspect.ismethod(value) and value.__self__ in (self, self.source):
            new = before.replaced_by(value)
        elif is_part:
            new = before.replaced_by(MethodType(lambda _, *args, **kwargs: value(*args, **kwargs), self))
        else:
            return value
        self.__dict__["_compiled"] = new
        if is_part and new.method is not None:
            vars(self.source)["forward"] = new.method
        elif is_part:
            vars(self.source).pop("forward", None)
        return new

    def __delattr__(self, name: str) -> None:
        delattr(self.source, name)
        if name == "forward":
            self.__dict__["forward"] = self.__dict__["_compiled"] = self._forward_of_source()

    def _forward_of_source(self) -> Forward:
        return Forward(self.source, partial(self._calls.run, self.source))

    def __getattr__(self, name: str) -> Any:
        try:
            found = super().__getattr__(name)
        except AttributeError:
            found = getattr(self.__dict__["source"], name)
        return self._given(found)

    def _given(self, found: Any) -> Any:
        """What is handed out for something that was found in the source."""
        if isinstance(found, nn.Module):
            return self._facade(found)
        if not (inspect.ismethod(found) and isinstance(found.__self__, nn.Module)):
            return found
        calls, compiled, method = self._calls, self._compiled, found
        if not exchanges_modules(found.__self__):
            method = MethodType(found.__func__, self._facade(found.__self__))

        def call(*args: Any, **kwargs: Any) -> Any:
            if found.__name__ == "generate":
                with compiled.in_source():
                    return calls.generate(found, args, kwargs)
            with calls.lending():
                return method(*args, **kwargs)

        def iterate(*args: Any, **kwargs: Any) -> Any:
            with calls.lending():
                return (yield from method(*args, **kwargs))

        return wraps(found)(iterate if inspect.isgeneratorfunction(found) else call)

    def _facade(self, module: nn.Module) -> nn.Module:
        return self if module is self.source else self._calls.facade(module)

    # Python looks these up in the class, where __getattr__ has no say.

    def __bool__(self) -> bool:
        return bool(self.source)

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        return map(self._given, iter(self.source))

    def __getitem__(self, index: Any) -> Any:
        return self._given(self.source[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.source[index] = value

    def __delitem__(self, index: Any) -> None:
        del self.source[index]

    def get_submodule(self, target: str) -> nn.Module:
        """As nn.Module's; what it returns can be called alone."""
        return self._facade(self.source.get_submodule(target))

    def __deepcopy__(self, memo: Any) -> "Facade":
        raise StateError("a compiled module cannot be copied: its chunks are its own. Copy the model, then compile.")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StateError("a compiled module cannot be pickled; save its state_dict(), or use save_pretrained()")
