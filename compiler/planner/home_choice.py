"""Homes for the chunks of a program: as much on the device as fits, and the plans that are one move away."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from ...passes.program.plan import Plan
from ...runtime.isa.homes import Home, Homes, Where, with_home
from ...runtime.isa.layout import ChunkLayout
from .home_program import NOT_CHOSEN, Answer, Assumed, Blocks, HomeProgram
from .memory import Filling, Memory
from .simulate import StepTime

MOST_TIGHTER = 4
"""The integer program is solved at most this many times, each with less room, before it is given up."""

LEAST_GAIN, MOST_MOVES = 0.01, 16
"""A move must shorten the modelled step by this share; at most this many are made."""


@dataclass(frozen=True)
class Move:
    """One chunk moves to a home of a `kind`: all homes after the move, and the seconds of a step with them."""

    kind: str
    what: str
    homes: Homes
    step_s: float


def least(plan: Plan, placed: Homes | None) -> Homes:
    """The homes with the least on the device that the policy allows. States that are already `placed` do not move."""
    cuda = plan.request.policy == "cuda"
    wheres = [Where.DEVICE] if cuda else [Where.HOST, Where.STREAMED]
    may_be = plan.format.wheres
    homes = placed or tuple(
        Home(next(where for where in wheres if where in may_be(chunk))) for chunk in plan.layout.chunks
    )
    stays = [cuda and chunk.shards > 1 and plan.request.zero != 3 for chunk in plan.layout.chunks]
    return tuple(replace(home, resident=stay) for home, stay in zip(homes, stays, strict=True))


def candidates(plan: Plan, memory: Memory, time: StepTime, placed: Homes | None,
               assumed: Sequence[Assumed]) -> list[Homes]:  # fmt: skip
    """Homes to compare: the least ones, these filled up, and the filled-up answers to each of `assumed`."""
    begin = least(plan, placed)
    found = [begin]
    if plan.request.policy == "auto" and memory.fits(begin):
        program = HomeProgram(plan, memory, time, begin, placed is not None)
        answers = [begin, *(answer.homes for each in assumed if (answer := fitting(program, each)) is not None)]
        found = [_filled(plan, memory, homes, placed) for homes in dict.fromkeys(answers)]
    return [*found, *(landing_apart(plan, homes) for homes in found if placed is None)]


def fitting(program: HomeProgram, assumed: Assumed, blocks: Blocks = NOT_CHOSEN) -> Answer | None:
    """The integer program's answer, if it fits as a whole program, whose peak may be a little higher than the integer
    program knows. Where it is, the answer is sought again with that much more left free."""
    spare_bytes = 0
    for _ in range(MOST_TIGHTER):
        answer = program.solve(assumed, blocks, spare_bytes)
        over_bytes = 0 if answer is None else program.over(answer, blocks)
        if over_bytes <= 0:
            return answer
        spare_bytes += over_bytes
    return None


def _filled(plan: Plan, memory: Memory, homes: Homes, placed: Homes | None) -> Homes:
    """Uses up the room that is left, chunk by chunk: first for weights that stay resident, then for whole states."""
    filling = Filling(memory, homes)
    for chunk, home in plan.placed(homes):
        if not home.resident and (plan.request.zero != 3 or chunk.shards == 1):
            filling.move(chunk.index, replace(home, resident=True))
    for index, home in enumerate(tuple(filling.homes) if placed is None else ()):
        if not home.on_device:
            filling.move(index, replace(home, where=Where.DEVICE))
    return tuple(filling.homes)


def landing_apart(plan: Plan, homes: Homes) -> Homes:
    """The same homes, but each chunk's gradients have a landing of their own instead of waiting for a shared one."""
    shares = plan.format.shares_landing
    return tuple(replace(home, lands_apart=True) if shares(chunk, home) else home for chunk, home in plan.placed(homes))


def is_picked(index: int, share: float) -> bool:
    """Whether item `index` is picked when a `share` of all items is picked, evenly spread."""
    return int((index + 1) * share) > int(index * share)


# -- one move away -----------------------------------------------------------------------------------------


def best_nearby(plan: Plan, memory: Memory, time: StepTime, placed: Homes | None) -> tuple[Homes, list[Move]]:
    """The plan's homes after the single-chunk moves that shorten the step, and the moves from there that fit."""
    homes, step_s = plan.homes, plan.estimate.step_s
    for _ in range(MOST_MOVES):
        near = list(_moves(plan, memory, time, homes, placed))
        best = min(near, key=lambda move: move.step_s, default=None)
        if best is None or best.step_s >= (1 - LEAST_GAIN) * step_s:
            return homes, near
        homes, step_s = best.homes, best.step_s
    return homes, []


def _moves(plan: Plan, memory: Memory, time: StepTime, homes: Homes, placed: Homes | None) -> Iterator[Move]:
    """Moves of the first and the last chunk in each group of chunks that are alike and have the same home."""
    if plan.request.policy != "auto":
        return
    alike: dict[tuple[int, torch.dtype, bool, Home], list[ChunkLayout]] = {}
    for chunk, home in plan.placed(homes):
        alike.setdefault((chunk.numel, chunk.dtype, chunk.trainable, home), []).append(chunk)
    for (_, _, _, home), chunks in alike.items():
        for chunk, other in product(dict.fromkeys((chunks[0], chunks[-1])), _elsewhere(plan, chunks[0], home, placed)):
            grown = with_home(homes, chunk.index, other)
            if memory.fits(grown) and not memory.beyond_host(grown):
                what = f"chunk {chunk.index}: {other.text}, not {home.text}"
                yield Move(other.text, what, grown, time.seconds(plan, grown))


def _elsewhere(plan: Plan, chunk: ChunkLayout, home: Home, placed: Homes | None) -> Iterator[Home]:
    """All other homes that the chunk may have."""
    wheres = list(Where) if placed is None else [home.where]
    stays = [False] if plan.request.zero == 3 and chunk.shards > 1 else [False, True]
    for where, stay in product(wheres, stays):
        other = replace(home, where=where, resident=stay)
        is_same = other == home or (where is home.where is Where.DEVICE and chunk.shards == 1)
        if not is_same and where in plan.format.wheres(chunk):
            yield other
