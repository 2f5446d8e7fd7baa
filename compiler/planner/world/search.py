"""The choice of a way: all that fit the memory are ranked by the closed formulas, and the best are simulated."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ....runtime.isa.errors import BudgetError
from ....runtime.isa.units import format_bytes, format_seconds
from .costs import Costs, Priced
from .model import Model
from .ways import Home, Space, Way
from .world import World

CONFIRMED = 24
"""At most this many of the best by the formulas are simulated, and no more than `MOST_FORWARDS` forwards in all."""

MOST_FORWARDS = 2**16
TOLD = 5
"""The number of other ways to report beside the chosen one, each with different degrees."""

MOST_REFUSED = 8
"""At most this many ways are given up because their whole programs turn out not to run; each takes a compilation."""

TIE = 0.01
"""Ways within this share of the fastest count as equally fast, and the simplest of them is chosen."""


@dataclass(frozen=True)
class WorldPlan:
    """How a world shares the work.

    Fields:
        chosen: the way that is taken.
        others: the next best ways with different degrees, the fastest first.
        weighed, fitting: the numbers of ways that were weighed, and of those that fit the memory.
        fallbacks: a way for each other set of compile options, the fastest first.
        notes: the ways that were given up so far, and why.
    """

    world: World
    chosen: Priced
    others: tuple[Priced, ...]
    weighed: int
    fitting: int
    fallbacks: tuple[Priced, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def examples_per_group(self) -> int:
        """Examples of a step for each group of processes that share a batch."""
        return self.world.examples // self.chosen.way.data

    def lines(self) -> tuple[str, ...]:
        """The lines that a plan prints about it, the chosen way first."""
        size, cluster = self.world.cluster.size, self.world.cluster
        groups = f"{self.chosen.way.data} group(s) of processes pass {self.examples_per_group} example(s) a step each"
        return (
            f"of {size} processes on {cluster}, {self.fitting:,} of {self.weighed:,} ways to share the work fit: "
            f"{told(self.chosen)}; {groups}",
            *(f"the next best for {size} processes: {told(other)}" for other in self.others),
            *self.notes,
        )

    def without_chosen(self, why: str, of_memory: bool, needed_bytes: int) -> "WorldPlan | None":
        """The plan with the next best way instead of the chosen one; None if there is none, or too many were given up.

        `why` is the refusal of the chosen way's whole program. If the refusal is `of_memory`, the replacement takes
        proportionally less device memory: `needed_bytes` is what the whole program needs (0: unknown). Otherwise it is
        preferably one that divides the model differently.
        """
        if not self.fallbacks or len(self.notes) == MOST_REFUSED:
            return None
        by_kind = lambda one: (_kind(one.way) == _kind(self.chosen.way), one.step_s)  # noqa: E731
        chosen = min(self.fallbacks, key=self._priority(needed_bytes) if of_memory else by_kind)
        note = f"not taken: {self.chosen.way}, whose complete program was refused: {why}"
        return replace(
            self,
            chosen=chosen,
            others=tuple(other for other in self.others if other.way.options() != chosen.way.options()),
            fallbacks=tuple(other for other in self.fallbacks if other is not chosen),
            notes=(*self.notes, note),
        )

    def _priority(self, needed_bytes: int) -> Callable[[Priced], tuple[float, float]]:
        """A sort key: ways that take little enough memory first, by time, and the others behind them, by memory."""
        budget, most_bytes = self.world.device_bytes, float(self.chosen.device_bytes)
        if budget is not None and needed_bytes > budget:
            most_bytes *= budget / needed_bytes
        return lambda one: (one.device_bytes if one.device_bytes >= most_bytes else 0, one.step_s)

    def __str__(self) -> str:
        return "\n".join(self.lines())


def told(priced: Priced) -> str:
    """A way and its costs, in words."""
    host = f", {format_bytes(priced.host_bytes)} on the host" if priced.host_bytes else ""
    return (
        f"{priced.way}: a step of {format_seconds(priced.step_s)}, bubble {priced.bubble:.1%}, communication "
        f"{format_seconds(priced.exchange_s)}, {format_bytes(priced.device_bytes)} a device{host}"
    )


def choose(model: Model, world: World, space: Space) -> WorldPlan:
    """The fastest way that fits. Raises BudgetError where none does, naming the one that takes least."""
    costs, ways = Costs(model, world), list(space.ways())
    fitting = [found for way in ways if (found := costs.priced(way)) is not None]
    if not fitting:
        raise _refusal(model, world, ways)
    order = {_unsettled(way): i for i, way in enumerate(ways)}
    confirmed = sorted(confirm(costs, fitting), key=lambda found: found.step_s)
    tied = [found for found in confirmed if found.step_s <= (1 + TIE) * confirmed[0].step_s]
    chosen = min(
        tied, key=lambda found: (found.way.home != "device", found.way.recompute, order[_unsettled(found.way)])
    )
    known = {_degrees(one): one for one in (*reversed(confirmed), chosen)}
    ranked = _of_each_degrees(sorted(fitting, key=lambda one: one.step_s))
    unknown = [one for one in ranked if _degrees(one) not in known][: max(0, TOLD + 1 - len(known))]
    others = [*(one for one in known.values() if one is not chosen), *(costs.simulated(one.way) for one in unknown)]
    others = sorted(others, key=lambda one: one.step_s)[:TOLD]
    fallbacks = _of_other_programs([*confirmed, *others, *fitting], chosen)
    return WorldPlan(world, chosen, tuple(others), len(ways), len(fitting), fallbacks)


def weigh(model: Model, world: World, way: Way, homes: Iterable[Home]) -> Priced:
    """Simulates one way, with states in the first of the homes that fits. Raises BudgetError where none does."""
    costs, ways = Costs(model, world), [replace(way, home=home) for home in homes]
    found = next((priced for each in ways if (priced := costs.priced(each)) is not None), None)
    if found is None:
        raise _refusal(model, world, ways)
    return costs.simulated(found.way)


def confirm(costs: Costs, fitting: list[Priced]) -> list[Priced]:
    """The best of the fitting ways, simulated."""
    found, forwards = list[Priced](), 0
    for priced in sorted(fitting, key=lambda priced: priced.step_s)[:CONFIRMED]:
        forwards += priced.way.stages * priced.way.microbatches if priced.way.pipeline > 1 else 0
        if found and forwards > MOST_FORWARDS:
            break
        found.append(costs.simulated(priced.way))
    return found


def _unsettled(way: Way) -> Way:
    """The way without the choice that follows from the memory it leaves: the share of recomputed blocks."""
    return replace(way, recompute=0.0)


def _degrees(priced: Priced) -> tuple[object, ...]:
    way = priced.way
    return way.data, way.pipeline, way.mode, way.tensor, way.depth, way.home


def _of_each_degrees(ranked: Iterable[Priced]) -> list[Priced]:
    """The first way with each combination of degrees."""
    found: dict[tuple[object, ...], Priced] = {}
    for priced in ranked:
        found.setdefault(_degrees(priced), priced)
    return list(found.values())


def _kind(way: Way) -> tuple[bool, str]:
    """What a way divides: layers, and tensors by a mode."""
    return way.pipeline > 1, way.mode


def _of_other_programs(found: Iterable[Priced], chosen: Priced) -> tuple[Priced, ...]:
    """The first way for each set of compile options other than the chosen one's, the fastest first."""
    programs = {str(chosen.way.options()): chosen}
    for priced in found:
        programs.setdefault(str(priced.way.options()), priced)
    return tuple(sorted(list(programs.values())[1:], key=lambda one: one.step_s))


def _refusal(model: Model, world: World, ways: list[Way]) -> BudgetError:
    costs = Costs(model, world)
    least = min(((costs.least_bytes(way), str(way)) for way in ways), default=None)
    budget = "no limit" if world.device_bytes is None else format_bytes(world.device_bytes)
    host = "" if world.host_bytes is None else f" and {format_bytes(world.host_bytes)} of the host"
    if least is None:
        return BudgetError(
            f"there is no way to divide a step of {world.examples} examples over {world.cluster.size} processes; make "
            "the number of examples divisible by the number of processes, or choose parallel= yourself"
        )
    return BudgetError(
        f"none of {len(ways):,} ways to share the work over {world.cluster.size} processes on {world.cluster} fits "
        f"{budget} per device{host}, judging by its blocks; {least[1]} needs the least memory per device, "
        f"{format_bytes(least[0])}: raise device_budget= or host_budget=, pass smaller batches, plan for more "
        "processes, or choose parallel= yourself to have the complete program planned",
        least[0],
        "device",
    )
