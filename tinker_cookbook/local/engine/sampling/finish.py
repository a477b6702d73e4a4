"""How sequences and requests end: finished, failed or cancelled."""

from __future__ import annotations

from collections import abc

from tinker_cookbook.local.engine.sampling.row_allocator import RowAllocator
from tinker_cookbook.local.engine.sampling.running import RunningSequences
from tinker_cookbook.local.engine.sampling.sequence import Request, Sequence, SequenceStatus
from tinker_cookbook.local.engine.sampling.waiting_queue import WaitingQueue

__all__ = ["Finisher"]


class Finisher:
    """Ends sequences, gives back what they held, and resolves the futures of their requests."""

    def __init__(self, queue: WaitingQueue, running: RunningSequences, rows: RowAllocator) -> None:
        self._queue = queue
        self._running = running
        self._rows = rows

    def finish(self, sequences: abc.Sequence[Sequence]) -> None:
        """End sequences that have their last tokens, and the requests that have no others.

        Clients get their answers first. Only then keys and values are copied for later prompts,
        which takes a millisecond per sequence.
        """
        ended = [sequence for sequence in sequences if not sequence.request.future.done()]
        decoded = [sequence.status is SequenceStatus.DECODING for sequence in ended]
        for sequence in ended:
            self._running.remove(sequence)
            sequence.status = SequenceStatus.FINISHED
        for sequence in ended:
            request = sequence.request
            if request.finish(sequence) and request.future.set_running_or_notify_cancel():
                request.future.set_result(request.result())
        # from the last row of a pool on, no other row moves
        for sequence, has_decoded in reversed(list(zip(ended, decoded, strict=True))):
            if has_decoded:
                self._rows.remember(sequence)
            self._rows.release(sequence)

    def fail(self, request: Request, error: Exception) -> None:
        """End a request with an error."""
        if not request.future.done() and request.future.set_running_or_notify_cancel():
            request.future.set_exception(error)
        self._abort(request)

    def fail_all(self, error: Exception) -> None:
        """End every queued and running request with an error."""
        for request in self.requests():
            self.fail(request, error)

    def drop_cancelled(self) -> None:
        """Abort the requests whose clients have cancelled them."""
        for request in self.requests():
            if request.future.cancelled():
                self._abort(request)

    def requests(self) -> list[Request]:
        """Return every queued and running request once."""
        started = (*self._running.sequences(), *self._queue.suspended())
        owners = (sequence.request for sequence in started)
        return list(dict.fromkeys([*self._queue.requests(), *owners]))

    def _abort(self, request: Request) -> None:
        """Remove a request and all of its sequences, and free their rows."""
        held = (*request.waiting, *self._queue.suspended(), *self._running.sequences())
        self._queue.drop(request)
        for sequence in held:
            if sequence.request is request:
                self._running.remove(sequence)
                self._rows.release(sequence)
                sequence.status = SequenceStatus.ABORTED
