"""Captures the step of a call: of the whole batch, of a microbatch, or of this process's shards."""

from dataclasses import dataclass, replace

import torch

from ...models.own_forward import having_forward
from ...passes.canonicalize import canonicalize
from ...passes.program.plan import Plan
from ...passes.sharding.parameters import whole_parameters
from ...runtime.isa.errors import SplitError
from ...runtime.isa.schedule import Schedule
from ..capture.microbatches import Arguments, Finish, Microbatches, typed
from ..capture.trace import Captured, CaptureRequest, capture
from ..lowering import Lowering
from .members import Census
from .programs import Call


@dataclass(frozen=True)
class Captures:
    """Captures one model's steps. `request` is what all captures have in common, `shared` what all plans have, and
    `schedule` a pipeline's; None without one."""

    census: Census
    request: CaptureRequest
    lowering: Lowering
    shared: Plan
    schedule: Schedule | None

    def of(self, call: Call) -> Captured:
        """The captured step of a call; of this process's shards, if tensors are sharded. Raises ShardingError."""
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
        """This process's shards of a step that runs as `microbatches` microbatches."""
        plan = replace(self.shared, microbatches=microbatches, schedule=self.schedule)
        program, records = self.lowering.shard(captured.program, plan)
        canonical = captured.program.copy()
        canonicalize.rewrite(canonical, plan)
        notes = (*captured.notes, *whole_parameters(canonical, plan))
        return replace(captured, program=program, notes=notes, records=tuple(records))

    def _divisible(self, call: Call, captured: Captured, finish: Finish) -> Captured:
        """A captured step that can be captured again for a part of the batch, as long as the model has not changed.
        `finish` turns each capture into the step to run, given the number of microbatches."""
        arguments = typed((call.args, call.kwargs))
        key, asked = call.key, replace(call, args=(), kwargs={}, leaves=[])  # without values, which are not to be kept
        forward = vars(self.census.source).get("forward")  # set only during the call

        def recapture(part: Arguments) -> Captured:
            with having_forward(self.census.source, forward):
                with torch.set_grad_enabled(asked.backward):
                    now = Call.of(self.census.now(), asked.entry, *arguments).taking(asked.inputs)
                if now.key != key or not all(guard.holds() for guard in captured.guards):
                    raise SplitError("the model has changed since it was called; call it again")
                return self._trace(asked, part)

        return Microbatches(captured, arguments, recapture, finish).undivided()
