"""Home: where a chunk's training state lies, where it is updated, and whether its weights stay on the device.

A plan has one for each chunk, and everybody who must know where a chunk is asks it: the planner and its clock, the
stores of states, reports. How many bytes that takes is for a state's format to say (`formats`).
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
    """On the host, and updated on the device, through which it travels once a step."""


@dataclass(frozen=True)
class Home:
    """One chunk's. `resident`: the weights that programs compute with stay on the device between their uses, and are
    not copied there, or gathered from the processes that share the chunk out, for each. `spare`: the host has a second
    place for the state, where the next update is made beside the backward, before `step()` says that it counts.
    `lands_apart`: gradients that are used up as they come to the host have a place of their own to land in, where those
    of other chunks take turns in a few; those that are held until `step()` have one anyway."""

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
        """Whether the state travels through the device to be updated."""
        return self.where is Where.STREAMED

    @property
    def weights_on_device(self) -> bool:
        """Whether the weights that belong to the state lie on the device: with the state, or because they stay there
        while the rest of it travels."""
        return self.on_device or (self.streamed and self.resident)

    @property
    def text(self) -> str:
        landing = ", gradients land apart" * self.lands_apart
        return self.where.value + ", weights stay" * self.resident + ", with a spare" * self.spare + landing


Homes = tuple[Home, ...]
"""By chunk number."""


def with_home(homes: Homes, index: int, home: Home) -> Homes:
    """The same homes, but for one chunk's."""
    return (*homes[:index], home, *homes[index + 1 :])


def resident(homes: Homes, index: int) -> Homes:
    """The same homes, but that one chunk's weights stay on the device."""
    return with_home(homes, index, replace(homes[index], resident=True))


def numbers(homes: Iterable[Home], where: Where) -> frozenset[int]:
    """The numbers of the chunks whose state is `where`."""
    return frozenset(index for index, home in enumerate(homes) if home.where is where)
