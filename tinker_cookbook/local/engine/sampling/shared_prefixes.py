"""Prefix sharing of requests for one token: most of these only score their prompts.

Once the prompt of such a request is computed, nothing reads its keys and values. So it gets no row
with a copy of a known prefix; it reads the prefix where it is stored, and only the rest of the
prompt is computed. Where much of a prompt is new, its keys and values are stored for the requests
that follow. Where a running prefill stores most of a waiting prompt, the request waits for that.
"""

from __future__ import annotations

from tinker_cookbook.local.engine.sampling.limits import SchedulerLimits
from tinker_cookbook.local.engine.sampling.prefix_store import PrefixStore, StoredPrefix
from tinker_cookbook.local.engine.sampling.running import Prefill
from tinker_cookbook.local.engine.sampling.sequence import Request
from tinker_cookbook.local.engine.sampling.waiting_queue import WaitingQueue

__all__ = ["SharedPrefixes"]

_ALIGNMENT = 4
"""Prefixes are read in place in multiples of this number of tokens, see `Chunk.prefix`."""
_LEAST_GAIN = 16
"""Minimum number of tokens that sharing must save."""
_NEW_SHARE = 8
"""A prompt is stored if at least one in this many of its tokens is new."""


class SharedPrefixes:
    """Decides which prompts read a stored prefix, which are stored, and which wait."""

    def __init__(
        self,
        store: PrefixStore | None,
        queue: WaitingQueue,
        limits: SchedulerLimits,
        overhead_tokens: int,
    ) -> None:
        """`overhead_tokens` is the fixed cost of a forward pass, as a number of tokens."""
        self._store = store
        self._queue = queue
        self._limits = limits
        # who waits for a prefix may need one more pass
        self._least_gain = max(_LEAST_GAIN, 2 * overhead_tokens)

    def waits(self, request: Request) -> bool:
        """Return whether a running prefill computes much more of the prompt than is stored."""
        if self._store is None or not request.is_single_pass:
            return False
        coming = self._store.num_coming(request.hashes)
        return coming >= self._least_gain and coming - self._find(request)[1] >= self._least_gain

    def begin(self, request: Request) -> Prefill | None:
        """Start a prompt without a row of the cache; None if it needs one."""
        if not request.is_single_pass:
            return None
        source, num_shared = self._find(request)
        remaining = len(request.prompt) - num_shared
        kept = self._begin_kept(request, num_shared)
        if kept is None and remaining > self._limits.max_batch_tokens:
            return None  # too long for one pass
        if kept is not None and source is not None:
            kept.start_from(source, num_shared)
        if source is not None and self._store is not None:
            self._store.pin(source)
        request.cache_hit_tokens = num_shared
        prefill = Prefill(request.waiting[0], request.prompt, num_shared)
        prefill.use(self._store, source, kept)
        return prefill

    def _find(self, request: Request) -> tuple[StoredPrefix | None, int]:
        if self._store is None:
            return None, 0
        return self._store.find(request.hashes, request.prompt, request.first_hidden, _ALIGNMENT)

    def _begin_kept(self, request: Request, num_shared: int) -> StoredPrefix | None:
        """Return a prefix for the whole prompt, if that may pay and there is room."""
        if self._store is None:
            return None
        num_new = len(request.prompt) - num_shared
        common = self._queue.num_shared(request)
        is_new = num_new >= max(_LEAST_GAIN, len(request.prompt) // _NEW_SHARE)
        if not is_new and common - num_shared < self._least_gain:
            return None
        return self._store.begin(request.adapter_key, request.prompt)
