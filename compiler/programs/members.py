"""What a model consists of, by name: walked once, and again only where somebody has changed it.

Every call asks for it, and walking hundreds of modules takes as long as a device needs for several layers.
"""

from dataclasses import dataclass
from functools import cached_property
from operator import is_

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Members:
    """Modules and parameters under the first of their names, buffers under all."""

    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]

    @cached_property
    def identities(self) -> tuple[int, ...]:
        """Of the modules."""
        return tuple(map(id, self.modules.values()))


_KINDS = "_modules", "_parameters", "_buffers"


class Census:
    """Of one model, counted by its modules' own methods. `last` is what it consisted of then."""

    def __init__(self, source: nn.Module) -> None:
        self.source = source
        self._count()

    def now(self) -> Members:
        """The same object as long as nothing is added, removed, replaced or renamed."""
        if not self._is_as_counted():
            self._count()
        return self.last

    def _count(self) -> None:
        source = self.source
        self.last = Members(
            dict(source.named_modules()), dict(source.named_parameters()),
            dict(source.named_buffers(remove_duplicate=False)),
        )  # fmt: skip
        attributes = [(vars(module), kind) for module in self.last.modules.values() for kind in _KINDS]
        self._held = [(of, kind, [*of[kind]], [*of[kind].values()]) for of, kind in attributes]

    def _is_as_counted(self) -> bool:
        """One loop, which calls nothing for most: modules without buffers, and layers without modules."""
        for attributes, kind, names, values in self._held:
            held = attributes[kind]
            if len(held) != len(values):
                return False
            if values and not (all(map(is_, held.values(), values)) and [*held] == names):
                return False
        return True
