"""From a call of the model to its captured step: of the whole batch, of a part of it, of this process's parts."""

from dataclasses import dataclass, replace

import torch

from ...passes.canonicalize import canonicalize
from ...passes.program.plan import Plan
from ...passes.sharding.parameters import whole_parameters
from ...runtime.isa.errors import SplitError
from ...runtime.isa.schedule import Schedule
from ..capture.microbatches import Arguments, Finish, Microbatches, typed
from ..capture.trace import Captured, CaptureRequest, capture
from ..lowering import Lowering
from .forward import having_forward
from .members import Census
from .programs import Call


@dataclass(frozen=True)
class Captures:
    """Captures one model's steps. `request` is what they have in common, `shared` what all plans say alike, and
    `schedule` is a pipeline's."""

    census: Census
    request: CaptureRequest
    lowering: Lowering
    shared: Plan
    schedule: Schedule | None

    def of(self, call: Call) -> Captured:
        """The captured step of a call; of this process's parts, where tensors are sharded. Raises ShardingError."""
        captured = self._trace(call, (call.args, call.kwargs))
        if not self.shared.mesh.tensor_axes:
            return self._divisible(call, captured, lambda step, microbatches: step)
        if self.schedule is None:
            return self._shard(captured, microbatches=1)
        return self._divisible(call, captured, self._shard)

    def _trace(self, call: Call, arguments: Arguments) -> Captured:
        request = replace(self.request, backward=call.backward, entry=call.entry, numbers=call.inputs)
        with torch.inference_mode(False), torch.set_grad_enabled(call.backward):
            captured = capture(self.census.source, *arguments, request)
        return replace(captured, notes=(*self.shared.notes, *captured.notes))

    def _shard(self, captured: Captured, microbatches: int) -> Captured:
        """One process's parts of a step that runs as so many microbatches."""
        plan = replace(self.shared, microbatches=microbatches, schedule=self.schedule)
        program, records = self.lowering.shard(captured.program, plan)
        canonical = captured.program.copy()
        canonicalize.rewrite(canonical, plan)
        notes = (*captured.notes, *whole_parameters(canonical, plan))
        return replace(captured, program=program, notes=notes, records=tuple(records))

    def _divisible(self, call: Call, captured: Captured, finish: Finish) -> Captured:
        """A captured step that can be made of a part of the batch, as long as the model is as it was."""
        arguments = typed((call.args, call.kwargs))
        key, asked = call.key, replace(call, args=(), kwargs={}, leaves=[])  # whose values are not kept
        forward = vars(self.census.source).get("forward")  # which it has only while it is called

        def recapture(part: Arguments) -> Captured:
            with having_forward(self.census.source, forward):
                with torch.set_grad_enabled(asked.backward):
                    now = Call.of(self.census.now(), asked.entry, *arguments).taking(asked.inputs)
                if now.key != key or not all(guard.holds() for guard in captured.guards):
                    raise SplitError("the model is not as it was when it was called; call it again")
                return self._trace(asked, part)

        return Microbatches(captured, arguments, recapture, finish).undivided()
