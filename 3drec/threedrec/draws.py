"""Single random numbers that the host needs: drawn without waiting for the device."""

import zlib

import torch


def host_generator(generator: torch.Generator | None) -> torch.Generator | None:
    """Return a generator on the CPU for draws whose values the host needs.

    A generator of a GPU stands for its place in its stream: the result is seeded by it, and the place moves on, so that
    the next draws, here or on the device, are others. A CPU's generator, or none, comes back as it is.
    """
    if generator is None or generator.device.type == "cpu":
        return generator
    place = generator.get_offset()
    # Places are multiples of four.
    generator.set_offset(place + 4)
    # Close seeds give unrelated streams only where all bits of the state are mixed.
    return torch.Generator().manual_seed(zlib.crc32(f"{generator.initial_seed()}/{place}".encode()))
