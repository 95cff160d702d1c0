"""Random transforms whose draws belong to the item, not to whoever loads it."""

from __future__ import annotations

from typing import Any

import numpy as np
from monai.data import Dataset
from monai.transforms import Randomizable

__all__ = ["ItemRandomDataset"]


class ItemRandomDataset(Dataset):
    """Dataset whose random transforms are seeded by (seed, index) for each item.

    An item then looks the same whatever was loaded before it, in which worker and in how many processes.
    :class:`~monai_vslp.handlers.EpochSeed` takes it as its ``transform`` and gives every epoch another seed.

    Args:
        data: items, as of MONAI's ``Dataset``.
        transform: a MONAI transform, such as ``Compose``; seeded if it is random.
        seed: until :meth:`set_random_state` gives another.
    """

    def __init__(self, data: Any, transform: Any = None, seed: int = 0) -> None:
        super().__init__(data, transform)
        self.seed = seed

    def set_random_state(self, seed: int | None = None, state: Any = None) -> ItemRandomDataset:
        """Draw by another seed from now on; ``state`` is there because MONAI's transforms have it."""
        self.seed = 0 if seed is None else seed
        return self

    def _transform(self, index: int) -> Any:
        if isinstance(self.transform, Randomizable):
            self.transform.set_random_state(seed=int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0]))
        return super()._transform(index)
