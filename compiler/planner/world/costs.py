"""The cost of a way to share the work: seconds of each stage for one microbatch, bytes of each rank, and the step.

It models the real programs by closed formulas: a block's costs are scaled to the examples in a microbatch and divided
by the processes that share them; exchanges are rings. What overlaps with compute counts only as far as it takes longer.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ....runtime.isa.schedule import ROUND_ROBIN, Schedule
from ...rates.clusters import Link
from ..pipeline.round_robin import round_robin
from ..pipeline.schedules import Shape, make_schedule
from ..pipeline.simulate import Simulated, StageCosts, simulate
from .model import Model
from .units import Unit
from .ways import Way, in_flight
from .world import World

SLOT_BLOCKS = 4
"""The number of blocks per slot of a round-robin rank: it holds their weights at the same time."""

REMAINDER_BYTES, SUM_BYTES = 2, 4
"""Bytes per parameter: what a 16-bit weight lacks of its master, and an element of a float32 sum."""


@dataclass(frozen=True)
class Stages:
    """Costs of one microbatch on one process, by stage."""

    forward_s: np.ndarray  # of the forward, without exchanges
    input_s: np.ndarray  # of the gradients of inputs, without exchanges
    weight_s: np.ndarray  # of the gradients of weights
    exchange_s: np.ndarray  # of a forward's exchanges between tensor-parallel processes
    message_bytes: np.ndarray  # sent to the next stage; 0 for the last
    kept_bytes: np.ndarray  # activations kept for the backward
    given_bytes: np.ndarray  # the same if every block is recomputed
    block_bytes: np.ndarray  # activations kept by the largest block
    numel: np.ndarray  # elements of all parameters
    block_numel: np.ndarray  # elements of the largest block's parameters
    trained_numel: np.ndarray  # as `numel`, of trained parameters
    block_trained_numel: np.ndarray  # as `block_numel`, of trained parameters


@dataclass(frozen=True)
class Priced:
    """A way and its costs."""

    way: Way
    step_s: float  # by the formulas or, if `simulated`, on the clock
    bubble: float  # the share of all ranks' time in which they are idle
    exchange_s: float  # seconds of exchanges, hidden or not, of the rank with most
    device_bytes: int  # of the rank that takes most
    host_bytes: int  # of the rank that takes most of its share of the host
    rank_bytes: tuple[int, ...]  # device bytes of each rank of the pipeline
    tail_s: tuple[float, ...]  # of each rank after its last backward: the rest of reductions, and updates
    simulated: Simulated | None = None


class Costs:
    """Prices ways for one model and world. What several ways have in common is computed once."""

    def __init__(self, model: Model, world: World) -> None:
        self.model, self.world, self.rates, self.cluster = model, world, world.rates, world.cluster
        self._unit_s: dict[tuple[int, float, int, int], tuple[float, ...]] = {}
        self._stages: dict[Way, Stages] = {}

    # -- a way ---------------------------------------------------------------------------------------------

    def priced(self, way: Way) -> Priced | None:
        """Prices a way by the closed formulas, with the smallest share of recomputed blocks that fits, if any does."""
        costed = Costed(self, way, self.stages(way))
        if self.world.host_bytes is not None and costed.host_bytes > self.world.host_bytes:
            return None
        for share in self.world.recomputed if way.schedule != ROUND_ROBIN else (1.0,):
            found = replace(costed, way=replace(way, recompute=share)) if share else costed
            if self.world.device_bytes is None or found.rank_bytes.max() <= self.world.device_bytes:
                return found.priced()
        return None

    def least_bytes(self, way: Way) -> int:
        """Bytes of the fullest device when as many blocks as allowed are recomputed."""
        return int(Costed(self, replace(way, recompute=self.world.recomputed[-1]), self.stages(way)).rank_bytes.max())

    def simulated(self, way: Way) -> Priced:
        """Prices a way by simulating its schedule, with the share of recomputed blocks that the way says."""
        return Costed(self, way, self.stages(way)).on_the_clock()

    # -- its stages ----------------------------------------------------------------------------------------

    def stages(self, way: Way) -> Stages:
        """A way's stages, cached by what they depend on: their number, the size of microbatches, and tensors'
        sharding."""
        key = replace(way, schedule="", recompute=0.0, zero=0, home="device", stages_per_rank=1, pipeline=way.stages)
        if key not in self._stages:
            self._stages[key] = self._cut(key)
        return self._stages[key]

    def _cut(self, way: Way) -> Stages:
        parts, units = self.model.parts, self.model.units
        begins = list(self.model.cuts(way.stages, self.rates))
        rows = self.world.examples / way.data / way.microbatches / units.examples
        shared = 1 if way.mode in ("", "1d") else way.tensor
        each = np.array([np.sum([self._of_unit(unit, rows, way) for unit in part], axis=0) for part in parts])
        seconds = np.add.reduceat(each, begins)
        kept = np.array([[sum(self._kept(unit, rows, way) for unit in part[i:]) for i in (0, 1)] for part in parts])
        given = kept[:, 1] + np.array([part[0].given_bytes for part in parts]) * rows / shared
        crossing = np.array([part[0].crossing_bytes for part in parts]) * rows / shared
        ends = [*begins[1:], len(parts)]
        bounds = list(zip(begins, ends, strict=True))
        numel = np.array([(self.model.numel(*each), self.model.trained_numel(*each)) for each in bounds]) / way.parts
        blocks = np.array([np.max([(unit.numel, unit.trained_numel) for unit in part], axis=0) for part in parts])
        largest = np.maximum.reduceat(blocks, begins) / way.parts
        forward_s, input_s, weight_s, exchange_s = seconds.T
        return Stages(
            forward_s,
            input_s,
            weight_s,
            exchange_s,
            message_bytes=np.append(crossing[begins[1:]], 0.0),
            kept_bytes=np.add.reduceat(kept[:, 0], begins),
            given_bytes=np.add.reduceat(given, begins),
            block_bytes=np.maximum.reduceat(kept[:, 0] - kept[:, 1], begins),
            numel=numel[:, 0],
            block_numel=largest[:, 0],
            trained_numel=numel[:, 1],
            block_trained_numel=largest[:, 1],
        )

    def _of_unit(self, unit: Unit, rows: float, way: Way) -> tuple[float, ...]:
        """Seconds of a unit's forward, of its gradients of inputs and of weights, and of its forward's exchanges."""
        wide = 1 if way.mode in ("", "1d") else way.tensor
        key = id(unit), rows, way.tensor, wide
        if key not in self._unit_s:
            self._unit_s[key] = tuple(
                sum(count * each.seconds(self.rates, rows, way.tensor, wide) for each, count in unit.work[kind].items())
                for kind in ("F", "I", "W")
            )
        return (*self._unit_s[key], self._exchange_s(unit, rows, way))

    def _kept(self, unit: Unit, rows: float, way: Way) -> float:
        """Bytes that a unit keeps for the backward. Logits count twice, with their gradients, unless the loss is
        fused."""
        logits = 0 if way.tensor == 1 and self.world.fuses else 2 * unit.logits_bytes
        wide = unit.kept_wide_bytes if way.mode == "1d" else 0
        return rows * (wide + (unit.kept_bytes - wide + logits) / way.tensor)

    def _exchange_s(self, unit: Unit, rows: float, way: Way) -> float:
        """Seconds of the exchanges in a unit's forward, between the processes that share tensors."""
        if way.tensor == 1:
            return 0.0
        link = self.cluster.ring(1, way.tensor)
        if way.mode == "1d":
            received = 2 * (way.tensor - 1) / way.tensor * self.model.units.wide_bytes * rows
            return link.seconds(unit.sums, unit.sums * received)
        weights = unit.product_weights * self.model.units.weight_bytes / way.parts
        return link.seconds(2 * unit.products, (way.side - 1) * (unit.product_bytes * rows / way.tensor + weights))


