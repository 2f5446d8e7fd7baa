"""Parameters and buffers that the forward reaches other than through their modules: in a list, an object, or under
another name. During the trace, modules hold other tensors in their place, so reads through such references must be
redirected."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ...runtime.isa.errors import CaptureError
from .shared_memory import attributes


class HeldElsewhere:
    """Built from the copy to be traced, while its modules still hold the same tensors as its lists and objects."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: dict[int, str] = {}
        self._kept: list[Tensor] = []  # keeps them alive, so that no id is reused
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names[id(tensor)] = name
            self._kept.append(tensor)
        self._attributes = {id(tensor): name for name, tensor in attributes(model).items()}

    def standing_in(self, replaced: set[str]) -> TorchFunctionMode:
        """A mode in which operators given one of those tensors get the traced one instead. Raises CaptureError for a
        buffer named in `replaced`, whose reference would not follow in plain PyTorch, and for a write to any other
        tensor that the model holds."""
        now = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        standing_in = {identity: now[name] for identity, name in self._names.items()}
        return _StandIn(standing_in, self._names, replaced, self._attributes)

    def check_gradients(self, outputs: Iterable[Tensor]) -> None:
        """Raises CaptureError if a gradient would reach an untraced parameter, as through an autograd.Function."""
        waiting, seen = [output.grad_fn for output in outputs if output.grad_fn is not None], set[Any]()
        while waiting:
            node = waiting.pop()
            name = self._names.get(id(getattr(node, "variable", None)))
            if name is not None:
                raise CaptureError(
                    f"the forward passes the parameter {name}, which it reads through another reference than its "
                    "module, to an autograd.Function, where its gradient would be lost; pass "
                    f"self.{name.rpartition('.')[2]} instead, or a clone()"
                )
            new = {found for found, _ in node.next_functions if found is not None} - seen
            seen |= new
            waiting.extend(new)


class _StandIn(TorchFunctionMode):
    def __init__(self, now: dict[int, Tensor], names: dict[int, str], replaced: set[str],
                 held: dict[int, str]) -> None:  # fmt: skip
        super().__init__()
        self._now, self._names, self._replaced, self._held = now, names, replaced, held

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.arg_tree_leaves(*args, **kwargs)
        if not self._now.keys().isdisjoint(map(id, leaves)):
            args, kwargs = pytree.tree_map_only(Tensor, self._traced, (args, kwargs))
        versions = [(leaf, leaf._version) for leaf in leaves if id(leaf) in self._held and not leaf.is_inference()]
        result = func(*args, **kwargs)
        for tensor, version in versions:
            if tensor._version != version:
                raise CaptureError(
                    f"the forward writes to the tensor {self._held[id(tensor)]}, which is not a buffer; register it, "
                    'self.register_buffer("name", ..., persistent=False), or create a new tensor in the forward'
                )
        return result

    def _traced(self, tensor: Tensor) -> Tensor:
        name = self._names.get(id(tensor))
        if name is None:
            return tensor
        if name in self._replaced:
            raise CaptureError(
                f"the forward replaces the buffer {name}, which it also reads through another reference than self: a "
                "compiled program would replace both, but in plain PyTorch that reference keeps the old tensor. Keep "
                "a copy there, or write to the buffer in place"
            )
        return self._now[id(tensor)]
