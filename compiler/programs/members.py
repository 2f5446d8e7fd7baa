"""A model's modules, parameters and buffers by name: walked once, and again only after a change.

Every call needs them, and walking hundreds of modules takes as long as a device takes for several layers.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import is_, methodcaller

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Members:
    """Modules and parameters under the first of their names, buffers under all of their names."""

    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]

    @cached_property
    def identities(self) -> tuple[int, ...]:
        """The ids of the modules."""
        return tuple(map(id, self.modules.values()))


_KINDS = "_modules", "_parameters", "_buffers"


class Census:
    """The members of one model, listed by its modules' own methods. `last` are those of the last count."""

    def __init__(self, source: nn.Module) -> None:
        self.source = source
        self._count()

    def now(self) -> Members:
        """The members now; the same object as long as nothing is added, removed, replaced or renamed."""
        if not self._is_as_counted():
            self._count()
        return self.last

    def _count(self) -> None:
        source = self.source
        self.last = Members(
            dict(source.named_modules()), dict(source.named_parameters()),
            dict(source.named_buffers(remove_duplicate=False)),
        )  # fmt: skip
        self._attributes = [(vars(module), kind) for module in self.last.modules.values() for kind in _KINDS]
        held = [attributes[kind] for attributes, kind in self._attributes]
        self._counts, self._names = [*map(len, held)], [*chain.from_iterable(held)]
        self._values = [value for each in held for value in each.values()]

    def _is_as_counted(self) -> bool:
        """All that is held in one list, compared at the speed of C: this runs in every call."""
        held = [attributes[kind] for attributes, kind in self._attributes]
        if [*map(len, held)] != self._counts or [*chain.from_iterable(held)] != self._names:
            return False
        return all(map(is_, chain.from_iterable(map(methodcaller("values"), held)), self._values))
