"""Facades: modules of a compiled model, or the whole of it, that run compiled steps when called."""

import inspect
from collections.abc import Callable, ItemsView, Iterator, ValuesView
from contextlib import AbstractContextManager
from functools import partial, wraps
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn

from ..models.adapters import exchanges_modules
from ..runtime.isa.errors import StateError
from .programs.forward import Forward


class _Calls(Protocol):
    """The interface of `calls.Calls` that a facade uses."""

    def facade(self, module: nn.Module) -> nn.Module: ...
    def part(self, module: nn.Module) -> nn.Module: ...
    def run(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def lending(self) -> AbstractContextManager[None]: ...
    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None: ...
    def generate(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class Facade(nn.Module):
    """A stand-in with the attributes, methods and submodules of a module, whose forward is run by `calls`.

    A submodule called alone runs a program of its own, within the model's plan. Methods run with a facade as their
    `self`, so that the modules they call run compiled steps; modules they look up are facades, too. Only PEFT's methods
    run on the modules themselves, because they exchange modules for others. The facade's own attributes are named
    `_facade_...`; all other names are the module's.
    """

    def __init__(self, source: nn.Module, calls: _Calls) -> None:
        super().__init__()
        # These are the source's own dictionaries, so every name and traversal is the source's.
        for shared in ("_parameters", "_buffers", "_modules"):
            self.__dict__[shared] = source.__dict__[shared]
        self.__dict__ |= {"_facade_source": source, "_facade_calls": calls}
        self._facade_reset()
        # Training loops read the signature to learn which columns of a batch the model takes.
        self.__dict__["__signature__"] = self.forward.__signature__

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The source's class, for `isinstance` and for loops that look at a model's class, its name or its signature.
        `type()` still returns Facade or CompiledModule."""
        source = self.__dict__.get("_facade_source")
        return Facade if source is None else type(source)

    @property
    def training(self) -> bool:  # the source's own forward reads this flag
        return self.__dict__["_facade_source"].training if "_facade_source" in self.__dict__ else True

    @training.setter
    def training(self, mode: bool) -> None:
        if "_facade_source" in self.__dict__:
            self.__dict__["_facade_source"].training = mode

    def train(self, mode: bool = True) -> "Facade":
        """As the source's own `train`, which may keep some modules in evaluation."""
        self._facade_source.train(mode)
        return self

    # -- attributes ----------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets attributes on the source, whose forward reads them there."""
        if name == "forward":
            self.__dict__["forward"] = self._facade_new_forward(value)
        elif "_facade_source" not in self.__dict__ or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:  # the value may be a facade, if a submodule gets a second name
            setattr(self._facade_source, name, value._facade_source if type(value) is Facade else value)

    def __delattr__(self, name: str) -> None:
        if name == "forward":
            if type(self) is Facade:
                vars(self._facade_source).pop("forward", None)
            self._facade_reset()
        elif name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self._facade_source, name)

    def __getattr__(self, name: str) -> Any:
        try:
            found = super().__getattr__(name)
        except AttributeError:
            found = getattr(self.__dict__["_facade_source"], name)
        return self._facade_given(found)

    def _facade_reset(self) -> None:
        """Restores the source's own forward, compiled."""
        source = self._facade_source
        self.__dict__["forward"] = self.__dict__["_facade_forward"] = Forward(
            source, partial(self._facade_calls.run, source)
        )

    def _facade_new_forward(self, value: Callable[..., Any]) -> Callable[..., Any]:
        """The forward for an assigned `value`: a method is compiled in the forward's place, a function runs around the
        compiled one. On a submodule the assignment also takes effect in steps of the whole model."""
        is_part, source, before = type(self) is Facade, self._facade_source, self._facade_forward
        if isinstance(value, Forward):
            new = value
        elif inspect.ismethod(value) and value.__self__ in (self, source):
            new = before.replaced_by(value)
        elif is_part:
            new = before.replaced_by(MethodType(lambda _, *args, **kwargs: value(*args, **kwargs), self))
        else:
            return value
        self.__dict__["_facade_forward"] = new
        if is_part and new.method is not None:
            vars(source)["forward"] = new.method
        elif is_part:
            vars(source).pop("forward", None)
        return new

    def _facade_given(self, found: Any) -> Any:
        """What to return for an attribute found in the source: facades for modules, wrappers for their methods."""
        calls, compiled = self._facade_calls, self._facade_forward
        if isinstance(found, nn.Module):
            return self if found is self._facade_source else calls.facade(found)
        if not (inspect.ismethod(found) and isinstance(found.__self__, nn.Module)):
            return found
        method = found
        if not exchanges_modules(found.__self__):
            method = MethodType(found.__func__, calls.facade(found.__self__))

        def call(*args: Any, **kwargs: Any) -> Any:
            if found.__name__ == "generate":
                with compiled.in_source():
                    return calls.generate(found, args, kwargs)
            with calls.lending():
                return self._facade_view(method(*args, **kwargs))

        def iterate(*args: Any, **kwargs: Any) -> Any:
            steps = method(*args, **kwargs)
            while True:
                with calls.lending():  # but not while the caller handles a value
                    try:
                        value = next(steps)
                    except StopIteration as stop:
                        return stop.value
                yield value

        return wraps(found)(iterate if inspect.isgeneratorfunction(found) else call)

    def _facade_view(self, result: Any) -> Any:
        """A dictionary view of modules, such as a ModuleDict's `items()`, with facades in their place."""
        if isinstance(result, ItemsView):
            return {name: self._facade_given(value) for name, value in result}.items()
        if isinstance(result, ValuesView):
            return dict(enumerate(map(self._facade_given, result))).values()
        return result

    # -- what nn.Module does with itself -------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> "Facade":
        """`.to(device)`, `.cuda()` and `.cpu()`, which training loops call as a matter of course, change nothing: the
        plan decides where parameters live, and inputs are moved to where programs run.

        Raises StateError for anything else that would change parameters, such as `.half()`.
        """
        self._facade_calls.check_move(fn)
        return self

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        with self._facade_calls.lending():
            return self._facade_source.load_state_dict(state_dict, strict, assign)

    def get_submodule(self, target: str) -> nn.Module:
        """As nn.Module's; the module returned can be called alone."""
        return self._facade_given(self._facade_source.get_submodule(target))

    def named_modules(self, memo: set[nn.Module] | None = None, prefix: str = "",
                      remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:  # fmt: skip
        """As nn.Module's; the modules returned can be called alone. With a `memo`, as for a compiled module inside
        another, they are the source's own: the outer module walks all of them whenever it looks for parameters."""
        found = self._facade_source.named_modules(memo, prefix, remove_duplicate)
        return found if memo is not None else ((name, self._facade_part(module)) for name, module in found)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        return ((name, self._facade_part(module)) for name, module in self._facade_source.named_children())

    def _named_members(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """Parameters and buffers, which need no facades."""
        return self._facade_source._named_members(*args, **kwargs)

    def _facade_part(self, module: nn.Module) -> nn.Module:
        return self if module is self._facade_source else self._facade_calls.part(module)

    # Python looks these up on the class, so `__getattr__` does not forward them.

    def __bool__(self) -> bool:
        return bool(self._facade_source)

    def __len__(self) -> int:
        return len(self._facade_source)

    def __iter__(self) -> Iterator[Any]:
        return map(self._facade_given, iter(self._facade_source))

    def __getitem__(self, index: Any) -> Any:
        found = self._facade_source[index]
        if isinstance(index, slice) and isinstance(
            found, (nn.Sequential, nn.ModuleList)
        ):  # a new one, of the same modules
            found._modules = {name: self._facade_given(module) for name, module in found._modules.items()}
        return self._facade_given(found)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._facade_source[index] = value

    def __delitem__(self, index: Any) -> None:
        del self._facade_source[index]

    def __deepcopy__(self, memo: Any) -> "Facade":
        raise StateError(
            "a compiled module cannot be copied, because it owns its chunks of memory. Copy the original model, and "
            "compile the copy."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StateError("a compiled module cannot be pickled; save its state_dict(), or use save_pretrained()")


def _hooks_of_parts() -> None:
    """Registers hooks on a submodule's source, where the capture of the whole model finds them, too. Hooks on the whole
    compiled model run around its calls."""
    for name in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):

        def register(self: Facade, *args: Any, _name: str = f"register_{name}", **options: Any) -> Any:
            holder = self._facade_source if type(self) is Facade else super(Facade, self)
            return getattr(holder, _name)(*args, **options)

        setattr(Facade, f"register_{name}", register)


_hooks_of_parts()
