"""Ctrl-C ends a program at once: no traceback, exit status 130.

Python raises KeyboardInterrupt only in the main thread, and only between two of its instructions.
An event loop then still waits for its threads, which may be importing a large package. Therefore a
separate thread is told of each signal as well, and ends the process when that takes too long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

__all__ = [
    "EXIT_INTERRUPTED",
    "announce_interrupt",
    "end_on_interrupt",
    "hide_import_traceback",
    "kill_with_process",
    "leave_to_program",
    "mark_begun",
    "tell",
]

EXIT_INTERRUPTED = 130
GRACE_SECONDS = 1.0
REPEAT_SECONDS = 0.05
BEFORE_THE_RUN = "interrupted before the run began; the same command starts it"
CO_OPTIMIZED = 1
"""Flag of code objects that are functions, and not bodies of modules or classes."""
_guard: _Guard | None = None
_announced: list[None] = []
_kill: set[Callable[[], None]] = set()


def hide_import_traceback() -> None:
    """Make Ctrl-C end the program with one line while it is still importing modules."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _report_uncaught
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _report_ignored


def mark_begun() -> None:
    """Record that the run has begun: from here on the first Ctrl-C waits for a clean end."""
    if _guard is not None:
        _guard.has_begun = True


def kill_with_process(kill: Callable[[], None]) -> Callable[[], None]:
    """Register a child process, which is killed if this process is ended at once.

    Args:
        kill: Kills the child process.

    Returns:
        A function to call when the child has ended by itself.
    """
    _kill.add(kill)
    return lambda: _kill.discard(kill)


def announce_interrupt() -> None:
    """Announce that this process itself sends the next SIGINT: it does not count as Ctrl-C."""
    _announced.append(None)


def _is_announced() -> bool:
    try:
        _announced.pop()
    except IndexError:
        return False
    return True


def _kill_children() -> None:
    for kill in list(_kill):
        kill()


def leave_to_program() -> None:
    """Leave Ctrl-C to the program from here on: nothing in this module ends the process."""
    if _guard is not None:
        _guard.is_off = True


@contextlib.contextmanager
def end_on_interrupt(tell: Callable[[], str], clean_up: Callable[[], None]) -> Iterator[None]:
    """Make Ctrl-C in the block end the process soon, and a second Ctrl-C end it at once.

    KeyboardInterrupt is raised in the block as usual. In other threads, and inside another such
    block, this has no effect.

    Args:
        tell: Returns the line to print if the block does not end by itself.
        clean_up: Called before the process is ended from outside the block.
    """
    global _guard
    if _guard is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _guard = _Guard(tell, clean_up)
    hide_import_traceback()
    try:
        yield
    finally:
        _guard.close()
        _guard = None


class _Guard:
    """A thread that is told of every SIGINT."""

    def __init__(self, tell: Callable[[], str], clean_up: Callable[[], None]) -> None:
        self.has_begun = False
        self.is_off = False
        self._tell = tell
        self._clean_up = clean_up
        self._num_heard = 0
        self._leaving = threading.Lock()
        self._saying = threading.Lock()
        self._has_said = False
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="interrupts", daemon=True).start()

    def close(self) -> None:
        """Stop listening. After a Ctrl-C the process has `GRACE_SECONDS` to end by itself."""
        if self._num_heard:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._leave_later()
        signal.set_wakeup_fd(self._previous)
        os.close(self._writer)

    def _listen(self) -> None:
        while True:
            heard = os.read(self._reader, 1)
            if not heard:
                os.close(self._reader)
                return
            if heard[0] != signal.SIGINT or _is_announced() or self.is_off:
                continue
            self._num_heard += 1
            if self._num_heard > 1:
                self.leave()
            elif not self.has_begun:
                _kill_children()  # ends the main thread's wait for their start
                self._leave_later()

    def _leave_later(self) -> None:
        timer = threading.Timer(GRACE_SECONDS, self.leave)
        timer.daemon = True
        timer.start()

    def leave(self) -> None:
        """End the process now. Files and checkpoints are safe at any moment."""
        with self._leaving:  # never released: only one thread does this
            _kill_children()
            with contextlib.suppress(Exception):
                self._clean_up()
            with contextlib.suppress(OSError):
                self.say(self._tell(), _write_line)  # sys.stderr may be locked by another thread
            os._exit(EXIT_INTERRUPTED)

    def say(self, text: str, write: Callable[[str], None]) -> None:
        """Print the line about the interruption, unless another thread prints it."""
        if not self._saying.acquire(timeout=GRACE_SECONDS):
            return
        try:
            if not self._has_said:
                write(text)
                self._has_said = True
        finally:
            self._saying.release()


def tell(text: str) -> None:
    """Print the line about an interruption, unless it was printed before."""
    if _guard is None:
        _print_line(text)
        return
    # In the main thread, the next Ctrl-C could come between printing and taking note of it.
    speaker = threading.Thread(target=_guard.say, args=(text, _print_line), daemon=True)
    speaker.start()
    speaker.join()


def _print_line(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)


def _write_line(text: str) -> None:
    os.write(2, f"\n{text}\n".encode())


def _report_uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        if _guard is not None and not _guard.is_off:
            _guard.leave()
        if _is_importing(traceback):
            _leave_before_the_run()
    sys.__excepthook__(kind, error, traceback)


def _report_ignored(ignored: sys.UnraisableHookArgs) -> None:
    """Repeat a KeyboardInterrupt that Python has dropped.

    Python drops exceptions that nothing can catch, such as those in a finalizer. Without this the
    program would continue as if nobody had pressed Ctrl-C.
    """
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        if _guard is not None:
            later = threading.Timer(REPEAT_SECONDS, _interrupt_again)
            later.daemon = True
            later.start()
            return
        if _is_importing(ignored.exc_traceback):
            _leave_before_the_run()
    sys.__unraisablehook__(ignored)


def _interrupt_again() -> None:
    announce_interrupt()
    main = threading.main_thread().ident
    assert main is not None, "the main thread has been started"
    signal.pthread_kill(main, signal.SIGINT)  # a real signal: it also ends a sleep


def _leave_before_the_run() -> None:
    _write_line(BEFORE_THE_RUN)
    os._exit(EXIT_INTERRUPTED)


def _is_importing(traceback: TracebackType | None) -> bool:
    """Return whether only modules were being executed, no function of the program or toolkit."""
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    while traceback is not None:
        code = traceback.tb_frame.f_code
        words = ("tinker_cookbook", "asyncio")
        owned = code.co_filename == program or any(word in code.co_filename for word in words)
        if owned and code.co_flags & CO_OPTIMIZED:
            return False
        traceback = traceback.tb_next
    return True


def _forget_in_child() -> None:
    """Stop a forked child from reporting its signals to the parent's thread."""
    if _guard is not None:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)
