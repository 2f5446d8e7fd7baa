"""Home: where a chunk's training state lies, where it is updated, and whether its weights stay on the device.

A plan has one home per chunk, and all code that needs to know where a chunk is asks it: the planner and its simulation,
the state stores, reports. The bytes that a home takes follow from the state's format (`formats`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum


class Where(Enum):
    """Where a chunk's training state lies, and where it is updated."""

    DEVICE = "device"
    """On the device, and updated there."""

    HOST = "host"
    """On the host, and updated there."""

    STREAMED = "streamed"
    """On the host, and updated on the device, through which it is streamed once a step."""


@dataclass(frozen=True)
class Home:
    """The home of one chunk.

    Fields:
        where: where the training state lies and is updated.
        resident: the weights that programs compute with stay on the device between uses, instead of being copied there,
            or gathered from the processes that shard the chunk, for each use.
        spare: the host has a second place for the state, where the next update is made during the backward, before
            `step()` confirms it.
        lands_apart: gradients that are used as soon as they reach the host land in a buffer of this chunk's own,
            instead of one of the few that chunks take turns in. Gradients that are held until `step()` have their own
            anyway.
    """

    where: Where = Where.HOST
    resident: bool = False
    spare: bool = False
    lands_apart: bool = False

    @property
    def on_device(self) -> bool:
        """Whether the whole training state lies on the device."""
        return self.where is Where.DEVICE

    @property
    def streamed(self) -> bool:
        """Whether the state is streamed through the device to be updated."""
        return self.where is Where.STREAMED

    @property
    def weights_on_device(self) -> bool:
        """Whether the state's own weights lie on the device: with the rest of the state, or staying there while it is
        streamed."""
        return self.on_device or (self.streamed and self.resident)

    @property
    def text(self) -> str:
        landing = ", gradients land apart" * self.lands_apart
        return self.where.value + ", weights stay" * self.resident + ", with a spare" * self.spare + landing


Homes = tuple[Home, ...]
"""By chunk number."""


def with_home(homes: Homes, index: int, home: Home) -> Homes:
    """`homes` with another home for one chunk."""
    return (*homes[:index], home, *homes[index + 1 :])


def resident(homes: Homes, index: int) -> Homes:
    """`homes` with one chunk's weights staying on the device."""
    return with_home(homes, index, replace(homes[index], resident=True))


def numbers(homes: Iterable[Home], where: Where) -> frozenset[int]:
    """The numbers of the chunks whose state is `where`."""
    return frozenset(index for index, home in enumerate(homes) if home.where is where)
