"""Random modules and training steps, each the same wherever its number is drawn.

A module maps [batch, time, WIDTH] through some parts, which are joined in series, by sums, products, branches and
branches by argument, to one or more heads. Parts may be shared, weights tied or frozen. It returns its outputs alone,
in a tuple, a dict, a dataclass or nested, and computes a loss itself or leaves that to the loop.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.utils import ModelOutput

WIDTH, VOCAB, CLASSES = 8, 12, 4

# -- parts -------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """A product and an activation."""

    ACTIVATIONS = (torch.tanh, F.gelu, F.silu, F.softplus, F.elu, F.relu, F.leaky_relu, torch.sigmoid)

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=chance.random() < 0.7)
        self.activation = chance.choice(self.ACTIVATIONS)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.activation(self.linear(x))


class InPlace(nn.Module):
    """Writes to what it has computed: whole, in parts, through views."""

    WRITES: tuple[Callable[[Tensor, Tensor], Any], ...] = (
        lambda y, x: y.mul_(0.5),
        lambda y, x: y.add_(x),
        lambda y, x: F.relu_(y),
        lambda y, x: y[..., :3].mul_(2.0),
        lambda y, x: y.__setitem__((slice(None), 0), 0.0),
        lambda y, x: y[:, -1:].copy_(x[:, :1]),
        lambda y, x: y.masked_fill_(x > 1.0, 0.25),
        lambda y, x: y.transpose(1, 2)[:, 1].add_(1.0),
        lambda y, x: y.clamp_(-2.0, 2.0),
        lambda y, x: y.view(-1)[::3].zero_(),
    )

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.writes = chance.sample(self.WRITES, chance.randint(1, 3))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = self.linear(x)
        for write in self.writes:
            write(y, x)
        return y


class Strided(nn.Module):
    """Transposes, expands, slices, flips and rolls: results and gradients in unusual layouts."""

    WAYS: tuple[Callable[[Strided, Tensor], Tensor], ...] = (
        lambda m, x: (m.weight.t() @ x.transpose(1, 2)).transpose(1, 2),
        lambda m, x: torch.cat([x[..., ::2], x[..., 1::2]], -1) * m.row.expand(x.shape),
        lambda m, x: x.flip(1) + m.row.expand(x.shape[1], -1).t().t(),
        lambda m, x: torch.einsum("btw,wv->vbt", x, m.weight).permute(1, 2, 0),
        lambda m, x: x.roll(1, 1) * m.row[None, None].expand_as(x),
        lambda m, x: (x.transpose(0, 1).contiguous().transpose(0, 1) @ m.weight.t()).tanh(),
        lambda m, x: torch.stack([x, x * m.row], 0).unbind(0)[1],
        lambda m, x: sum(part @ m.weight[i * 4 : i * 4 + 4] for i, part in enumerate(x.chunk(2, -1))),
        lambda m, x: x.unfold(2, 2, 2).flatten(2) * m.row,
        lambda m, x: F.pad(x, (1, 0))[..., :-1] - m.weight.diagonal(),
        lambda m, x: x.gather(2, m.weight.detach().abs().argsort(-1)[0].expand(x.shape)) * m.row,
        lambda m, x: x[:, torch.arange(x.shape[1]).flip(0)] * m.weight.mean(0),
    )

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.weight, self.row = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.4), nn.Parameter(torch.randn(WIDTH))
        self.way = chance.choice(self.WAYS)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.way(self, x)


class Normed(nn.Module):
    """A norm: of features, of channels, of groups, of a batch in one or two dimensions."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.kind = chance.choice(["layer", "batch", "batch2d", "group", "instance", "rms"])
        self.norm = {
            "layer": lambda: nn.LayerNorm(WIDTH, elementwise_affine=chance.random() < 0.8),
            "batch": lambda: nn.BatchNorm1d(WIDTH, momentum=chance.choice([0.1, 0.5]), affine=chance.random() < 0.8),
            "batch2d": lambda: nn.BatchNorm2d(2, track_running_stats=chance.random() < 0.7),
            "group": lambda: nn.GroupNorm(2, WIDTH),
            "instance": lambda: nn.InstanceNorm1d(WIDTH, affine=True),
            "rms": lambda: nn.RMSNorm(WIDTH),
        }[self.kind]()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.kind in ("layer", "rms"):
            return self.norm(x)
        if self.kind == "batch2d":
            return self.norm(x.reshape(x.shape[0], 2, -1, 4)).reshape(x.shape)
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Convolved(nn.Module):
    """A convolution along time, or of the features as an image, and perhaps pooling or a transposed one."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.kind = chance.choice(["1d", "2d", "transposed", "pooled", "depthwise"])
        self.conv = {
            "1d": lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
            "2d": lambda: nn.Conv2d(1, 3, 3, padding=1),
            "transposed": lambda: nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1),
            "pooled": lambda: nn.Conv1d(WIDTH, WIDTH, 2, stride=2),
            "depthwise": lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False),
        }[self.kind]()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.kind == "2d":
            return self.conv(x[:, None]).amax(1)
        y = self.conv(x.transpose(1, 2))
        y = F.interpolate(y, size=x.shape[1]) if self.kind == "pooled" else y
        return y.transpose(1, 2)


class Dropped(nn.Module):
    """Some kind of dropout, or noise."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        rate = chance.choice([0.1, 0.5])
        self.drop = chance.choice([nn.Dropout(rate), nn.Dropout1d(rate), nn.AlphaDropout(rate), Noise(), nn.RReLU()])

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.drop(x)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


