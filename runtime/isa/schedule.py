"""The schedule of a pipeline: which rank runs which stage on which microbatch, and in which order, as frozen data that
prints as text and parses back.

    1f1b stages=2 microbatches=3
    rank 0: F0.0 F0.1 B0.0 F0.2 B0.1 B0.2
    rank 1: F1.0 B1.0 F1.1 B1.1 F1.2 B1.2

F0.2 is stage 0's forward of microbatch 2, and B0.2 its whole backward. A backward may be split in two: I0.2 computes
the gradients of the stage's inputs, which the previous stage waits for, and W0.2, later, those of its weights.

If weights live on the hosts, a stage is not bound to a rank, and any rank may run any of its actions:

    roundrobin stages=2 microbatches=1 weights=host
    rank 0: F0.0 B0.0
    rank 1: F1.0 B1.0
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]
Weights = Literal["rank", "host"]

ROUND_ROBIN = "roundrobin"
"""The name of the schedule whose weights live on the hosts."""

_HEADER = re.compile(r"(\S+) stages=(\d+) microbatches=(\d+)( weights=host)?", re.ASCII)
_RANK = re.compile(r"rank (\d+):(.*)", re.ASCII)
_ACTION = re.compile(r"([FBIW])(\d+)\.(\d+)", re.ASCII)


class Action(NamedTuple):
    """One stage's work on one microbatch: F forward, B whole backward, I gradients of inputs, W gradients of
    weights."""

    stage: int
    microbatch: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """The inverse of str(action). Raises ValueError on anything else."""
        found = _ACTION.fullmatch(text)
        if found is None:
            raise ValueError(
                f"{text!r} is not an action; expected F, B, I or W, a stage and a microbatch, such as F0.3"
            )
        return cls(int(found[2]), int(found[3]), found[1])  # type: ignore[arg-type]  # as the pattern says


@dataclass(frozen=True)
class Schedule:
    """What each rank of a pipeline does, as its actions in order.

    Stage 0 reads the batch and the last one computes the loss. All actions of a stage are on one rank, which has its
    `weights`, unless these are on the hosts. `compiler.planner.pipeline.check` decides whether a schedule can run.
    """

    name: str
    stages: int
    microbatches: int
    ranks: tuple[tuple[Action, ...], ...]
    weights: Weights = "rank"

    def __post_init__(self) -> None:
        if len(self.name.split()) != 1 or self.name != self.name.strip():
            raise ValueError(f"a schedule is named {self.name!r}; expected one word")

    def runner(self, action: Action) -> int:
        """The rank that runs an action."""
        return self._rank_by_action[action]

    def rank_of(self, stage: int) -> int:
        """The rank that runs a stage. Raises ValueError if none does, or any may."""
        if self.weights == "host":
            raise ValueError(f"no stage of the schedule {self.name} belongs to one rank: its weights live on the hosts")
        rank = self._rank_by_stage.get(stage)
        if rank is None:
            raise ValueError(f"no rank of the schedule {self.name} runs stage {stage} of {self.stages}")
        return rank

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank runs, in the order of the model."""
        return tuple(sorted({action.stage for action in self.ranks[rank]}))

    def turn(self, rank: int) -> int:
        """How many of a rank's actions come before its turn, where it returns the loss to the training loop and waits
        for `backward()`. An action that completes a stage's weight gradients comes after the turn, since these must not
        be seen before `backward()`; so does all that follows the first such action, here or on ranks that this one
        waits for.

        All forwards come before the turn: the last backward of a stage waits for those of every microbatch. (If weights
        live on the hosts, each rank runs the last backward of some stages, as the schedule's checker ensures.)
        """
        return self._turns[rank]

    def last_forward(self, rank: int) -> int:
        """The index of a rank's last forward among its actions; -1 if it has none."""
        return max((i for i, action in enumerate(self.ranks[rank]) if action.kind == "F"), default=-1)

    def forward_alone(self, microbatches: int) -> "Schedule":
        """A schedule of `microbatches` forwards through the same stages, each on the rank that runs its first
        forward."""
        stages: dict[int, list[int]] = {rank: [] for rank in range(len(self.ranks))}
        for stage in range(self.stages):
            stages[self.runner(Action(stage, 0, "F"))].append(stage)
        ranks = (
            tuple(Action(stage, m, "F") for stage in each for m in range(microbatches)) for each in stages.values()
        )
        return Schedule("forward", self.stages, microbatches, tuple(ranks), self.weights)

    def needs(self, action: Action) -> tuple[Action, ...]:
        """The actions that must be done before an action: a forward waits for the previous stage, a backward for its
        own forward and the next stage, weight gradients for input gradients. Results of another rank's actions come as
        messages."""
        stage, microbatch = action.stage, action.microbatch
        if action.kind == "F":
            return (Action(stage - 1, microbatch, "F"),) if stage else ()
        if action.kind == "W":
            return (Action(stage, microbatch, "I"),)
        forward = Action(stage, microbatch, "F")
        return (forward,) if stage + 1 == self.stages else (forward, self.backward(stage + 1, microbatch))

    def reader(self, action: Action) -> Action | None:
        """The action of another stage that reads an action's result: the next stage's forward, or the previous stage's
        backward; None if there is none."""
        if action.kind == "F":
            last = action.stage + 1 == self.stages
            return None if last else Action(action.stage + 1, action.microbatch, "F")
        return None if action.kind == "W" or not action.stage else self.backward(action.stage - 1, action.microbatch)

    def backward(self, stage: int, microbatch: int) -> Action:
        """The action that computes the gradients of a stage's inputs: the whole backward, or its first part."""
        divided = Action(stage, microbatch, "I")
        return divided if divided in self._actions else Action(stage, microbatch, "B")

    def returns(self, stage: int) -> bool:
        """Whether each backward of a stage is on the rank of its forward, so that nothing it reads is sent for it."""
        each = ((Action(stage, m, "F"), self.backward(stage, m)) for m in range(self.microbatches))
        return all(self.runner(forward) == self.runner(backward) for forward, backward in each)

    @cached_property
    def sums_received(self) -> list[list[int]]:
        """By rank and stage, from how many other ranks it receives their parts of the stage's gradients."""
        every, found = range(len(self.ranks)), [[0] * self.stages for _ in self.ranks]
        runs = [set(self.stages_of(rank)) for rank in every]
        adds = [{action.stage for action in actions if action.kind in "BW"} for actions in self.ranks]
        for rank in every:
            for stage in runs[rank]:
                found[rank][stage] = sum(other != rank and stage in adds[other] for other in every)
        return found

    @cached_property
    def trains(self) -> bool:
        """Whether there are backwards."""
        return any(action.kind != "F" for action in self._actions)

    @cached_property
    def splits_backward(self) -> bool:
        """Whether backwards are split in two."""
        return any(action.kind in "IW" for action in self._actions)

    @cached_property
    def _turns(self) -> list[int]:
        reached, done, before = [0] * len(self.ranks), set[Action](), -1
        while before < len(done):
            before = len(done)
            for rank, actions in enumerate(self.ranks):
                end = _first_complete(actions)
                while reached[rank] < end and done.issuperset(self.needs(actions[reached[rank]])):
                    done.add(actions[reached[rank]])
                    reached[rank] += 1
        return reached

    @cached_property
    def _actions(self) -> frozenset[Action]:
        return frozenset(action for actions in self.ranks for action in actions)

    @cached_property
    def _rank_by_action(self) -> dict[Action, int]:
        return {action: rank for rank, actions in enumerate(self.ranks) for action in actions}

    @cached_property
    def _rank_by_stage(self) -> dict[int, int]:
        return {action.stage: rank for rank, actions in enumerate(self.ranks) for action in actions}

    def __str__(self) -> str:
        lines = (f"rank {rank}: {' '.join(map(str, actions))}".rstrip() for rank, actions in enumerate(self.ranks))
        header = f"{self.name} stages={self.stages} microbatches={self.microbatches}"
        return "\n".join([header + (" weights=host" if self.weights == "host" else ""), *lines])

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """The inverse of str(schedule). Raises ValueError, with the line, on anything else."""
        lines = [line.strip() for line in text.strip().splitlines()]
        header = _HEADER.fullmatch(lines[0]) if lines else None
        if header is None:
            found = repr(lines[0]) if lines else "nothing"
            raise ValueError(f"line 1: {found}, expected a header such as '1f1b stages=2 microbatches=4'")
        ranks = tuple(_parse_rank(line, rank) for rank, line in enumerate(lines[1:]))
        return cls(header[1], int(header[2]), int(header[3]), ranks, "host" if header[4] else "rank")


def _first_complete(actions: tuple[Action, ...]) -> int:
    """The index of the first action that completes a stage's weight gradients."""
    last = {action.stage: i for i, action in enumerate(actions) if action.kind in "BW"}
    return min(last.values(), default=len(actions))


def _parse_rank(line: str, rank: int) -> tuple[Action, ...]:
    where, found = f"line {rank + 2}", _RANK.fullmatch(line)
    if found is None or int(found[1]) != rank:
        raise ValueError(f"{where}: {line!r}, expected 'rank {rank}:' and its actions")
    try:
        return tuple(map(Action.parse, found[2].split()))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
