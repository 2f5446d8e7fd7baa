"""The cache of captured steps, and which of them serves a call."""

import time

from ..capture.refusals import tell_of_slowness
from ..capture.trace import Captured
from .captures import Captures
from .changing_numbers import ChangingNumbers
from .programs import Call, GuardedKeys, Key, Recaptures, Recent


class KeptCaptures:
    """The steps of one model, each captured once: by a call's shapes and modes, by what the model's Python read during
    the capture, and by the numbers that are constants. No numbers become inputs unless `numbers_may_be_inputs`."""

    def __init__(self, captures: Captures, numbers_may_be_inputs: bool) -> None:
        self.captures = captures
        self.kept: Recent[Captured] = Recent()
        self._guarded = GuardedKeys()
        self._numbers = ChangingNumbers(numbers_may_be_inputs)
        self._recaptures = Recaptures()

    def taken(self, call: Call) -> Call:
        """The call, with each number as an input that has become one in earlier calls."""
        return self._numbers.taken(call)

    def key(self, call: Call) -> Key:
        """The key of the step that serves a call of the model in its present state."""
        return self._guarded.key(call.key)

    def of(self, call: Call) -> tuple[Key, Captured]:
        """The step for a call, captured if it is new, and its key."""
        key = self.key(call)
        if key not in self.kept:
            call, captured = self._numbers.captured(call, self._anew)
            self._guarded.add(call.key, captured.guards, self.captures.census.now().modules.values())
            key = self.key(call)
            self.kept[key] = captured
        return key, self.kept[key]

    def _anew(self, call: Call) -> Captured:
        self._recaptures.note(call, self._guarded.changed(call.key))
        began_s = time.thread_time()
        captured = self.captures.of(call)
        tell_of_slowness(time.thread_time() - began_s, captured.program)
        return captured
