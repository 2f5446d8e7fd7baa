"""Failures in a step: wherever one falls, the step may be made again and training ends with the bits of one that was
not disturbed, or every further step is refused with what to do; and no bytes stay booked."""

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import geminifx
import pytest
import torch
import torch.nn.functional as F
from geminifx.runtime.isa.errors import GeminiError, StateError
from geminifx.runtime.isa.instructions import INSTRUCTIONS
from geminifx.runtime.memory.hardware import Hardware
from geminifx.runtime.memory.streams import ImmediateCopies
from geminifx.runtime.memory.tiers import Tier
from geminifx.runtime.optimizer.chunk_optimizer import ChunkOptimizer
from geminifx.runtime.optimizer.gradients import HeldGradients
from geminifx.runtime.optimizer.updater import Updater
from geminifx.runtime.optimizer.worker import Ticket
from interrupts import Failure, in_lines
from torch import Tensor, nn
from torch.optim import AdamW

SIZE = 400
STEPS = 3
PHASES = ("forward", "backward", "clip", "step", "zero_grad", "evaluation")
ERRORS = (KeyboardInterrupt, torch.cuda.OutOfMemoryError, RuntimeError)
FOR_GOOD = "build the model again and load the last checkpoint"
FILES = ("runtime/executor.py", "runtime/machine.py", "runtime/memory/*.py", "runtime/optimizer/*.py",
         "compiler/calls.py", "compiler/session.py", "compiler/weights/values.py")  # fmt: skip
LINES = {str(file) for name in FILES for file in Path(geminifx.__path__[0]).glob(name)}
"""Files of which any line may be the one that Ctrl-C falls into."""

FUNCTIONS: dict[str, list[tuple[type, str]]] = {
    "copy": [(ImmediateCopies, name) for name in ("to_device", "to_host", "all_to_device", "all_to_host")],
    "allocation": [(Tier, "watch"), (Tier, "book"), (Hardware, "zeros")],
    "job": [(Updater, "_update_on_host"), (HeldGradients, "_add_on_host")],
    "callback": [(ChunkOptimizer, "_hyper"), (ChunkOptimizer, "_check_groups"), (Ticket, "then"), (Ticket, "complete")],
}
"""Where else it fails, besides at an instruction of a program and in any line."""


def network() -> nn.Module:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(48, 48), nn.GELU(), nn.Dropout(0.1)) for _ in range(4))
    return nn.Sequential(*blocks, nn.Linear(48, 3))


