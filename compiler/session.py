"""Session: the state behind a compiled module. It makes programs when they are needed and runs the machine."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from ..models.adapters import blocks, example_inputs
from ..passes.program.plan import Plan
from ..runtime.distributed.local_shards import LocalShards
from ..runtime.distributed.point_to_point import check_messages
from ..runtime.distributed.ranks import Ranks
from ..runtime.executor import Executor
from ..runtime.isa.errors import BudgetError, StateError
from ..runtime.isa.formats import OwnFormat
from ..runtime.isa.precision import parameter_dtypes
from ..runtime.machine import Machine
from ..runtime.memory.lazy_parameter import hooked
from ..runtime.memory.state_store import StateStore
from ..runtime.memory.stats import Stats
from ..runtime.memory.tiers import MemoryMeter
from ..runtime.optimizer.chunk_optimizer import Attach
from ..runtime.state_io.background import Background
from .capture.arguments import check_shared
from .capture.shared_memory import check_trained
from .capture.trace import Captured, CaptureRequest
from .lowering import Lowering
from .memory.device import Device
from .memory.usage import StepUsage
from .options import Options
from .planner.problem import Planning
from .programs.agreement import agreed, all_refuse, is_agreed_on, shared_homes
from .programs.builder import Builder
from .programs.captures import Captures
from .programs.collector import resting_collector
from .programs.guess import of_a_guess
from .programs.kept_captures import KeptCaptures
from .programs.members import Census
from .programs.programs import Call, Compiled, Key, Recent, messages
from .setup import Declaration, Phase, Setup, move
from .weights.half_loaded import HalfLoaded
from .weights.places import Places
from .weights.quantized_weights import quantize_frozen
from .weights.values import check_parameters, program_inputs

MakesRoom = Callable[[Key, Captured, BudgetError], bool]
"""Called with a key, a captured step and the error that refuses it. Returns whether a program for it is there now,
since states have moved."""


class Session:
    """One model: its programs, one for each mode and set of input shapes, over one setup.

    The plan is made for the first call, or, if it is asked for earlier, for a guess at that call.
    """

    def __init__(self, source: nn.Module, options: Options, notes: tuple[str, ...] = ()) -> None:
        check_trained(source)
        self.source = source
        self.options = options
        self.device = Device.choose(options)
        self.ranks = Ranks.of(partial(options.degrees.mesh, options.world), self.device.torch_device, *options.of_ranks)
        self.local_shards = LocalShards(self.ranks)
        self.limits = self.device.limits(options, self.ranks).agreed(self.ranks)
        self.lowering = Lowering.of(options.passes, options.dump)
        self.dtype = self.device.dtype(options)
        quantize_frozen(source, options.frozen, self.dtype)
        self.dtypes = parameter_dtypes(source, self.dtype)
        self.census = Census(source)
        self._parameters = self.census.now().parameters
        self.planning = Planning(
            options, self.limits, self.ranks.mesh, self.lowering, self._parameters, self.dtypes, blocks(source),
            self.ranks.mesh.pipeline_rank(self.ranks.rank),
        )  # fmt: skip
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        asked = CaptureRequest(self.dtype, options.outputs, dtypes=self.dtypes, shapes=shapes, loss_fn=options.loss_fn)
        shared, schedule = replace(self.planning.shared(), notes=notes), self.planning.schedule
        captures = Captures(self.census, asked, self.lowering, shared, schedule)
        self.captures = KeptCaptures(captures, numbers_may_be_inputs=schedule is None)
        self.hardware = self.device.hardware(self.limits, self.ranks)
        self.saves = Background(self.ranks, self.hardware)
        self.meter = None if self.device.is_cuda else MemoryMeter(self.hardware.device_tier)
        self.usage = StepUsage(self.device, self.hardware)
        self.builder = Builder(
            self.planning,
            self.lowering,
            self._parameters,
            self.local_shards,
            self.hardware,
            self.usage.stats,
            self.meter,
        )
        self.phase = Phase.NEW
        self.setup: Setup | None = None
        self.last: dict[str, Compiled] = {}
        self._declared: Declaration | None = None
        self._failure: Exception | None = None
        self._has_trained = False
        self.half_loaded = HalfLoaded()
        self.places = Places(self.census, self.ranks, self.device)
        self._met: WeakSet[Executor] = WeakSet()
        self._programs: Recent[Compiled] = Recent()

    # -- programs ------------------------------------------------------------------------------------------

    def program(self, args: tuple[Any, ...], kwargs: dict[str, Any], entry: str = "", *,
                agrees: bool = True, makes_room: MakesRoom | None = None) -> Compiled:  # fmt: skip
        """The program for a call of the model, or of the submodule `entry`; captured, planned and generated if it is
        new. Before training, ranks that shard weights agree on its plan if `agrees`, as they do except for a guess.
        `makes_room` may help where the program does not fit with states where they are."""
        members = self.census.now()
        check_parameters(members.parameters, self._parameters)
        call = self.captures.taken(Call.of(members, entry, args, kwargs))
        if self.ranks.sharing is not None:
            self.ranks.check_call(str(call))
        key = self.captures.key(call)
        if key not in self._programs:
            with self.ranks.refusing_alike():
                key = self._make(call, makes_room)
        if agrees and self._programs[key].trains and self.phase in (Phase.PLANNED, Phase.PLACED):
            self._agree(key)
        compiled = self._programs[key]
        self.last[compiled.program.name] = compiled
        return compiled

    @resting_collector()
    def _make(self, call: Call, makes_room: MakesRoom | None) -> Key:
        key, captured = self.captures.of(call)
        if captured.trains and self._has_trained and self.demanded().lacks(self._parameters):
            self._thaw(key, captured)
        elif self.setup is None or (captured.trains and self._may_move):
            # Until the first step states may still move, so the first real batch is planned for from scratch.
            self.planning.agreed = None
            self._set_up(key, captured)
        else:
            # One more program beside the others: states stay where they are, if it fits so.
            try:
                self._programs[key] = self.builder.further(captured, self.setup, self.format)
            except BudgetError as refusal:
                if makes_room is None or not makes_room(key, captured, refusal):
                    raise
        return key

    @property
    def _may_move(self) -> bool:
        """Whether states may still move for a training program: those that a torch optimizer has updated may not."""
        is_settled = self._has_trained and self.format is None
        return self.phase in (Phase.PLANNED, Phase.PLACED) and not is_settled

    def _thaw(self, key: Key, captured: Captured) -> None:
        """Plans again, with more parameters trained, moves states, and drops all other programs. Raises StateError
        between two backwards of a step, BudgetError if nothing fits on one of the ranks; then nothing has changed."""
        before, programs = (self.demanded(), self._programs, self.planning.agreed), Recent[Compiled]()
        why = "a frozen parameter was made trainable between the backwards of one step; do so after step()"
        try:
            with self.ranks.failing_alike():
                if not before[0].machine.store.is_between_steps:
                    raise StateError(why)
                self.planning.agreed = None
                setup, programs[key] = self.builder.thawed(captured, before[0], self.format)
            self.phase, self.setup, self._programs = move(self.phase, Phase.PLANNED), setup, programs
            self.place()
        except Exception:
            has_begun = self.setup is not before[0]
            self.setup, self._programs, self.planning.agreed = before
            if has_begun:
                self._place_again()
            raise
        self.last = {}

    def _agree(self, key: Key) -> None:
        """Before the first training step, replans so that ranks that shard weights all run a plan that suits each of
        them. If one of them finds no room, all refuse."""
        compiled, setup = self._programs[key], self.setup
        if setup is None or not is_agreed_on(compiled.plan, self.ranks) or all_refuse(setup.refusal, self.ranks):
            return
        self.planning.agreed = agreed(compiled.plan, self.ranks)
        try:
            with self.ranks.failing_alike():
                self._set_up(key, compiled.captured)
        except Exception:
            self.planning.agreed = None
            raise

    def programs(self) -> dict[Key, Compiled]:
        """All programs in the cache, by key."""
        return dict(self._programs.items())

    def planned_host_bytes(self) -> int:
        """Bytes on the host during the program that needs most there, as planned."""
        return max((compiled.plan.estimate.host_bytes for compiled in self.programs().values()), default=0)

    def names(self) -> dict[int, str]:
        """The parameters' names, by their identity."""
        return {id(parameter): name for name, parameter in self._parameters.items()}

    # -- the setup -----------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan | None:
        return None if self.setup is None else self.setup.plan

    @property
    def machine(self) -> Machine | None:
        return None if self.setup is None else self.setup.machine

    @property
    def format(self) -> OwnFormat | None:
        return None if self._declared is None else self._declared.format

    @property
    def is_placed(self) -> bool:
        return self.phase in (Phase.PLACED, Phase.TRAINING)

    def demanded(self) -> Setup:
        """The setup, planned for a guess before the first call. Raises StateError if there is nothing to plan by."""
        setup = self.setup or self.plan_by_guess()
        if setup is None:
            raise StateError("there is no plan yet: pass example_inputs= to compile, or call the module once")
        return setup

    def store(self) -> StateStore:
        """The store of the training state. Raises StateError if there is no plan and nothing to plan by."""
        return self.demanded().machine.store

    def plan_by_guess(self) -> Setup | None:
        """Plans for inputs made from the model's configuration, if possible. Returns the setup, if there is one."""
        guess = example_inputs(self.source, self.planning.asked or 1)
        if guess is not None:
            with of_a_guess(), torch.enable_grad():
                self.program((), dict(guess), agrees=False)
        return self.setup

    def _set_up(self, key: Key, captured: Captured) -> None:
        """Plans for this program first, and drops all others; they are made anew when they are called."""
        before, programs = self.setup, Recent[Compiled]()
        setup, programs[key] = self.builder.first(captured, before, self.format)
        self.phase, self.setup, self._programs = move(self.phase, Phase.PLANNED), setup, programs
        self.last = {}
        if before is None and self._declared is not None and setup.own is not None:
            self._declared.attach(setup.own)

    def use(self, format: OwnFormat, optimizer: Attach, digest: str) -> None:
        """Plans for our own optimizer, now if there is a plan, else with the first one, and attaches it to its store.

        Raises StateError if the model has one already, and BudgetError if nothing fits; then nothing has changed.
        """
        if self._declared is not None:
            raise StateError(
                "model.optimizer(...) was called before, and that optimizer holds the training state. Change it "
                "through its param_groups, add_param_group() and load_state_dict(), or compile the model again"
            )
        if self._failure is not None:
            raise self._failure
        declared = Declaration(format, optimizer, digest)
        if self.setup is None:
            self._declared = declared
        else:
            self._replan(declared)

    @resting_collector()
    def _replan(self, declared: Declaration) -> None:
        """Makes all programs anew for another format of training state, and moves the values accordingly."""
        before, format, programs = self.setup, declared.format, Recent[Compiled]()
        (key, first), *others = sorted(self._programs.items(), key=lambda item: not item[1].trains)
        setup, programs[key] = self.builder.first(first.captured, before, format)
        for key, other in others:
            programs[key] = self.builder.further(other.captured, setup, format)
        assert before is not None and setup.own is not None
        before.machine.leave()
        self.phase, self.setup, self._programs = move(self.phase, Phase.PLANNED), setup, programs
        self.last = {compiled.program.name: compiled for _, compiled in programs.items()}
        self._declared = declared
        declared.attach(setup.own)
        try:
            self.place()
        except Exception as error:
            if not self.is_placed and self.places.incoming is None:  # values yet to come may be brought by another load
                self.phase, self._failure = move(self.phase, Phase.BROKEN), error
            raise

    # -- places --------------------------------------------------------------------------------------------

    @property
    def may_place(self) -> bool:
        """Whether values can be placed: a plan is not refused, and processes it divides state over are launched."""
        setup = None if self.phase is Phase.BROKEN else self.setup
        return setup is not None and setup.refusal is None and (self.ranks.launched or not setup.plan.shares_out)

    def place(self) -> None:
        """Puts chunks and buffers where the plan wants them. Weights on `meta` stay there until `incoming` is given."""
        if not self.may_place or (self.places.are_empty and self.places.incoming is None):
            return
        self.places.check_incoming()
        self._put()
        self.places.bring(self.store(), self.half_loaded)

    def placed(self) -> None:
        """Places the training states, if the values for them are known."""
        self.demanded()
        self.place()

    def take_places(self, are_alike: bool) -> None:
        """Gives weights on `meta` their places in chunks if these are known and, with several ranks, `are_alike` says
        that all will hold the same values. Otherwise frees parameters that only other ranks hold, if they are known."""
        if self.may_place and (are_alike or not self.ranks.together):
            self._put()
        elif self.setup is not None:
            self.store().chunks.let_go()

    def _put(self) -> None:
        setup, programs = self.demanded(), self.programs().values()
        homes = shared_homes(setup.plan, [compiled.plan for compiled in programs])
        if self.is_placed and homes == self.places.homes:
            return
        self.places.put(setup, homes, programs, self.phase, self._declared)
        if self.phase is Phase.PLANNED:
            self.phase = move(self.phase, Phase.PLACED)

    def rehome(self, plans: Mapping[Key, Plan], first: Key, further: Compiled | None = None) -> None:
        """Switches to plans that differ in homes and estimates only, that of `first` being the model's, and moves the
        states. A `further` program, with the key `first`, joins the others. Raises BudgetError if a tier is full; then
        nothing has changed."""
        before, programs = (self.demanded(), self._programs, self.planning.agreed), Recent[Compiled]()
        for key, compiled in (*self._programs.items(), *([] if further is None else [(first, further)])):
            programs[key] = replace(compiled, plan=plans[key])
        self.setup, self._programs = replace(before[0], plan=plans[first]), programs
        if before[2] is not None:
            self.planning.agreed = replace(before[2], homes=plans[first].homes)
        try:
            self.place()
        except BudgetError:
            self.setup, self._programs, self.planning.agreed = before
            self._place_again()
            raise
        self.last = {compiled.program.name: compiled for _, compiled in programs.items()}

    def _place_again(self) -> None:
        """Puts states back after a failed move; if they no longer fit there, no further step is taken."""
        self.places.homes = ()
        try:
            self.place()
        except BudgetError as error:
            self.phase, self._failure = move(self.phase, Phase.BROKEN), error

    # -- steps ---------------------------------------------------------------------------------------------

    def ready(self, backward: bool) -> None:
        """Prepares for a step. Raises StateError if it cannot be run."""
        self.settle(backward)
        self.half_loaded.check()

    def settle(self, backward: bool) -> None:
        """As `ready`, but also while a load is unfinished: for callers that bring the values."""
        setup = self.demanded()
        for refusal in (self._failure, setup.refusal):
            if refusal is not None:
                raise refusal
        self.ranks.check_launched()
        self.place()
        store = setup.machine.store
        if not self.is_placed:
            raise StateError(
                "the model's weights are on 'meta': there are no values to compute with. Load some with "
                "load_state_dict(...), which puts them where the plan wants them, and call again."
            )
        store.adopt()
        name = next(hooked(self._parameters), None) if backward else None
        if name is not None:
            raise StateError(
                f"parameter {name} has an autograd hook, which a compiled step would not call; remove it, and "
                "work on .grad between backward() and optimizer.step() instead"
            )

    def inputs(self, compiled: Compiled, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """A program's inputs. Raises StateError if ranks that share a batch were called with different ones."""
        inputs = program_inputs(self.census, compiled, (args, kwargs), self.device.torch_device, self.dtype)
        if self.ranks.mesh.shares_batches:
            is_new = compiled.executor not in self._met
            check_shared(self.ranks, (args, kwargs), every_element=is_new)
            if is_new:
                self._met.add(compiled.executor)  # not its id, which a later executor may get, on some ranks only
                check_messages(self.ranks, *messages(compiled.flat))
        return inputs

    def begin_step(self, training: bool) -> None:
        """Starts a step: `stats.step` counts from here."""
        if training:
            self.phase, self._has_trained = move(self.phase, Phase.TRAINING), True
            self.ranks.clock.step += 1
        self.planning.forget()
        self.usage.begin_step()

    @property
    def stats(self) -> Stats:
        return self.usage.beside(self.plan)
