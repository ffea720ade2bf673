"""Count the tries at an object on remote storage. Those that fail while its store is away don't count."""

import time

from icce_ray.store import s3


class Tries:
    """The failed tries at one object."""

    def __init__(self) -> None:
        self.number = 0
        self._began = self._last_answer = time.monotonic()

    def add(self, uri: str, problem: str, *, store_answers: bool) -> float:
        """Count another one, which failed with `problem`. Returns the seconds since the first that counts. Raises
        WorkerError: the store has been away for OUTAGE_S."""
        now = time.monotonic()
        if store_answers:
            self.number, self._last_answer = self.number + 1, now
        elif now - self._last_answer > s3.OUTAGE_S:
            raise s3.given_up(uri, problem)
        else:
            self.number, self._began = 0, now
        return now - self._began
