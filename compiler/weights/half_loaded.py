"""What a load has begun to write and not ended: with that no step is taken."""

from collections.abc import Iterator
from contextlib import contextmanager

from ...runtime.isa.errors import StateError


class HalfLoaded(set[str]):
    """Parts of the state, "model" and "optimizer"."""

    @contextmanager
    def while_written(self, *parts: str) -> Iterator[None]:
        """Whole again where the body comes to its end."""
        self.update(parts)
        yield
        self.difference_update(parts)

    def check(self) -> None:
        """Raises StateError where a load has failed half way."""
        if self:
            others = ", load_state_dict(...) or load_pretrained(...)" if self == {"model"} else ""
            raise StateError(
                f"a checkpoint could not be read to its end: some values of the {' and the '.join(sorted(self))} are "
                f"of it, others are older; load_checkpoint(...){others} what is whole before going on"
            )
