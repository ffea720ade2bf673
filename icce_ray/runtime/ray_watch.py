"""Notice that Ray has died, before Ray itself ends this process without a message: seconds after its raylet died, a
minute after its GCS did."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping

from icce_ray.interrupt import interrupt_main_thread

POLL_S = 1.5
REFUSED_S = 4.0
"""A process that refuses connections for this long is dead."""
SILENT_S = 40.0
"""A machine that does not answer for this long is gone."""
LEAVE_S = 5.0
"""Time for the main thread to stop after that, in a program that this one may end."""

Place = tuple[str, int]


class RayWatch:
    """Watches processes by connecting to their ports, at `places` by what they are. `ask` connects to one; it raises
    ConnectionRefusedError if nobody listens, another OSError if nothing answers."""

    may_exit = False
    """Whether to end the process if the main thread does not stop."""

    def __init__(
        self,
        places: Mapping[str, Place],
        *,
        ask: Callable[[Place], None],
        interrupt: Callable[[], None] = interrupt_main_thread,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lost: str | None = None
        """The message about what has died."""
        self._places, self._ask, self._interrupt, self._clock = places, ask, interrupt, clock
        self._since: dict[str, float] = {}
        self._ended = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._watch, name="icce_ray-watch", daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def look(self) -> bool:
        """Ask once whether all are alive."""
        for what, place in self._places.items():
            try:
                self._ask(place)
                self._since.pop(what, None)
            except OSError as error:
                silent_s = self._clock() - self._since.setdefault(what, self._clock())
                if silent_s >= (REFUSED_S if isinstance(error, ConnectionRefusedError) else SILENT_S):
                    self.lost = (
                        f"Ray has died: its {what} at {place[0]}:{place[1]} no longer answers. It was killed, or its "
                        "machine is gone or out of memory. What is finished is kept, and the same command resumes"
                    )
        return self.lost is None

    def _watch(self) -> None:
        while not self._ended.wait(POLL_S):
            if self.look():
                continue
            self._interrupt()
            if self.may_exit and not self._ended.wait(LEAVE_S):
                print(f"error: {self.lost}", file=sys.stderr, flush=True)
                os._exit(1)
            return


def connect_to(place: Place) -> None:
    socket.create_connection(place, timeout=POLL_S).close()
