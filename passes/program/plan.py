"""The Plan: what the user asked for, every decision about one model, and the cost estimate, as frozen data.

Passes act on it and decide nothing themselves. Print it, save it as JSON, edit it, and feed it back with
`compile(..., plan="plan.json")`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...runtime.isa.errors import ArgumentError, check_path
from ...runtime.isa.formats import StateFormat, TorchFormat
from ...runtime.isa.homes import Home, Homes, Where, numbers
from ...runtime.isa.layout import ChunkLayout, Layout
from ...runtime.isa.mesh import ONE_PROCESS, Mesh, names_of, taken_together
from ...runtime.isa.schedule import Schedule
from ...runtime.isa.units import format_bytes, format_seconds
from .estimate import Alternative, Estimate
from .plan_json import read_json, write_json
from .request import Request

LARGEST = 6
"""How many entries of the peak's breakdown are printed."""

Row = tuple[str, str]


@dataclass(frozen=True)
class Plan:
    """A request, the decisions that follow from it, and the estimated cost.

    Fields:
        request: what the user asked for.
        layout: which parameter lives where in which chunk.
        mesh: the processes that train together.
        microbatches: how many microbatches a batch is split into.
        rounds: how many rounds these run in, with equally many each; a round runs forward and backward before the next.
        blocks: names of the blocks that run for all microbatches of a round before the next block does, or that the
            stages of a pipeline are built from.
        stages: for a pipeline, the name of the block that each stage begins with; "" is the beginning of the model.
        schedule: for a pipeline, what each of its ranks does, in order.
        line: this process's rank in the pipeline; the program and the layout are for that rank.
        recompute: names of the blocks whose activations the backward recomputes.
        offload: names of the blocks whose activations wait on the host for the backward: the inputs of a recomputed
            block, and everything that its backward reads of any other.
        offload_sums: names of the blocks whose accumulated gradients wait on the host between rounds; "" stands for
            everything outside the blocks.
        prefetch: how many chunks before their first reader copies start (0: on demand).
        fuse_loss: whether a loss over the vocabulary is computed in pieces, without logits.
        homes: for each chunk, where its training state lives and is updated, and whether its weights stay on the
            device.
        format: what the training state consists of: as `model.optimizer(...)` declared, or masters for torch's
            optimizers.
        estimate: the expected cost of the program that the plan was made for.
        alternatives: the cost of the next-best plans, fastest first; empty for a plan that was fed back.
        notes: what the user should know, such as operations that stayed as Hugging Face wrote them.
    """

    request: Request = field(default_factory=Request)
    layout: Layout = field(default_factory=lambda: Layout(()))
    mesh: Mesh = ONE_PROCESS
    microbatches: int = 1
    rounds: int = 1
    blocks: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    schedule: Schedule | None = None
    line: int = 0
    recompute: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    offload_sums: tuple[str, ...] = ()
    prefetch: int = 1
    fuse_loss: bool = False
    homes: Homes = ()
    format: StateFormat = field(default_factory=TorchFormat)
    estimate: Estimate = field(default_factory=Estimate)
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The planned peak of device memory."""
        return self.estimate.peak_bytes

    @property
    def batches(self) -> int:
        """How many different batches the processes compute in one step."""
        return self.mesh.data_size

    @property
    def shares_out(self) -> bool:
        """Whether some process holds training state that another one lacks."""
        return bool(self.request.zero or self.layout.owned)

    def shards(self, chunk: ChunkLayout) -> int:
        """How many processes a chunk's training state is divided over."""
        zero = self.request.zero
        divided = zero == 3 or (zero > 0 and chunk.trainable)
        return self.mesh.ranks_over(chunk.reduced_over) if divided else 1

    def placed(self, homes: Homes) -> list[tuple[ChunkLayout, Home]]:
        """Each chunk with its home in `homes`, which may be the plan's or others."""
        return list(zip(self.layout.chunks, homes, strict=True))

    # -- text ----------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        return write_json(self)

    def save(self, path: str | Path) -> None:
        check_path("path", path, "a file for the plan")
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The inverse of `to_json`. Raises ArgumentError naming the fields that are wrong."""
        return read_json(text, cls)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan that `save` wrote. Raises ArgumentError if the file cannot be read or is not a plan."""
        check_path("plan", path, "a geminifx.Plan, or the path of one written by plan.save")
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArgumentError(f"plan={str(path)!r} cannot be read: {error}") from error

    def __str__(self) -> str:
        rows = [
            *self._requested(),
            *self._estimated(),
            *self._decided(),
            *self._compared(),
            *(("note", text) for text in self.notes),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

    def _requested(self) -> Iterator[Row]:
        """The request, with the parts of the mesh that give it a meaning."""
        asked = self.request
        yield "placement", asked.policy
        yield "device budget", "unlimited" if asked.budget_bytes is None else format_bytes(asked.budget_bytes)
        if self.mesh.size > 1:
            yield "processes", str(self.mesh)
        if asked.mode:
            yield "tensor parallel", asked.mode + (", along the sequence" if asked.sequence else "")
        if asked.zero:
            replicas = taken_together(names_of(self.mesh.replica_axes)) or "one process"
            yield "ZeRO", f"stage {asked.zero}, over {replicas}"
        if asked.kernels == "fused":
            yield "kernels", "fused between products, by Inductor"
        if self.mesh.replica_axes:
            how = "float32 and rounded once" if asked.reduce_dtype == "fp32" else "the dtype they are computed in"
            yield "gradients", f"added up in {how}"

    def _estimated(self) -> Iterator[Row]:
        expected = self.estimate
        at = f", at the rates of {expected.rates}" if expected.rates else ""
        yield "modelled step", format_seconds(expected.step_s) + at
        if expected.busy_s:
            yield "  at least", f"{format_seconds(expected.bound_s)}, by what binds: {expected.binds}"
            yield "  busy", ", ".join(f"{name} {format_seconds(busy_s)}" for name, busy_s in expected.busy_s)
        for e in expected.collectives:
            yield f"  received along {e.axis}", f"{format_bytes(e.received_bytes)} by {e.count} {e.collective}(s)"
        yield "planned device peak", format_bytes(expected.peak_bytes)
        yield "  of it always there", format_bytes(expected.static_bytes)
        for name, num_bytes in expected.at_peak[:LARGEST]:
            yield f"  at the peak: {name}", format_bytes(num_bytes)
        yield "planned host memory", format_bytes(expected.host_bytes)
        if expected.offloaded_bytes:
            yield "  of it activations", format_bytes(expected.offloaded_bytes)

    def _decided(self) -> Iterator[Row]:
        chunks, homes = self.layout.chunks, self.homes
        there, streamed = numbers(homes, Where.DEVICE), numbers(homes, Where.STREAMED)
        computing = {index for index in there if chunks[index].shards == 1}
        staying = {index for index, home in enumerate(homes) if home.resident} - computing
        largest = max((chunk.compute_bytes for chunk in chunks), default=0)
        yield "chunks", f"{len(chunks)}, largest {format_bytes(largest)}"
        yield "  training state on the device", f"{len(there)} of {len(chunks)}"
        yield "  weights stay through a step", f"{len(staying)} of {len(chunks)}"
        if streamed:
            yield "  updated on their way through", f"{len(streamed)} of {len(chunks)}"
        yield "optimizer", str(self.format)
        if self.schedule is not None:
            begin = ", ".join(name or "the beginning" for name in self.stages)
            yield "pipeline", f"{self.schedule.name}, {len(self.stages)} stages from {begin}"
            yield "  this process", " ".join(map(str, self.schedule.ranks[self.line]))
            yield "microbatches", str(self.microbatches)
        elif self.microbatches > 1:
            each = "all of them" if self.rounds == 1 else "a round's"
            runs = f"{len(self.blocks)} block(s), each for {each}" if self.blocks else "no blocks"
            yield "microbatches", f"{self.microbatches}, through {runs}"
            if self.rounds > 1:
                where = f", sums of {len(self.offload_sums)} wait on the host" if self.offload_sums else ""
                yield "  in rounds", f"{self.rounds}, of {self.microbatches // self.rounds} microbatch(es) each{where}"
        yield "prefetch", f"{self.prefetch} chunk(s) ahead"
        yield "recompute", f"{len(self.recompute)} block(s)"
        if self.offload:
            yield "offload", f"activations of {len(self.offload)} block(s)"
        if self.fuse_loss:
            yield "loss", "in pieces, its logits are not computed"

    def _compared(self) -> Iterator[Row]:
        for other in self.alternatives:
            more = other.step_s / self.estimate.step_s - 1 if self.estimate.step_s else 0.0
            yield "next best", f"{format_seconds(other.step_s)} ({more:+.1%}) with {other.what}"