@dataclass(frozen=True)
class Costed:
    """A way with its stages, from which bytes and seconds follow."""

    costs: Costs
    way: Way
    stages: Stages

    @cached_property
    def of_rank(self) -> np.ndarray:
        """The stages of each rank, of shape (ranks, stages per rank). With zbv the second one is counted from the other
        end; in a round-robin schedule every rank may run all stages."""
        if self.takes_turns:
            return np.tile(np.arange(self.way.stages), (self.way.pipeline, 1))
        found = np.arange(self.way.stages).reshape(self.way.stages_per_rank, self.way.pipeline)
        if self.way.schedule == "zbv":
            found[1] = found[1, ::-1]
        return found.T

    @property
    def takes_turns(self) -> bool:
        """Whether the schedule is round-robin: ranks take turns in all stages."""
        return self.way.schedule == ROUND_ROBIN

    def _by_rank(self, of_stages: np.ndarray) -> np.ndarray:
        return of_stages[self.of_rank].sum(axis=1) / (self.way.pipeline if self.takes_turns else 1)

    @cached_property
    def numel(self) -> np.ndarray:
        """Elements of parameters, by rank."""
        return self._copies * self._by_rank(self.stages.numel)

    @cached_property
    def trained_numel(self) -> np.ndarray:
        """Elements of trained parameters, by rank."""
        return self._copies * self._by_rank(self.stages.trained_numel)

    @property
    def _copies(self) -> int:
        """Copies of a parameter along the pipeline: in round-robin one for forwards and one for backwards."""
        return 2 if self.takes_turns else 1

    # -- bytes ---------------------------------------------------------------------------------------------

    @cached_property
    def rank_bytes(self) -> np.ndarray:
        """The peak of each pipeline rank's device, including what is not tensors."""
        return self.costs.world.reserve_bytes + self._held() + self._working()

    @cached_property
    def host_bytes(self) -> int:
        """Host bytes of the rank that holds most there."""
        if self.way.home == "device":
            return 0
        zero, replicas = self.way.zero, self.way.replicas
        trained = self.trained_numel * (2 * self._item + self._state) / (replicas if zero else 1)
        frozen = (self.numel - self.trained_numel) * self._item / (replicas if zero == 3 else 1)
        return int((trained + frozen).max())

    @property
    def _item(self) -> int:
        return self.costs.model.units.weight_bytes

    @property
    def _state(self) -> int:
        """Bytes of training state per parameter, besides the weight that computes."""
        return self.costs.world.optimizer_state_bytes + (REMAINDER_BYTES if self._item == 2 else 0)

    def _held(self) -> np.ndarray:
        """Bytes held throughout: weights, gradients and states, or, with states on the host, two blocks' weights and
        gradients; and two blocks that are being exchanged."""
        way = self.way
        passing = self._passing(self.stages.block_numel)
        gradients_passing = self._passing(self.stages.block_trained_numel)
        exchanged = (passing if way.zero == 3 else gradients_passing) if way.replicas > 1 else 0.0
        if way.home == "host":
            return passing + gradients_passing + exchanged
        weights = self._shared(self.numel * self._item, passing, way.zero == 3)
        gradients = self._shared(self.trained_numel * self._item, gradients_passing, way.zero > 0)
        states = self.trained_numel * self._state / (way.replicas if way.zero else 1)
        return weights + gradients + states + exchanged

    def _passing(self, block_numel: np.ndarray) -> np.ndarray:
        """Bytes of the blocks that a rank holds at a time where they come and go: the largest two, or two slots."""
        blocks = 2 * (SLOT_BLOCKS if self.takes_turns else 1)
        return blocks * self._item * block_numel[self.of_rank].max(axis=1)

    def _shared(self, num_bytes: np.ndarray, passing: np.ndarray, is_divided: bool) -> np.ndarray:
        """Bytes that each process holds: all, or, where replicas divide them, its share and the blocks in use."""
        return num_bytes / self.way.replicas + passing if is_divided else num_bytes

    def _working(self) -> np.ndarray:
        """Bytes of a group's batch, of activations of all microbatches in flight, and of a block being recomputed."""
        model, stages, share = self.costs.model, self.stages, self.way.recompute
        given = model.input_bytes * self.costs.world.examples / self.way.data / model.units.examples
        kept = self._by_rank(stages.kept_bytes + share * (stages.given_bytes - stages.kept_bytes))
        again = stages.block_bytes[self.of_rank].max(axis=1) if share else 0.0
        return given + in_flight(self.way) * kept / self.way.stages_per_rank + again

    # -- seconds -------------------------------------------------------------------------------------------

    @cached_property
    def _parts_s(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Seconds of each stage, exchanges and fetches included: forward, input gradients, weight gradients, whole
        backward, and message to the next stage."""
        way, stages, gather_s = self.way, self.stages, self._gather_s
        forward_s = stages.forward_s + stages.exchange_s
        again_s = way.recompute * forward_s
        again_s[-1] *= not self.takes_turns  # the last stage's backward follows its forward at once
        input_s = stages.input_s + self._back * stages.exchange_s + again_s
        backward_s = self._beside(input_s + stages.weight_s, gather_s)
        message_s = self._hop.latency_s + stages.message_bytes / self._hop.bytes_per_s
        return self._beside(forward_s, gather_s), backward_s - stages.weight_s, stages.weight_s, backward_s, message_s

    @property
    def _hop(self) -> Link:
        """The link between ranks of the pipeline."""
        return self.costs.cluster.hop(self.way.tensor * self.way.data, self.way.pipeline)

    @property
    def _back(self) -> int:
        """How many times as long a backward's exchanges take as a forward's: twice where weights are gathered."""
        return 2 if self.way.mode in ("2d", "2.5d") else 1

    def _beside(self, compute_s: np.ndarray, other_s: np.ndarray) -> np.ndarray:
        return np.maximum(compute_s, other_s) if self.costs.rates.overlaps else compute_s + other_s

    @cached_property
    def _gather_s(self) -> np.ndarray:
        """Seconds per stage and microbatch to gather weights from other ranks' shards and to fetch them from the host.
        Without a pipeline, or in round-robin, a block runs all microbatches at once and divides the time between
        them."""
        way, weights = self.way, self.stages.numel * self._item
        times = way.microbatches if way.pipeline == 1 or self.takes_turns else 1
        network_s = weights * (1 - 1 / way.replicas) / self._replicas.bytes_per_s if way.zero == 3 else 0.0
        share = weights / way.replicas if way.zero == 3 else weights
        bus_s = share / self.costs.rates.both_bytes_per_s if way.home == "host" else 0.0
        return np.maximum(network_s, bus_s) / times + np.zeros(way.stages)

    @property
    def _replicas(self) -> Link:
        """The link over which processes with the same weights exchange."""
        return self.costs.cluster.ring(self.way.parts, self.way.replicas)

    @cached_property
    def stage_costs(self) -> tuple[StageCosts, ...]:
        return tuple(
            StageCosts(float(forward), float(input), float(weight), float(backward), float(message))
            for forward, input, weight, backward, message in zip(*self._parts_s, strict=True)
        )

    def priced(self) -> Priced:
        """Prices the way by closed formulas: the slowest rank works except while the pipeline fills and drains."""
        forward_s, _, _, backward_s, _ = self._parts_s
        work_s = self.way.microbatches * self._by_rank(forward_s + backward_s)
        running_s = float(work_s.max()) + self._ramp_s()
        bubble = 1 - float(work_s.mean()) / running_s if running_s else 0.0
        return self._priced(running_s, bubble)

    def on_the_clock(self) -> Priced:
        way = self.way
        if self.takes_turns:
            schedule = round_robin(self.stage_costs, way.pipeline, way.microbatches)
        else:
            shape = Shape(way.pipeline, way.microbatches, way.stages_per_rank)
            schedule = make_schedule(way.schedule or "gpipe", shape)
        run = simulate(schedule, self.stage_costs)
        return replace(self._priced(run.step_s, run.bubble, self._sums_s(schedule)), simulated=run)

    def _sums_s(self, schedule: Schedule) -> np.ndarray:
        """Seconds in which each rank receives other ranks' sums of gradients, of stages that it runs, too."""
        parts = np.array(schedule.sums_received) @ self.stages.trained_numel
        return parts * SUM_BYTES / self._hop.bytes_per_s

    def _priced(self, running_s: float, bubble: float, sums_s: np.ndarray | float = 0.0) -> Priced:
        tail_s, rank_bytes = tuple(map(float, self._tail_s(sums_s))), tuple(map(int, self.rank_bytes))
        return Priced(
            self.way, running_s + max(tail_s), bubble, float((self._exchange_s() + sums_s).max()), max(rank_bytes),
            self.host_bytes, rank_bytes, tail_s,
        )  # fmt: skip

    def _ramp_s(self) -> float:
        """Seconds that the first microbatch needs to pass all stages and come back, beyond the slowest rank's work."""
        way, (forward_s, input_s, weight_s, backward_s, message_s) = self.way, self._parts_s
        if way.pipeline == 1:
            return 0.0
        messages_s = 2 * float(message_s[:-1].sum())
        whole_s = forward_s + backward_s
        if self.takes_turns:
            return (way.pipeline - 1) * float(whole_s.max() + message_s.max())
        if way.schedule in ("1f1b", "interleaved"):
            ramp_s = float(whole_s.sum() - self._by_rank(whole_s).max())
        else:
            hidden_s = weight_s.sum() * (2 if way.schedule == "zbv" else 1)
            least_s = forward_s.sum() / 4 if way.schedule == "zbv" else 0.0
            ramp_s = (1 - 1 / way.pipeline) * max(float(forward_s.sum() + input_s.sum() - hidden_s), float(least_s))
        return (ramp_s + messages_s) / way.stages_per_rank

    def _tail_s(self, sums_s: np.ndarray | float) -> np.ndarray:
        """Seconds of each rank after its last backward: the rest of reducing gradients, and updates. Sums of other
        ranks come one by one, beside backwards, and the host updates by one while the next comes."""
        way, rates, (forward_s, *_, backward_s, _) = self.way, self.costs.rates, self._parts_s
        last = way.microbatches if way.pipeline == 1 else 1
        hidden_s = last * self._by_rank(backward_s) if rates.overlaps else 0.0
        left_s = np.maximum(self._reduce_s() - hidden_s, 0.0)
        updated = self.trained_numel / (way.replicas if way.zero else 1)
        if way.home == "device":
            return left_s + sums_s + updated / rates.device_params_per_s
        update_s = updated / rates.host_params_per_s + updated * self._item / rates.both_bytes_per_s
        if not rates.overlaps:
            return left_s + sums_s + update_s
        sums_s = sums_s - way.microbatches * self._by_rank(backward_s)
        update_s = update_s - way.microbatches * self._by_rank(forward_s)
        return left_s + np.maximum(np.maximum(update_s, sums_s), 0.0)

    def _reduce_s(self) -> np.ndarray:
        """Seconds of each rank to reduce gradients over replicas and, with ZeRO 1 and 2, to gather new weights."""
        way = self.way
        if way.replicas == 1:
            return np.zeros(way.pipeline)
        item = SUM_BYTES if self.costs.world.reduce_dtype == "fp32" else self._item
        back = self._item if way.zero in (1, 2) else 0
        received = self.trained_numel * (1 - 1 / way.replicas) * (item * (1 if way.zero else 2) + back)
        return 2 * self._replicas.latency_s + received / self._replicas.bytes_per_s

    def _exchange_s(self) -> np.ndarray:
        """Seconds of all exchanges of each rank in a step, hidden or not."""
        way, message_s = self.way, self._parts_s[-1]
        each_s = self._by_rank(self.stages.exchange_s) * (1 + self._back + way.recompute)
        each_s = each_s + (2 * self._by_rank(message_s) if way.pipeline > 1 else 0.0)
        gathered_s = 2 * self._by_rank(self._gather_s) if way.zero == 3 else 0.0
        return way.microbatches * (each_s + gathered_s) + self._reduce_s()
