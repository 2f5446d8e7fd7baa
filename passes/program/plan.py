"""The Plan: every decision about one model, as frozen data. Passes act on it and never decide.

Print it, save it as JSON, edit it, feed it back with `compile(..., plan="plan.json")`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ...runtime.isa.formats import StateFormat, TorchFormat
from ...runtime.isa.homes import Home, Homes, Where, numbers
from ...runtime.isa.layout import ChunkLayout, Layout
from ...runtime.isa.mesh import ONE_PROCESS, Mesh, names_of, taken_together
from ...runtime.isa.precision import ReduceDtype
from ...runtime.isa.units import format_bytes
from .plan_json import read_json, write_json

Placement = Literal["cuda", "cpu", "auto"]
Outputs = Literal["loss", "all"]


@dataclass(frozen=True)
class MemoryEstimate:
    """What a plan is expected to take, in bytes.

    `static_bytes` is on the device for good and `peak_bytes` the highest point of a step, to which belong the
    `reserve_bytes` of the driver's context and libraries. `host_bytes` is what the host holds of the training
    state (masters, gradients, optimizer state). `at_peak` names what the peak consists of, largest first.
    """

    static_bytes: int = 0
    peak_bytes: int = 0
    host_bytes: int = 0
    reserve_bytes: int = 0
    at_peak: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Exchange:
    """What a process receives in one step by one kind of collective along one axis of the mesh."""

    axis: str
    collective: str
    count: int
    received_bytes: int


@dataclass(frozen=True)
class Plan:
    """All decisions for one model.

    Fields:
        placement: the policy that was asked for.
        budget_bytes: device memory the process may use, or None for all there is.
        layout: which parameter lives where in which chunk.
        mesh: the processes that train together.
        mode: how they shard tensors, a key of `passes.modes.MODES`; "" where they do not.
        sequence: whether the mode "1d" shards activations along the sequence.
        table: placements of the user's own, from patterns of parameter names, such as ("lm_head.*", "col=S0").
        outputs: which outputs of a training step whose tensors are sharded are put together: the "loss", where that is
            the one with a gradient, or "all".
        zero: what processes with the same weights hold a part of: 1 optimizer state, 2 and gradients, 3 and weights.
        reduce_dtype: in what processes with the same weights add up gradients: "fp32", rounding their mean once, or
            "compute", the dtype they are computed in.
        recompute: names of the blocks whose activations are computed again in the backward.
        prefetch: how many chunks ahead of their first reader copies start (0: on demand).
        fuse_loss: whether a loss over the vocabulary is computed in pieces, without logits.
        homes: where each chunk's training state lies and is updated, and whether its weights stay on the device.
        format: of what that state consists: what `model.optimizer(...)` declared, or masters for torch's optimizers.
        memory: the estimate for the program the plan was made for.
        exchanges: what its processes exchange in a step.
        notes: what the user should know, such as operations that stayed as Hugging Face wrote them.
    """

    placement: Placement = "auto"
    budget_bytes: int | None = None
    layout: Layout = field(default_factory=lambda: Layout(()))
    mesh: Mesh = ONE_PROCESS
    mode: str = ""
    sequence: bool = False
    table: tuple[tuple[str, str], ...] = ()
    outputs: Outputs = "loss"
    zero: int = 0
    reduce_dtype: ReduceDtype = "fp32"
    recompute: tuple[str, ...] = ()
    prefetch: int = 1
    fuse_loss: bool = False
    homes: Homes = ()
    format: StateFormat = field(default_factory=TorchFormat)
    memory: MemoryEstimate = MemoryEstimate()
    exchanges: tuple[Exchange, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        return self.memory.peak_bytes

    @property
    def batches(self) -> int:
        """How many batches make one step's."""
        return self.mesh.data_size

    def shards(self, chunk: ChunkLayout) -> int:
        """How many processes share out a chunk's training state."""
        divided = self.zero == 3 or (self.zero > 0 and chunk.trainable)
        return self.mesh.ranks_over(chunk.reduced_over) if divided else 1

    def placed(self, homes: Homes) -> list[tuple[ChunkLayout, Home]]:
        """The chunks with a home for each, the plan's own or others."""
        return list(zip(self.layout.chunks, homes, strict=True))

    def with_homes(self, homes: Homes, memory: MemoryEstimate) -> "Plan":
        return replace(self, homes=homes, memory=memory)

    # -- text ----------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        return write_json(self)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Raises ValueError naming the fields where the text is not a plan."""
        return read_json(text, cls)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def __str__(self) -> str:
        chunks, homes = self.layout.chunks, self.homes
        there, streamed = numbers(homes, Where.DEVICE), numbers(homes, Where.STREAMED)
        computing = {index for index in there if chunks[index].shards == 1}
        staying = {index for index, home in enumerate(homes) if home.resident} - computing
        rows = [
            ("placement", self.placement),
            ("device budget", _amount(self.budget_bytes)),
            *([("processes", str(self.mesh))] if self.mesh.size > 1 else []),
            *(
                [("tensor parallel", self.mode + (", along the sequence" if self.sequence else ""))]
                if self.mode
                else []
            ),
            *([("ZeRO", f"stage {self.zero}, over {_replicas(self.mesh)}")] if self.zero else []),
            *([("gradients", _summed(self.reduce_dtype))] if self.mesh.replica_axes else []),
            *(
                (f"  received along {e.axis}", f"{_amount(e.received_bytes)} by {e.count} {e.collective}(s)")
                for e in self.exchanges
            ),
            ("planned device peak", _amount(self.memory.peak_bytes)),
            ("  of it always there", _amount(self.memory.static_bytes)),
            *((f"  at the peak: {name}", _amount(amount)) for name, amount in self.memory.at_peak[:6]),
            ("planned host memory", _amount(self.memory.host_bytes)),
            (
                "chunks",
                f"{len(chunks)}, largest {_amount(max((c.compute_bytes for c in chunks), default=0))}",
            ),
            ("  training state on the device", f"{len(there)} of {len(chunks)}"),
            ("  weights stay through a step", f"{len(staying)} of {len(chunks)}"),
            *([("  updated on their way through", f"{len(streamed)} of {len(chunks)}")] if streamed else []),
            ("optimizer", str(self.format)),
            ("prefetch", f"{self.prefetch} chunk(s) ahead"),
            ("recompute", f"{len(self.recompute)} block(s)"),
            *([("loss", "in pieces, its logits are not computed")] if self.fuse_loss else []),
            *(("note", text) for text in self.notes),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _replicas(mesh: Mesh) -> str:
    return taken_together(names_of(mesh.replica_axes)) or "one process"


def _summed(reduce_dtype: ReduceDtype) -> str:
    return f"added up in {'float32 and rounded once' if reduce_dtype == 'fp32' else 'the dtype they are computed in'}"


def _amount(num_bytes: int | None) -> str:
    return "unlimited" if num_bytes is None else format_bytes(num_bytes)
