"""torch's default generator of a device, and per-process states derived from it."""

from hashlib import blake2b

import torch
from torch import Tensor

PHILOX_STEP = 4
"""The unit that the offset of a CUDA generator counts in."""


def generator_of(device: torch.device) -> torch.Generator:
    """The generator that operators on the device draw from."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


def fork(device: torch.device, coordinates: tuple[int, ...]) -> Tensor:
    """A generator state derived from the device's and from `coordinates`: processes whose generators are in the same
    state get a different one for every tuple of coordinates. Advances the device's own generator, by the same amount
    on all of them."""
    generator = generator_of(device)
    if device.type == "cuda":  # its seed and offset are on the host: no synchronization
        drawn = generator.initial_seed(), generator.get_offset()
        generator.set_offset(drawn[1] + PHILOX_STEP)
    else:
        drawn = int(torch.randint(2**32, (), generator=generator)), int(torch.randint(2**32, (), generator=generator))
    digest = blake2b(repr((drawn, coordinates)).encode(), digest_size=8).digest()
    own = torch.Generator(device)
    own.manual_seed(int.from_bytes(digest, "big") >> 1)
    return own.get_state()
