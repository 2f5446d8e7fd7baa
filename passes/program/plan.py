"""The Plan: every decision about one model, as frozen data. Passes act on it and never decide.

Print it, save it as JSON, edit it, feed it back with `compile(..., plan="plan.json")`.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ...runtime.isa.layout import ChunkLayout, Layout, Slot, TorchUpdates, Updates
from ...runtime.isa.mesh import ONE_PROCESS, Axis, Mesh, names_of, taken_together
from ...runtime.isa.precision import ReduceDtype
from ...runtime.isa.units import format_bytes

Placement = Literal["cuda", "cpu", "auto"]
Outputs = Literal["loss", "all"]


@dataclass(frozen=True)
class Residency:
    """Where the chunks live, by chunk number: data, changed without touching a program.

    A chunk in `masters` has its whole training state on the device: master, gradients, optimizer state. Of
    every other chunk the state is on the host, and the weights that compute are streamed to the device for
    each use, or, in `weights`, stay there. The host updates what it holds but for the chunks in `streamed`,
    whose states travel through the device to be updated there (with `model.optimizer(...)` only).
    """

    masters: frozenset[int] = frozenset()
    weights: frozenset[int] = frozenset()
    streamed: frozenset[int] = frozenset()

    @property
    def on_device(self) -> frozenset[int]:
        return self.masters | self.weights


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
        residency: which chunks stay on the device.
        updates: what `model.optimizer(...)` declared; None where a torch optimizer updates the masters.
        optimizer_state_bytes: bytes of a torch optimizer's state per trainable element that are planned for.
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
    residency: Residency = Residency()
    updates: Updates | None = None
    optimizer_state_bytes: int = 8
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

    @property
    def training_state(self) -> Updates | TorchUpdates:
        """What tells how much memory a chunk's training state takes."""
        return self.updates or TorchUpdates(self.optimizer_state_bytes)

    def with_residency(self, residency: Residency, memory: MemoryEstimate) -> "Plan":
        return replace(self, residency=residency, memory=memory)

    # -- text ----------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, default=_encode)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Raises ValueError naming the field where the text is not a plan."""
        try:
            return _decode_plan(json.loads(text))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a geminifx plan: {error}; expected what Plan.to_json writes") from error

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def __str__(self) -> str:
        chunks = self.layout.chunks
        weights, masters, streamed = self.residency.weights, self.residency.masters, self.residency.streamed
        computing = {index for index in masters if chunks[index].shards == 1}
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
            ("  training state on the device", f"{len(masters)} of {len(chunks)}"),
            ("  weights stay through a step", f"{len(weights - computing)} of {len(chunks)}"),
            *([("  updated on their way through", f"{len(streamed)} of {len(chunks)}")] if streamed else []),
            ("optimizer", _optimizer(self.updates)),
            ("prefetch", f"{self.prefetch} chunk(s) ahead"),
            ("recompute", f"{len(self.recompute)} block(s)"),
            *([("loss", "in pieces, its logits are not computed")] if self.fuse_loss else []),
            *(("note", text) for text in self.notes),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _optimizer(updates: Updates | None) -> str:
    if updates is None:
        return "any of torch's, over parameters()"
    when = "in the backward" if updates.in_backward else "from step() on"
    many = f", {updates.accumulate} backwards each" if updates.accumulate > 1 else ""
    return f"the model's own, {when}{many}"


def _replicas(mesh: Mesh) -> str:
    return taken_together(names_of(mesh.replica_axes)) or "one process"


def _summed(reduce_dtype: ReduceDtype) -> str:
    return f"added up in {'float32 and rounded once' if reduce_dtype == 'fp32' else 'the dtype they are computed in'}"


def _amount(num_bytes: int | None) -> str:
    return "unlimited" if num_bytes is None else format_bytes(num_bytes)


def _encode(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"cannot write {value!r} as JSON")


def _decode_plan(data: dict[str, Any]) -> Plan:
    chunks = tuple(
        ChunkLayout(
            **{**chunk, "dtype": _decode_dtype(chunk["dtype"]),
               "master_dtype": _decode_dtype(chunk["master_dtype"]),
               "reduced_over": tuple(chunk["reduced_over"]),
               "slots": tuple(Slot(**{**s, "shape": tuple(s["shape"])}) for s in chunk["slots"])}
        )
        for chunk in data["layout"]["chunks"]
    )  # fmt: skip
    memory = {**data["memory"], "at_peak": tuple((name, n) for name, n in data["memory"]["at_peak"])}
    changes = {
        "layout": Layout(chunks, tuple((a, b) for a, b in data["layout"]["tied"])),
        "recompute": tuple(data["recompute"]),
        "residency": Residency(**{key: frozenset(value) for key, value in data["residency"].items()}),
        "table": tuple((pattern, text) for pattern, text in data["table"]),
        "mesh": Mesh(tuple(Axis(**axis) for axis in data["mesh"]["axes"])),
        "exchanges": tuple(Exchange(**exchange) for exchange in data["exchanges"]),
        "memory": MemoryEstimate(**memory),
        "updates": None if data["updates"] is None else Updates(**data["updates"]),
        "notes": tuple(data["notes"]),
    }
    if data["placement"] not in get_args(Placement):
        raise ValueError(f"placement is {data['placement']!r}, expected one of {', '.join(get_args(Placement))}")
    if data.get("outputs", "loss") not in get_args(Outputs):
        raise ValueError(f"outputs is {data['outputs']!r}, expected one of {', '.join(get_args(Outputs))}")
    if data.get("reduce_dtype", "fp32") not in get_args(ReduceDtype):
        expected = ", ".join(get_args(ReduceDtype))
        raise ValueError(f"reduce_dtype is {data['reduce_dtype']!r}, expected one of {expected}")
    if data["prefetch"] < 0:
        raise ValueError(f"prefetch is {data['prefetch']}, expected 0 or more chunks")
    if not isinstance(data.get("fuse_loss", False), bool):
        raise ValueError(f"fuse_loss is {data['fuse_loss']!r}, expected true or false")
    return Plan(**{**data, **changes})


def _decode_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype
