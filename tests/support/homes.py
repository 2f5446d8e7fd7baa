"""Homes of chunks by the numbers of those that are somewhere."""

from collections.abc import Collection

from geminifx.runtime.isa.homes import Home, Homes, Where

NONE: frozenset[int] = frozenset()


def homes(
    count: int, device: Collection[int] = NONE, resident: Collection[int] = NONE, streamed: Collection[int] = NONE
) -> Homes:
    """The homes of `count` chunks: on the host, but for those whose states are on the device, or are streamed."""
    where = [Where.DEVICE if i in device else Where.STREAMED if i in streamed else Where.HOST for i in range(count)]
    return tuple(Home(where[i], i in resident) for i in range(count))
