"""Keeps track of loads that began to write and did not finish: until one succeeds, no step is taken."""

from collections.abc import Iterator
from contextlib import contextmanager

from ...runtime.isa.errors import StateError


class HalfLoaded(set[str]):
    """The parts of the state, "model" or "optimizer", that are written only in part."""

    @contextmanager
    def while_written(self, *parts: str) -> Iterator[None]:
        """Marks the parts as half loaded until the body ends without an error."""
        self.update(parts)
        yield
        self.difference_update(parts)

    def check(self) -> None:
        """Raises StateError if a load has failed half way."""
        if self:
            others = ", load_state_dict(...) or load_pretrained(...)" if self == {"model"} else ""
            raise StateError(
                f"loading a checkpoint failed halfway: some values of the {' and the '.join(sorted(self))} come from "
                f"it and others are older; load an intact one with load_checkpoint(...){others} before you continue"
            )
