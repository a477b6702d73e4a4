"""Forward passes that are kept until the backward pass of a later request.

A client that computes its own loss sends each batch twice: `forward` returns log probabilities, and
`forward_backward` takes weights that the client computed from them. Nothing has changed in between,
so the second request can start from what the first one computed. The results have the same bits.

A run keeps passes only after it has sent the same data to both requests in its last step, and only
where memory is plentiful: a pass that is not kept is computed again.
"""

from __future__ import annotations

import hashlib

from tinker_cookbook.local.engine.memory import available_bytes
from tinker_cookbook.local.engine.model.pack import Pack
from tinker_cookbook.local.engine.model.transformer import ForwardPass

__all__ = ["ForwardMemory"]

SPARE_FACTOR = 4
"""A pass is kept if the free memory is at least this many times as large."""


class ForwardMemory:
    """The kept passes of one run, oldest first."""

    def __init__(self) -> None:
        self._kept: dict[bytes, tuple[ForwardPass, int]] = {}
        """Passes and their bytes."""
        self._seen: set[bytes] = set()
        """Packs that `forward` has computed since the last optimizer step."""
        self._has_repeated = False
        self.is_worthwhile = False
        """Whether the last step sent packs to `forward` and then to `forward_backward`."""

    def can_keep(self, num_bytes: int, limit: int) -> bool:
        """Return whether a pass of this size should be kept.

        Args:
            num_bytes: Size of the pass.
            limit: Maximum bytes of all kept passes of the run.
        """
        if not self.is_worthwhile or num_bytes > limit:
            return False
        free = available_bytes()
        return free is None or free >= SPARE_FACTOR * num_bytes

    def note(self, pack: Pack) -> None:
        """Record that `forward` computes a pack."""
        self._seen.add(_key(pack))

    def keep(self, pack: Pack, kept: ForwardPass, num_bytes: int, limit: int) -> None:
        """Keep a pass of `forward`; the oldest ones are dropped beyond the limit."""
        self._kept[_key(pack)] = kept, num_bytes
        total = sum(size for _, size in self._kept.values())
        while total > limit:
            _, size = self._kept.pop(next(iter(self._kept)))
            total -= size

    def take(self, pack: Pack) -> ForwardPass | None:
        """Return the kept pass of a pack that is about to be run backward; it is used once."""
        key = _key(pack)
        self._has_repeated |= key in self._seen
        found = self._kept.pop(key, None)
        return None if found is None else found[0]

    def end_step(self) -> None:
        """Drop everything, because the weights change."""
        self.is_worthwhile, self._has_repeated = self._has_repeated, False
        self._kept.clear()
        self._seen.clear()


def _key(pack: Pack) -> bytes:
    """Return a digest of the tokens of a pack and of where its sequences end."""
    shared = None if pack.sharing is None else pack.sharing.shared
    digest = hashlib.sha256(repr((pack.lengths, shared)).encode())
    digest.update(pack.tokens.cpu().numpy().tobytes())
    return digest.digest()
