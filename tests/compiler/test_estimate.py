"""Estimates from a part of a model are those of the whole: the same plans, to the byte and the clock's last digit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from geminifx.compiler.cli.compare import batch_by_shapes
from geminifx.compiler.estimate import Estimated, Machine, _Source, _Step, estimates
from geminifx.compiler.planner import lengthened
from geminifx.compiler.planner.packing import Together
from geminifx.compiler.rates.choice import given_rates
from geminifx.runtime.isa.formats import OwnFormat
from geminifx.runtime.isa.homes import Home
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedModel

pytestmark = pytest.mark.usefixtures("shared")

SIZES: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4, "vocab_size": 3000,
                         "max_position_embeddings": 256}  # fmt: skip


def opt(**changes: Any) -> PreTrainedModel:
    return made(OPTConfig(**SIZES | {"ffn_dim": 512, "word_embed_proj_dim": 128, "dropout": 0.1} | changes))


def llama(**changes: Any) -> PreTrainedModel:
    return made(LlamaConfig(**SIZES | {"intermediate_size": 384, "num_key_value_heads": 2} | changes))


def made(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def estimated(build: Callable[[], PreTrainedModel], device: str, host: str, whole: bool) -> Iterator[Estimated]:
    rates = given_rates("h200")
    assert rates is not None
    machine = Machine.of(device, host, rates)
    return estimates(build, batch_by_shapes(build(), 8, 256), machine, whole=whole)


@pytest.fixture
def lowered_parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks of each part that is lowered."""
    seen: list[int] = []
    learn = lengthened._Known.learn

    def watched(self: Any, *args: Any) -> None:
        seen.append(len(self.part.blocks))
        learn(self, *args)

    monkeypatch.setattr(lengthened._Known, "learn", watched)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "chunk_bytes"), [(opt, None), (llama, 150 * 2**10)], ids=["opt", "llama, several chunks a block"]
)
def test_parts_tell_what_the_whole_tells(build: Any, chunk_bytes: int | None, lowered_parts: list[int],
                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Also where adapters of many blocks share a chunk, which is as long as the whole model's."""
    if chunk_bytes is not None:
        monkeypatch.setattr("geminifx.compiler.planner.packing.LARGEST_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("geminifx.passes.offload.SMALLEST_BYTES", 2**16)
    found = list(estimated(build, "1.59GB", "60MB", whole=False))
    assert lowered_parts and max(lowered_parts) < SIZES["num_hidden_layers"]
    parts = len(lowered_parts)
    expected = list(estimated(build, "1.59GB", "60MB", whole=True))
    assert len(lowered_parts) == parts, "the whole is lowered as it is"
    assert [(one.state, one.lacking) for one in found] == [(one.state, one.lacking) for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.plan == other.plan


class Block(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(128, 512), nn.Linear(512, 128), activation

    def forward(self, x: Tensor, mask: Tensor | float = 0.0) -> Tensor:
        return x + self.down(self.activation(self.up(x) + mask))


class Chain(nn.Module):
    """Blocks of which each reads the one before it."""

    activations: tuple[Callable[[Tensor], Tensor], ...] = (F.relu,) * 12

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(500, 128), nn.Linear(128, 500)
        self.layers = nn.ModuleList(map(Block, self.activations))

    def body(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        seen: list[Tensor] = []
        logits = self.head(self.body(self.embed(input_ids), seen))
        told = {"told": torch.cat(seen).float().mean()} if seen else {}
        return {"loss": F.cross_entropy(logits.view(-1, 500), labels.view(-1)), **told}


class Counted(Chain):
    """Takes its blocks by their numbers, up to a count of its own."""

    def body(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        for number in range(len(self.activations)):
            x = self.layers[number](x)
        return x


class Gathered(Chain):
    """All blocks' outputs are read at the end, without a gradient."""

    def body(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            seen.append(x.detach())
        return x


class Masked(Chain):
    """All blocks read a large mask; whoever is recomputed reads it in the backward, too."""

    def body(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        mask = -9.0 * (x.detach().repeat(1, 1, 4) > 0).to(x.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class TwoKinds(Chain):
    activations = (F.relu,) * 8 + (lambda x: F.gelu(F.gelu(x) * torch.sigmoid(x)),) * 4


KINDS = (Chain, Counted, Gathered, TwoKinds)


@pytest.mark.parametrize("kind", [Masked, *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)])
def test_parts_of_odd_models_tell_what_the_whole_tells(kind: type[Chain], lowered_parts: list[int]) -> None:
    """Or the whole is captured."""

    def build() -> Chain:
        with torch.device("meta"):
            return kind().train()

    rates = given_rates("h200")
    assert rates is not None
    batch = {name: torch.empty((8, 256), dtype=torch.long, device="meta") for name in ("input_ids", "labels")}
    for device in ("1.6GB", "1.448GB", "1.44GB"):
        lowered_parts.clear()
        found, expected = (
            next(estimates(build, batch, Machine.of(device, "1GB", rates), whole=whole)) for whole in (False, True)
        )
        assert found == expected
        assert bool(lowered_parts) == (kind is Chain) or kind in (Gathered, Masked)


def test_a_model_of_few_or_unlike_blocks_is_captured_as_a_whole(lowered_parts: list[int]) -> None:
    found, expected = (
        next(estimated(lambda: opt(num_hidden_layers=2), "1.59GB", "60MB", whole)) for whole in (False, True)
    )
    assert found == expected and found.plan is not None
    assert not lowered_parts


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_parts_are_long_enough_for_copies_that_start_early(ahead: int) -> None:
    """Each block is a chunk, so that what one holds depends on as many blocks behind it as copies start ahead."""
    rates = given_rates("h200")
    assert rates is not None
    step = _Step(_Source(opt, False), batch_by_shapes(opt(), 8, 256), Machine.of("1.59GB", "60MB", rates), whole=False)
    told, limits = step.planning.lengthened, step.planning.limits
    assert told is not None
    layout = told.layout(Together(1))
    plan = replace(step.planning.shared(), layout=layout, homes=(Home(),) * len(layout.chunks), format=OwnFormat(),
                   recompute=told.blocks[:6], prefetch=ahead)  # fmt: skip
    step.planning.lengthened = None
    whole = step.planning._lower(step._captured(step.session), plan)
    (memory, time), (expected, whole_time) = (each.on(plan, limits) for each in (told.lower(plan, rates), whole))
    assert memory.estimate(plan.homes) == expected.estimate(plan.homes)
    assert time.seconds(plan, plan.homes) == whole_time.seconds(plan, plan.homes)


@pytest.mark.slow
def test_a_layout_is_that_of_the_whole_model() -> None:
    rates = given_rates("h200")
    assert rates is not None
    batch, machine = batch_by_shapes(llama(), 2, 16), Machine.of(None, "1GB", rates)
    for is_adapted in (False, True):
        step = _Step(_Source(llama, is_adapted), batch, machine, whole=False)
        told = step.planning.lengthened
        assert told is not None
        step.planning.lengthened = None
        captured = step._captured(step.session)
        for unit in (1, 256):
            format = of_unit(unit)
            assert told.layout(Together(unit)) == step.planning._layout(captured, step.planning.shared(), format)


def of_unit(unit: int) -> OwnFormat:
    found = OwnFormat(in_backward=True, stored="int8" if unit > 1 else "exact")
    assert found.unit == unit
    return found
