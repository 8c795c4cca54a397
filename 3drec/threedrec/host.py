"""What the process around a reconstruction lends it, so that many reconstructions in one process share what can be."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from threedrec import registry
from threedrec.image import SupportView


class Interrupted(KeyboardInterrupt):
    """A reconstruction ended early because its host asked it to; its checkpoint is up to date."""


class GuidancePool:
    """The guidance that was loaded last, kept for the next reconstruction that asks for the same one.

    One is kept, not many: a diffusion model is most of what a GPU holds. The same guidance serves one reconstruction
    at a time, which calls its ``prepare`` first.
    """

    def __init__(self) -> None:
        self._key: tuple[str, str, str] | None = None
        self._guidance: Any = None
        self.loads = 0
        """How often a guidance was loaded."""

    def get(self, guidance_type: str, config: Any, device: torch.device) -> Any:
        """Return the guidance of a config on a device, loading it unless it is the one at hand.

        Raises:
            InputError: unknown type, or its weights cannot be loaded.
        """
        key = (guidance_type, json.dumps(asdict(config), sort_keys=True, default=str), str(device))
        if key != self._key:
            self._key = self._guidance = None  # the old one's memory first
            self._guidance = registry.find("guidance", guidance_type)(config, device)
            self._key = key
            self.loads += 1
        return self._guidance


def _never() -> bool:
    return False


def _unknown() -> None:
    """Tell nothing."""


def _silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass
class Host:
    """Everything a reconstruction may be lent; by default nothing, and it does all by itself."""

    guidances: GuidancePool = field(default_factory=GuidancePool)
    support: SupportView | None = None
    """The image, read already."""
    stop: Callable[[], bool] = _never
    """Asked between steps; when true, a checkpoint is written and `Interrupted` raised."""
    progress: Callable[[str, int, int], None] = _silent
    """Told the stage, its steps that are done, and all of them."""
    startup_seconds: Callable[[], float | None] = _unknown
    """Asked when the reconstruction begins: how long its process needed to get there, None where that has no answer."""