class Embedded(nn.Module):
    """Adds rows of a table."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH, padding_idx=chance.choice([None, 0]))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + self.table(ids)


class Buffered(nn.Module):
    """Reads buffers and updates them, in place or by assignment, before or behind reading."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.way = chance.choice(["read", "in place", "assigned", "counted", "written, then read", "a row"])
        self.register_buffer("mean", torch.randn(WIDTH), persistent=chance.random() < 0.7)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        found = x.detach().mean((0, 1))
        if self.way == "in place":
            y = (x - self.mean.clone()) * self.scale
            self.mean.mul_(0.9).add_(found, alpha=0.1)
            return y
        if self.way == "assigned":
            y = (x - self.mean) * self.scale * self.mean
            self.mean = 0.9 * self.mean + 0.1 * found
            return y
        if self.way == "counted":
            self.count += 1
            return x * self.scale / self.count
        if self.way == "written, then read":
            self.mean.copy_(found)
            return x * self.scale + self.mean
        if self.way == "a row":
            self.mean[1:3] = found[:2]
            self.count = self.count + ids.max()
            return x + self.scale * self.mean
        return (x - self.mean) * self.scale


class Attended(nn.Module):
    """Attention written out."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.project, self.causal = nn.Linear(WIDTH, 3 * WIDTH), chance.random() < 0.5

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / 2.0
        if self.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


PARTS = (Dense, Dense, InPlace, Strided, Strided, Normed, Convolved, Dropped, Embedded, Buffered, Attended)

# -- joints ------------------------------------------------------------------------------------------------

JOINTS: tuple[Callable[..., Tensor], ...] = (
    lambda h, early, flag, f, g: f(h),
    lambda h, early, flag, f, g: h + f(h),
    lambda h, early, flag, f, g: f(h) * torch.sigmoid(g(h)),
    lambda h, early, flag, f, g: f(h) if flag else g(h),
    lambda h, early, flag, f, g: f(h) + (g(h) if flag else h),
    lambda h, early, flag, f, g: f(f(h)),
    lambda h, early, flag, f, g: f(h) - early,
    lambda h, early, flag, f, g: torch.where(h > 0, f(h), g(early)),
    lambda h, early, flag, f, g: (1.5 * f(h)).add_(g(h)),
)
"""How the value so far, an earlier one and two parts make the next value."""

# -- results -----------------------------------------------------------------------------------------------


@dataclass
class Pair(ModelOutput):
    """What Hugging Face's models return."""

    first: Tensor | None = None
    second: Any = None


EXTRAS: tuple[Callable[..., Any], ...] = (
    lambda x, h, out: h,
    lambda x, h, out: out,
    lambda x, h, out: x,
    lambda x, h, out: out[0],
    lambda x, h, out: out.transpose(0, 1),
    lambda x, h, out: h.detach(),
    lambda x, h, out: out.argmax(-1),
    lambda x, h, out: None,
    lambda x, h, out: 3,
    lambda x, h, out: h.mean((0, 1)).expand(3, WIDTH),
)
"""What is returned beside the heads' values."""

RESULTS: tuple[Callable[[list[Any]], Any], ...] = (
    tuple,
    list,
    lambda outs: {f"out_{i}": out for i, out in enumerate(outs)},
    lambda outs: {"first": outs[0], "rest": [outs[1:], ("name", None)]},
    lambda outs: Pair(first=outs[0], second=tuple(outs[1:])),
)

LOSSES: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "cross_entropy": lambda out, batch: F.cross_entropy(out.flatten(0, 1), batch.labels.flatten()),
    "ignoring": lambda out, batch: F.cross_entropy(out.flatten(0, 1), batch.labels.flatten(), ignore_index=0),
    "smoothed": lambda out, batch: F.cross_entropy(out.transpose(1, 2), batch.labels, label_smoothing=0.1),
    "mse": lambda out, batch: F.mse_loss(out, batch.target),
    "mse, summed": lambda out, batch: F.mse_loss(out, batch.target, reduction="sum"),
    "smooth_l1": lambda out, batch: F.smooth_l1_loss(out, batch.target),
    "huber": lambda out, batch: F.huber_loss(out, batch.target),
    "bce": lambda out, batch: F.binary_cross_entropy_with_logits(out, batch.target.sigmoid()),
    "l1": lambda out, batch: F.l1_loss(out, batch.target),
    "kl": lambda out, batch: F.kl_div(out.log_softmax(-1), batch.target.softmax(-1), reduction="batchmean"),
}