def batch_of(number: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(number)
    return torch.randn(8, 48), torch.randint(3, (8,))


@dataclass(frozen=True)
class Way:
    """How a case is trained, and at which calls or lines it may fail."""

    route: str
    placement: str
    accumulate: int
    clip: bool
    site: str

    @classmethod
    def of(cls, chance: random.Random) -> "Way":
        route = chance.choice(["torch's", "ours", "in backward"])
        placement, accumulate = chance.choice(["cuda", "cpu", "auto"]), chance.choice([1, 3])
        clip = route != "in backward" and chance.random() < 0.5
        sites = ["line", "line", "instruction", "allocation"]
        sites += ["copy"] * (placement != "cuda")
        sites += ["job"] * (placement == "cpu" and route != "torch's") + ["callback"] * (route != "torch's")
        return cls(route, placement, accumulate, clip, chance.choice(sites))


@dataclass
class Seen:
    """What a training run shows: losses, and the parameters behind each step."""

    losses: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    evaluations: dict[int, Tensor] = field(default_factory=dict)
    used_bytes: tuple[int, ...] = ()
    passed: dict[tuple[int, str, int], int] = field(default_factory=dict)
    """How many calls or lines could fail, by step, phase and batch."""


class Training:
    """A loop whose phases can be taken one by one, again too."""

    def __init__(self, way: Way, failure: Failure, is_behind: bool = False) -> None:
        self.way, self.failure, self.seen = way, failure, Seen()
        self.patches = ExitStack()
        wrap = failure.behind if is_behind else failure.in_front_of
        for owner, name in FUNCTIONS.get(way.site, ()):
            self.patches.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name))))
        # Of the training state of 1.3 times as many bytes.
        budget = 100_000 if way.placement == "auto" else None
        recompute = "all" if way.accumulate == 1 else "none"
        given = {"placement": way.placement, "recompute": recompute, "device_budget": budget}
        self.model = geminifx.compile(network(), example_inputs=batch_of(0)[:1], **given)
        self.optimizer = self._optimizer()
        self.model.eval()
        with torch.no_grad():
            self.model.prepare(batch_of(0)[0])
        self.model.train()
        if way.site == "instruction":
            for _, compiled in self.model.session._programs.items():
                called = compiled.executor.called
                for name in INSTRUCTIONS:
                    setattr(called, name, wrap(getattr(called, name)))

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.way.route == "torch's":
            return AdamW(self.model.parameters(), lr=0.01, fused=True)
        given = {"accumulate": self.way.accumulate, "in_backward": self.way.route == "in backward"}
        return self.model.optimizer(AdamW, lr=0.01, max_grad_norm=0.1 if self.way.clip else None, **given)

    @contextmanager
    def watched(self, at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> Iterator[None]:
        with self.failure.armed(at, error):
            if self.way.site == "line":
                with in_lines(LINES, self.failure.pass_by):
                    yield
            else:
                yield

    def forward(self, step: int, part: int) -> None:
        torch.manual_seed(10 * step + part)
        x, target = batch_of(10 * step + part)
        self.loss = F.cross_entropy(self.model(x), target)

    def backward(self, step: int, part: int) -> None:
        loss = self.__dict__.pop("loss")
        loss.backward()
        self.seen.losses[step, part] = loss.detach().clone()

    def clip(self, step: int, part: int) -> None:
        if self.way.clip and self.way.route == "torch's":
            self.model.clip_grad_norm_(0.1)

    def step(self, step: int, part: int) -> None:
        self.optimizer.step()

    def zero_grad(self, step: int, part: int) -> None:
        self.optimizer.zero_grad()

    def evaluation(self, step: int, part: int) -> None:
        self.model.eval()
        with torch.no_grad():
            self.seen.evaluations[step] = self.model(batch_of(99)[0])
        self.model.train()

    def phases(self) -> list[tuple[str, int]]:
        """Of a step, with the batch that each is of."""
        parts = [(phase, part) for part in range(self.way.accumulate) for phase in ("forward", "backward")]
        return [*parts, *((phase, 0) for phase in PHASES[2:])]

    def take(self, step: int, begin: int = 0, end: int | None = None) -> None:
        for phase, part in self.phases()[begin:end]:
            getattr(self, phase)(step, part)
        if end is None:
            self.seen.weights.append(self.weights())

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def end(self) -> Seen:
        self.patches.close()
        self.seen.used_bytes = tuple(tier.used_bytes for tier in self.model.session.hardware.tiers)
        return self.seen


@cache
def undisturbed(way: Way) -> Seen:
    training = Training(way, Failure())
    for step in range(STEPS):
        for phase, part in training.phases():
            with training.watched():
                getattr(training, phase)(step, part)
            training.seen.passed[step, phase, part] = training.failure.count
        training.seen.weights.append(training.weights())
    return training.end()


def fails(training: Training, place: tuple[int, str, int], at: int, error: type[BaseException]) -> bool:
    """Take one phase, in which something is to fail; whether it is heard of."""
    step, phase, part = place
    with training.watched(at, error):
        try:
            getattr(training, phase)(step, part)
        except (error, GeminiError):
            return True
    return False


def recover(training: Training, step: int, failed: int, again: bool, expected: Seen) -> None:
    """Go on behind a failure in phase number `failed` of the step, as a user may: take that phase again, or the step
    from its beginning. Raises StateError where steps are refused for good."""
    phase, _ = training.phases()[failed]
    if phase in ("zero_grad", "evaluation"):
        training.take(step, failed)
    elif phase == "step" and same(training.weights(), expected.weights[step]):
        # It was done, but for its last line; with in_backward=True it still has to be called.
        training.take(step, failed if training.way.route == "in backward" else failed + 1)
    elif not (again and phase in ("forward", "backward") and may_come_again(training, step, failed)):
        training.optimizer.zero_grad()
        training.take(step)


def may_come_again(training: Training, step: int, failed: int) -> bool:
    """Whether the batch's forward and backward are taken again, without more ado, and all that follows."""
    try:
        training.take(step, failed - (training.phases()[failed][0] == "backward"))
    except StateError as refused:
        if FOR_GOOD in str(refused):
            raise
        assert "call zero_grad()" in str(refused), refused
        return False
    return True


def same(found: Mapping[Any, Tensor], expected: Mapping[Any, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())


def check_refused(training: Training) -> None:
    """No step comes to its end any more, and each says why."""
    for _ in range(2):
        with pytest.raises(StateError, match=FOR_GOOD):
            training.take(STEPS)


def check(number: int) -> str:
    """How a case ended: "made again" or "refused"."""
    chance = random.Random(number)
    way, is_behind, again = Way.of(chance), chance.random() < 0.5, chance.random() < 0.5
    expected = undisturbed(way)
    places = {place: count for place, count in expected.passed.items() if count}
    phase = chance.choice(sorted({place[1] for place in places}))
    failing, _, part = place = chance.choice(sorted(place for place in places if place[1] == phase))
    error = KeyboardInterrupt if way.site == "line" else chance.choice(ERRORS[1:] if way.site == "job" else ERRORS)
    training = Training(way, Failure(), is_behind)
    failed = training.phases().index((phase, part))
    # A forward that the planner placed runs again by itself, with less on the device.
    is_absorbed = way.placement == "auto" and phase == "forward" and error is torch.cuda.OutOfMemoryError
    at = chance.randrange(places[place])
    told = f"{way}, {error.__name__} in {place} at {at} of {places[place]}, {is_behind=}, {again=}"
    try:
        for step in range(failing):
            training.take(step)
        training.take(failing, 0, failed)
        if fails(training, place, at, error):
            recover(training, failing, failed, again, expected)
        else:  # what the host's worker does may fail later, or not at all where it has less to do
            assert is_absorbed or way.site in ("job", "copy", "callback"), "it goes on"
            training.take(failing, failed + 1)
        for step in range(failing + 1, STEPS):
            training.take(step)
    except StateError as refused:
        assert FOR_GOOD in str(refused), f"{told}: {refused}"
        check_refused(training)
        return "refused"
    except Exception as raised:
        raised.add_note(told)
        raise
    finally:
        seen = training.end()
    assert all(same(*pair) for pair in zip(seen.weights, expected.weights, strict=True)), told
    assert same(seen.losses, expected.losses) and same(seen.evaluations, expected.evaluations), told
    assert is_absorbed or seen.used_bytes == expected.used_bytes, told
    return "made again"


@pytest.mark.campaign
def test_after_a_failure_the_step_is_made_again_or_every_step_is_refused(cases: Iterator[int]) -> None:
    for number in cases:
        try:
            check(number)
        except BaseException as error:
            error.add_note(f"in case {number}")
            raise
