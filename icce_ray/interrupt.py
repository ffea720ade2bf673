"""Stop what the main thread is doing, from another thread that has found out that it cannot succeed."""

import signal
import threading


def interrupt_main_thread() -> None:
    """Send a real signal: `_thread.interrupt_main` would not wake the thread from a wait."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
