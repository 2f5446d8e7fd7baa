"""CompiledModule: the model, trained by generated programs within a budget."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.program.manager import Record
from ..passes.program.plan import Plan
from ..passes.program.text import print_program
from ..runtime.distributed.ranks import Ranks
from ..runtime.isa.errors import StateError, check_path
from ..runtime.isa.moments import Masters, Moments
from ..runtime.isa.precision import master_dtype
from ..runtime.memory.stats import Stats
from ..runtime.optimizer.chunk_optimizer import ChunkOptimizer
from ..runtime.optimizer.declared import Declared
from ..runtime.optimizer.hyper_checks import check_norm
from ..runtime.state_io.atomic_directory import shared_directory
from ..runtime.state_io.checksums import seal
from ..runtime.state_io.pretrained import carry_over
from .calls import Calls
from .capture.materialize import check_expected, check_loadable, materialize
from .facade import Facade
from .inspect.nonfinite import first_nonfinite
from .inspect.profile import Profile, profile
from .largest_batch import LargestBatch
from .options import Options
from .programs.collector import resting_collector
from .programs.forward import with_loss
from .session import Session
from .setup import Phase
from .state.saving import DEFAULT, SaveRequest, save_at_once, save_streamed
from .state.state_dict import dequantized, local_shards_of, make_masters, whole_shapes, whole_state
from .weights.incoming import FromFiles, FromInitialisers
from .weights.places import Incoming
from .world import Settled


class CompiledModule(Facade):
    """A drop-in for the model it was compiled from.

    It has the same call, outputs and parameter names; `parameters()` are the float32 masters, each on the device or the
    host as planned, and work with any element-wise optimizer. One program is made for each mode (training, evaluation)
    and set of input shapes; all share the parameters. `plan`, `graph` and `stats` show what was decided, what runs, and
    what it used.

    `world` is the plan for how the processes share the work, if the planner chose it; otherwise None.

    The source model shares its modules with this one: it stays usable for anything that reads its parameters, such as
    `save_pretrained`, and attributes not found here are looked up there.
    """

    def __init__(self, source: nn.Module, options: Options, settled: Settled | None = None) -> None:
        session = Session(source, options, () if settled is None else settled.notes)
        self.__dict__["_facade_loss_fn"] = options.loss_fn
        super().__init__(source, Calls(session))
        self.__dict__["session"] = session
        self.__dict__["world"] = None if settled is None else settled.world

    def _facade_reset(self) -> None:
        """Restores the source's own forward, compiled, with the loss function if one was given."""
        super()._facade_reset()
        if self._facade_loss_fn is not None:
            self.forward = with_loss(self._facade_source, self._facade_loss_fn)

    @property
    def source(self) -> nn.Module:
        """The model that this one was compiled from."""
        return self._facade_source

    # -- training ------------------------------------------------------------------------------------------

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Captures, plans and generates the program for a call with these arguments, without running it. Training
        states may move for it, as for the call."""
        with self._facade_forward.in_source():
            self.session.program(args, kwargs, makes_room=self._facade_calls.adaptation.makes_room)

    def optimizer(self, kind: type[torch.optim.Optimizer], params: Any = None, *, max_grad_norm: float | None = None,
                  in_backward: bool = False, accumulate: int = 1, moments: Moments = "exact",
                  masters: Masters = "exact", seed: int = 0, **hyper: Any) -> ChunkOptimizer:  # fmt: skip
        """An optimizer whose updates overlap with the model's computation. AdamW keeps 12 bytes per bfloat16 parameter,
        or 8, 6 or 4, depending on `moments` and `masters`.

        From here on parameters read as float32 copies, and only this optimizer changes them. Make it before the first
        step: the plan is made anew for it.

        Args:
            kind: torch.optim.AdamW, Adam, SGD, Muon or Adafactor, computed as torch does, or geminifx.Lion.
            params: parameters or groups of them, as torch.optim takes them; by default all that are trained. A group
                may have another "kind", as a group of non-matrix parameters beside Muon does.
            max_grad_norm: clip the norm of all gradients to this in every step.
            in_backward: update each chunk as soon as its gradient is complete. Faster, and leaves no gradients to look
                at or to clip.
            accumulate: how many backwards make one step. in_backward relies on it; otherwise it only plans the memory.
            moments: how the optimizer's moments are stored: "exact" as float32, "bf16" rounded to nearest, "int8" as
                codes with one scale for 256 of them.
            masters: how float32 masters of weights that compute in bfloat16 are kept: "exact" as the weight plus a
                remainder, "bf16-stochastic" as the weight alone, with each update rounded stochastically.
            seed: for stochastic rounding. The random bits depend on it, the step, the parameter's name and the
                element's index, and so do not depend on where states lie.
            hyper: keyword arguments of `kind`, such as lr, betas and weight_decay.

        Raises:
            ValueError: the arguments do not make sense, alone or together.
            StateError: the model has such an optimizer already, or the ranks declare different ones.
            BudgetError: nothing fits the budget.
        """
        declared = Declared(kind, hyper, max_grad_norm, in_backward, accumulate, moments, masters, seed)
        declared.check(self.session.dtypes.values())
        dtypes = self.session.dtypes
        trained = {n: (master_dtype(p), dtypes[n]) for n, p in self.named_parameters() if p.requires_grad}
        declared.check_masters(trained, sharded=bool(self.session.ranks.mesh.tensor_axes))
        groups = [p for p in self.parameters() if p.requires_grad] if params is None else params
        if isinstance(groups, Iterator):
            groups = list(groups)
        mesh, zero = self.session.ranks.mesh, self.session.options.degrees.zero
        declared.check_whole(groups, sharded=bool(mesh.tensor_axes), zero=zero if mesh.size > 1 else 0)
        return ChunkOptimizer(declared, groups, self.session.use, self.session.placed, self.session.names(),
                              torch.float16 in self.session.dtypes.values())  # fmt: skip

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_ over all parameters, for torch's optimizers; returns the norm.

        With parameters sharded over processes, torch's function would see only this process's shards, and clip by a
        different norm on each. With `model.optimizer(...)`, `max_grad_norm` needs less memory.
        """
        check_norm("max_norm", max_norm)
        return self.session.store().clip_grad_norm(max_norm)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the source's own; with `model.optimizer(...)`, as that optimizer's."""
        if self.session.machine is None:
            super().zero_grad(set_to_none)
        else:
            self.session.machine.store.zero_grad(set_to_none)

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, first_only: bool = False, **kwargs: Any) -> Any:
        """As the source's own, with its names; the values are the masters'.

        With `model.optimizer(...)` they are copies on the CPU, made here. So are parameters that are sharded over
        processes: they are gathered whole, and all processes must call this. With `first_only` rank 0 alone keeps the
        result, and the others get an empty dict.
        """
        self._fill()
        keep = not first_only or self.session.ranks.rank == 0
        return whole_state(self.session, *args, keep=keep, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module's; values are copied into the masters, and weights on `meta` get memory. Values are whole
        tensors even if parameters are sharded over processes: each takes its shard.

        Raises ValueError for assign=True, which would take the parameters out of their chunks, and as nn.Module does
        for missing or unexpected values, StateError where weights were on `meta`; StateError, too, for values that
        parameters cannot hold exactly before their masters are planned.
        """
        if assign:
            raise ValueError("load_state_dict(assign=True) would take parameters out of their chunks; leave it out")
        session, are_empty = self.session, any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers()))
        if are_empty:
            check_loadable(self.source, state_dict)
        session.places.incoming = None
        make_masters(session, state_dict)
        with session.half_loaded.while_written("model") if are_empty else nullcontext():
            if are_empty:
                materialize(self.source, partial(session.take_places, are_alike=False))
            with self._facade_calls.lending():
                shards = local_shards_of(session, state_dict)
                loaded = self.source.load_state_dict(shards, strict=strict and not are_empty)
        if are_empty:
            session.place()
        if strict:
            self.session.half_loaded.discard("model")
            check_expected(loaded.unexpected_keys)
        return loaded

    def load_pretrained(self, directory: str | Path, *, strict: bool = True, seed: int = 0) -> None:
        """Read weights that are on `meta` from the Hugging Face files in `directory`, each directly into its chunk:
        there is never a second copy. Reading waits until their places are known: until the first call, anything that
        asks for state, or, if there is a plan, `model.optimizer(...)`. All processes call it.

        With `strict` False, weights that the files lack are drawn from `seed` by the modules' own initialisers, with a
        warning that names them. PEFT's adapters, which the files of a base model lack, are always drawn as PEFT draws
        them.

        Raises:
            CheckpointError: the files are damaged, or of another model; nothing is changed. If they change before they
                are read, or cannot be read to their end, it is raised then, and no step is taken.
            StateError: the weights all have values already. After a load that failed, another may be tried.
        """
        check_path("directory", directory, "the path of a directory")
        self._check_empty("load_pretrained")
        with self.session.ranks.failing_alike():
            found = FromFiles.found(self.source, directory, strict, seed, whole_shapes(self.session))
        self._take(found)

    def initialize(self, seed: int = 0) -> None:
        """Give weights that are on `meta` random values by each module's own initialiser, drawn from `seed` as plain
        PyTorch draws them (`models.initialisers` lists the exceptions): the same for every layout, budget and number of
        processes. They are drawn, a block at a time, as soon as their places are known.

        Raises StateError if the weights have values already, and, before any is drawn, for a module that has parameters
        and no initialiser.
        """
        self._check_empty("initialize")
        self._take(FromInitialisers.of(self.source, seed, whole_shapes(self.session)))

    def _take(self, incoming: Incoming) -> None:
        """Registers the source of the weights' values; if weights have places, as after a failed load, it is read at
        once."""
        self.session.places.incoming = incoming
        if not self.session.places.are_empty:
            self.session.place()

    def _fill(self) -> None:
        """Fills the weights from `incoming`, if values are still due."""
        if self.session.places.incoming is not None:
            self.session.settle(backward=False)

    def _check_empty(self, name: str) -> None:
        if self.session.half_loaded == {"model"}:
            return
        self.session.half_loaded.check()
        if not self.session.places.are_empty:
            raise StateError(
                f"{name}() is for weights on 'meta', but this model's weights already have values; build the model "
                "inside geminifx.init_empty(), or use load_state_dict()"
            )

    def save_pretrained(self, directory: str | Path, *, max_shard_size: int | str = DEFAULT.max_shard_bytes,
                        dtype: torch.dtype | None = None, **options: Any) -> None:  # fmt: skip
        """Save in Hugging Face's format (for other models, the weights as safetensors).

        The new checkpoint replaces what `directory` holds only once it is complete; other files in it stay. All
        processes call it, and rank 0 writes; an error there raises on all of them. Weights are gathered and written one
        file at a time, unless Hugging Face writes tensors other than the model's own, as for adapters, or gets
        `options`: then all weights are copied first.

        Quantised weights are saved as the values they stand for.

        Args:
            max_shard_size: the size limit of a file, unless one weight is larger.
            dtype: the dtype that weights are written in and the configuration names; by default the masters', float32.
            options: as the model's own save_pretrained takes them. Raises ArgumentError for those that it does not.
        """
        check_path("directory", directory, "the path of a directory")
        request, ranks = SaveRequest.of(max_shard_size, dtype, options), self.session.ranks
        ranks.raise_alike(request.refusal(self.source, ranks.rank))
        with shared_directory(directory, ranks, stays_sealed=False) as temporary:
            self.write_pretrained(temporary, request)
            if ranks.rank == 0:
                seal(temporary)
                carry_over(Path(directory), temporary)

    def write_pretrained(self, directory: Path, request: SaveRequest = DEFAULT) -> None:
        """Writes what `save_pretrained` writes, into a new directory that the caller swaps in as a whole."""
        self.session.half_loaded.check()
        self._fill()
        if all(self.session.ranks.gather(request.streams(self.source))):
            save_streamed(self.session, directory, request)
            return
        weights = self.state_dict(first_only=True)
        if self.session.ranks.rank == 0:
            save_at_once(self.source, directory, request, dequantized(self.source, weights))

    # -- inspection ----------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan in force. Raises StateError if there is none and nothing to plan by."""
        return self.session.demanded().plan

    def largest_batch(self) -> int:
        """The largest batch, in examples, whose plan fits the budgets, for examples of the shapes that the model was
        last trained or compiled with. Found to within an eighth, and never smaller than that batch.

        Each size tried is captured and planned as a call with such a batch would be; nothing is allocated. Raises
        StateError if no training step is known, or if no batch could be too large.
        """
        setup, compiled = self.session.demanded(), self.session.last.get("training")
        if compiled is None:
            raise StateError("no training step is known yet: pass example_inputs= to compile, or call the module once")
        only_ours, trains = setup.refusal is not None, self.session.phase is Phase.TRAINING
        with resting_collector():
            return LargestBatch(
                compiled.captured, self.session.planning, setup.plan, self.session.format, only_ours, trains
            ).find()

    @property
    def ranks(self) -> Ranks:
        """The processes that train the model together, this one among them."""
        return self.session.ranks

    @property
    def graph(self) -> dict[str, str]:
        """The text of the programs in use, by phase: "training" and "evaluation"."""
        self.session.setup or self.session.plan_by_guess()
        return {name: print_program(compiled.program) for name, compiled in self.session.last.items()}

    @property
    def history(self) -> dict[str, tuple[Record, ...]]:
        """What each pass did to the programs in use, by phase as in `graph`."""
        return {name: compiled.records for name, compiled in self.session.last.items()}

    @property
    def stats(self) -> Stats:
        """Bytes at the peak and bytes moved, since compilation and in the last step."""
        return self.session.stats

    def profile(self, step: Callable[[], object], steps: int = 1, trace: str | Path | None = None) -> Profile:
        """Run a training step under torch's profiler and report where its time goes.

        Args:
            step: one step of the loop, optimizer included; called `steps` times. Warm it up beforehand.
            steps: how many to run; figures are per step.
            trace: a file to write the trace to, for chrome://tracing or Perfetto.
        """
        machine = self.session.machine
        return profile(step, steps, trace, None if machine is None else machine.store)

    def first_nonfinite(self, *args: Any, **kwargs: Any) -> str | None:
        """The name of the first module whose forward makes an infinite or NaN value of finite ones, or None. Raises
        StateError in a pipeline, where the other ranks would wait for this rank's messages."""
        if self.session.ranks.mesh.pipeline_axes:
            raise StateError(
                "first_nonfinite() does not support pipelines; call it on a model that runs without pipeline= in "
                "parallel="
            )
        compiled = self.session.program(args, kwargs)
        self.session.ready(backward=False)
        return first_nonfinite(compiled.flat, compiled.executor, self.session.inputs(compiled, args, kwargs))
