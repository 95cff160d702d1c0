"""Digests by which kept results are found again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

__all__ = ["state_digest"]


def state_digest(state: Mapping[str, torch.Tensor], options: object = None) -> str:
    """Hexadecimal digest, 32 digits, of tensors by name and of the ``repr`` of options."""
    digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
