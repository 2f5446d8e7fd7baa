"""The schedule that the options of a compiled model ask for."""

from ....runtime.isa.errors import ArgumentError
from ....runtime.isa.schedule import ROUND_ROBIN, Schedule
from ...options import Options
from .check import check_schedule
from .round_robin import EVEN, round_robin
from .schedules import Shape, make_schedule


def asked_schedule(options: Options) -> Schedule | None:
    """What each pipeline rank is to do in a training step; None without a pipeline. Round-robin by name is that for
    stages that take equally long. Raises ArgumentError for a schedule that cannot run or misfits the degrees."""
    degrees = options.degrees
    if options.plan is not None:
        return _fitting(options.plan.schedule, options)
    if not degrees.is_staged:
        return None
    if isinstance(options.schedule, Schedule):
        return _fitting(options.schedule, options)
    count = 2 * degrees.pipeline if options.microbatches == "auto" else int(options.microbatches)
    shape = Shape(degrees.pipeline, count, degrees.stages_per_rank)
    if options.schedule == ROUND_ROBIN:
        return round_robin([EVEN] * shape.stages, shape.ranks, shape.microbatches)
    default = "gpipe" if degrees.pipeline == 1 else "1f1b" if degrees.stages_per_rank == 1 else "interleaved"
    return make_schedule(options.schedule or default, shape)


def _fitting(found: Schedule | None, options: Options) -> Schedule | None:
    """Checks the user's schedule. Raises ArgumentError where it cannot run or contradicts another option."""
    degrees = options.degrees
    expected = (degrees.pipeline, degrees.pipeline * degrees.stages_per_rank)
    shape = (1, 1) if found is None else (len(found.ranks), found.stages)
    if shape != expected:
        raise ArgumentError(
            f"the schedule has {shape[0]} ranks and {shape[1]} stages, but parallel= declares {expected[0]} and "
            f"{expected[1]}; make both agree"
        )
    asked = options.microbatches
    if found is not None and asked not in ("auto", found.microbatches):
        raise ArgumentError(
            f"the schedule has {found.microbatches} microbatches, but microbatches={asked}; make both agree"
        )
    if found is not None:
        check_schedule(found)
    return found
