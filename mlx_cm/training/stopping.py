"""Signals that end a run: the first one is waited for, a second one is not."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

log = logging.getLogger("mlx_cm")

# Ctrl-C, `kill`, and a terminal or connection that is closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Which signal has come; 0: none."""

    signal: int = 0


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Takes note of signals instead of letting them break in; a second one ends the process at once.

    A thread of its own hears them, since Python's handlers have to wait for what MLX computes, maybe for minutes. What
    the process was started to ignore, as with `nohup`, stays ignored. Outside the main thread, which alone can set
    handlers, no request ever comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    listener = threading.Thread(target=_listen, args=(reader, heard, request), name="mlx-cm-signals", daemon=True)
    listener.start()
    previous_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, lambda *_: None) for number in heard}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_writer)
        os.close(writer)  # ends the listener
        listener.join()
        os.close(reader)


def _listen(reader: int, heard: list[int], request: StopRequest) -> None:
    """Reads the numbers of signals, which Python writes the moment they come, until the other end is closed."""
    while received := os.read(reader, 1):
        number = received[0]
        if number not in heard:
            continue
        if request.signal:
            log.warning("stopped at once; --resume goes on from the newest checkpoint")
            os._exit(128 + number)
        request.signal = number
        log.warning("stopping after this step; again to stop at once, without a checkpoint")
