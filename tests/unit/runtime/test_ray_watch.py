from __future__ import annotations

import pytest

from icce_ray.runtime.ray_watch import REFUSED_S, SILENT_S, Place, RayWatch

PLACES = {"GCS": ("10.0.0.1", 6379), "raylet": ("10.0.0.2", 7000)}


class Machines:
    def __init__(self) -> None:
        self.now = 0.0
        self.failing: dict[Place, OSError] = {}

    def ask(self, place: Place) -> None:
        if place in self.failing:
            raise self.failing[place]


@pytest.mark.parametrize("what", PLACES)
@pytest.mark.parametrize(("error", "after_s"), [(ConnectionRefusedError(), REFUSED_S), (TimeoutError(), SILENT_S)])
def test_a_process_that_no_longer_answers_is_named(what: str, error: OSError, after_s: float) -> None:
    machines = Machines()
    watch = RayWatch(PLACES, ask=machines.ask, clock=lambda: machines.now)
    assert watch.look()
    machines.failing[PLACES[what]] = error
    assert watch.look()
    machines.now += after_s - 0.1
    assert watch.look()
    machines.failing.clear()  # it was only slow
    assert watch.look()
    machines.failing[PLACES[what]] = error
    assert watch.look()
    machines.now += after_s
    assert not watch.look()
    host, port = PLACES[what]
    assert watch.lost is not None
    assert f"Ray has died: its {what} at {host}:{port} no longer answers" in watch.lost


def test_the_main_thread_is_interrupted_once() -> None:
    machines, interrupted = Machines(), []
    watch = RayWatch(PLACES, ask=machines.ask, interrupt=lambda: interrupted.append(True))
    watch.lost, watch.look = "lost", lambda: False  # type: ignore[method-assign]
    watch.may_exit = False  # set by a command that another test ran in this process
    watch._ended.wait = lambda seconds: False  # type: ignore[method-assign]
    watch._watch()
    assert interrupted == [True]