@dataclass
class Batch:
    """What a step is called with."""

    x: Tensor
    ids: Tensor
    flag: bool
    labels: Tensor
    target: Tensor


class RandomModule(nn.Module):
    """The module of a number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        chance = random.Random(number)
        torch.manual_seed(number)
        self.blocks = nn.ModuleList(chance.choice(PARTS)(chance) for _ in range(chance.randint(1, 5)))
        self.joints = [
            (chance.choice(JOINTS), chance.randrange(len(self.blocks)), chance.randrange(len(self.blocks)))
            for _ in range(chance.randint(1, 5))
        ]
        self.heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(chance.choice([1, 1, 2, 3])))
        self.unused = nn.Linear(2, 2) if chance.random() < 0.3 else None
        self.extras = chance.sample(EXTRAS, chance.choice([0, 0, 1, 2]))
        self.result = chance.choice(RESULTS)
        self.loss = chance.choice(list(LOSSES)) if chance.random() < 0.5 else None
        self.names_loss = chance.random() < 0.6
        self._tie(chance)
        self._freeze(chance)

    def _tie(self, chance: random.Random) -> None:
        linears = [part.linear for part in self.blocks if isinstance(part, Dense | InPlace)]
        if len(linears) > 1 and chance.random() < 0.5:
            first, second = chance.sample(linears, 2)
            second.weight = first.weight
        if len(self.heads) > 1 and chance.random() < 0.3:
            self.heads[1].weight = self.heads[0].weight
        if chance.random() < 0.15:
            self.blocks.append(self.blocks[0])

    def _freeze(self, chance: random.Random) -> None:
        if chance.random() < 0.4:
            for parameter in list(self.parameters())[:-2]:  # the last head learns
                parameter.requires_grad_(chance.random() < 0.7)

    def forward(self, x: Tensor, ids: Tensor, flag: bool = True, labels: Tensor | None = None,
                target: Tensor | None = None) -> Any:  # fmt: skip
        h = early = x
        for joint, f, g in self.joints:
            f, g = (lambda value, part=self.blocks[i]: part(value, ids) for i in (f, g))
            h, early = joint(h, early, flag, f, g), h
        outs: list[Any] = [head(value) for head, value in zip(self.heads, (h, early, h), strict=False)]
        outs += [extra(x, h, outs[0]) for extra in self.extras]
        if labels is None:
            return outs[0] if len(outs) == 1 else self.result(outs)
        loss = LOSSES[self.loss](outs[0], Batch(x, ids, flag, labels, target))
        return {"loss": loss, "outs": outs} if self.names_loss else (loss, self.result(outs))


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


# -- steps -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A random module's batches and losses."""

    number: int

    def module(self) -> RandomModule:
        return RandomModule(self.number)

    def batch(self, step: int) -> Batch:
        """Of one shape in all steps; in how `x` is laid out, and whether it takes a gradient, too."""
        chance = random.Random(self.number)
        rows, times = chance.randint(2, 4), chance.choice([2, 4, 6])
        generator = torch.Generator().manual_seed(1000 * self.number + step)
        x = torch.randn(rows, times, WIDTH, generator=generator)
        x = chance.choice([x, x, x.transpose(0, 1).contiguous().transpose(0, 1), x.repeat(1, 1, 2)[..., ::2]])
        flag = True if chance.random() < 0.5 else (self.number + step) % 2 == 0
        ids, labels = torch.randint(0, VOCAB, (2, rows, times), generator=generator)
        target = torch.randn(rows, times, CLASSES, generator=generator)
        return Batch(x.requires_grad_(chance.random() < 0.3), ids, flag, labels % CLASSES, target)

    def arguments(self, batch: Batch, has_loss: bool) -> dict[str, Any]:
        """Of one call of the module."""
        more = {"labels": batch.labels, "target": batch.target} if has_loss else {}
        return {"x": batch.x, "ids": batch.ids, "flag": batch.flag, **more}

    def loss(self, result: Any, batch: Batch, step: int, has_loss: bool) -> Tensor:
        """The module's own, or one of some of its outputs, which are others in every step."""
        if has_loss:
            return result["loss"] if isinstance(result, dict) else result[0]
        chance = random.Random(self.number + 7919 * step)
        outs = [out for out in pytree.tree_leaves(result) if isinstance(out, Tensor) and out.requires_grad]
        used = chance.sample(outs, chance.randint(1, len(outs)))
        return sum(((i + 1) * out).square().mean() for i, out in enumerate(used))
