"""Random parameters that every process can make by itself (trainers and workers of the latency benchmark)."""

import zlib

import torch

from latency.models import STD
from rollcast.comm import ParamSpec


class SeededParams:
    """Makes the same values for the same parameter in every process with such a device.

    seeded = SeededParams(torch.device("cuda", 0))
    whole = seeded.make(spec)                  # float32
    """

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device)
        self._device = device

    def make(self, spec: ParamSpec) -> torch.Tensor:
        """Return the whole parameter in float32, on the device."""
        self._generator.manual_seed(zlib.crc32(spec.name.encode()))
        whole = torch.empty(spec.shape, dtype=torch.float32, device=self._device)
        return whole.normal_(std=STD, generator=self._generator)
