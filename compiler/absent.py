"""What stands in a model's result for logits that a compiled step never computes."""

from typing import Any, NoReturn

from ..runtime.errors import StateError


class AbsentOutputError(StateError, AttributeError):
    """An output that does not exist was used.

    It is an AttributeError too, so that code that asks an output for an attribute before it uses it, as
    mixed-precision wrappers do of everything a model returns, passes it by.
    """


class AbsentOutput:
    """In the place of logits whose loss is computed in pieces: may be held, shown, copied; any use raises."""

    __slots__ = ()

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise AbsentOutputError(
            "this output of the model, the logits, was not computed, to save memory: its loss is computed in pieces "
            "(plan.fuse_loss), or it is sharded over processes, none of which has all of it (plan.mode). To have the "
            "logits compile with fuse_loss=False, to train through them, or have them of a sharded model, with "
            "outputs='all'; evaluation under torch.no_grad() returns them in any case."
        )

    def __repr__(self) -> str:
        return "<logits, not computed: compile(..., outputs='all') has them>"

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        cls._refuse(cls())

    __hash__ = object.__hash__
    __getattr__ = __setattr__ = __delattr__ = __call__ = _refuse
    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = __setitem__ = __delitem__ = _refuse
    __float__ = __int__ = __index__ = __complex__ = __array__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __neg__ = __pos__ = __abs__ = __invert__ = __round__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = __matmul__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = __rmatmul__ = _refuse
    __and__ = __or__ = __xor__ = __rand__ = __ror__ = __rxor__ = _refuse
