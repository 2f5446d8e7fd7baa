"""Which steps can run backwards before `loss.backward()`, and which of them and which schedules a pipeline can run."""

from ...runtime.isa.errors import ShardingError
from ...runtime.isa.schedule import Schedule
from ..program.program import Program
from .stages import is_number


def only_loss(program: Program) -> bool:
    """Whether no output but a loss takes a gradient, so that this is known beforehand."""
    tangents = list(program.inputs("tangent").values())
    return len(tangents) <= 1 and all(map(is_number, tangents))


def has_input_gradients(program: Program) -> bool:
    return any(role.startswith("input:") for role in program.results_of("gradient"))


def check_fit(program: Program, schedule: Schedule) -> None:
    """Raises ShardingError for a step or a schedule that a pipeline cannot run."""
    if schedule.splits_backward and any(action.kind == "B" for actions in schedule.ranks for action in actions):
        raise ShardingError(
            f"the schedule {schedule.name} runs some backwards in one action (B) and others in two (I and W), which "
            "can only be simulated; expected the same for all"
        )
    if not only_loss(program):
        raise ShardingError(
            "a pipeline computes the loss in its last stage, so the model must return a loss and no other "
            "differentiable output: let the model compute its loss (labels=), or pass compile a function that does "
            "(loss_fn=), and leave outputs='all' out"
        )
    if has_input_gradients(program):
        raise ShardingError(
            "an input of the pipeline requires a gradient, which only the first stage would have; pass it without, by "
            ".detach()"
        )
