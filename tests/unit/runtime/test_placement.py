from __future__ import annotations

import itertools

import pytest

from icce_ray.runtime.cluster_resources import fitting_cpus


@pytest.mark.parametrize("machines", [[1.0], [4.0], [1.0, 1.0, 1.0], [16.0, 16.0], [8.0, 2.0], [0.5, 3.0, 3.0]])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("wanted", [0.25, 1.0, 1.5, 16.0])
def test_wherever_actors_land_all_fit_and_a_task_fits_beside_them(
    machines: list[float], count: int, wanted: float
) -> None:
    beside = min(1.0, max(machines) / 2)
    each = fitting_cpus(machines, count, wanted, beside)
    assert 0 < each <= wanted
    places = [
        [cpus - each * placed.count(machine) for machine, cpus in enumerate(machines)]
        for placed in itertools.product(range(len(machines)), repeat=count)
    ]
    possible = [free for free in places if min(free) >= -1e-9]
    assert possible
    assert all(max(free) >= beside - 1e-9 for free in possible)
    # And no more than a thousandth is given away, beside what one of these asks for.
    larger = each + 0.002
    if larger <= wanted:
        places = [
            [cpus - larger * placed.count(machine) for machine, cpus in enumerate(machines)]
            for placed in itertools.product(range(len(machines)), repeat=count)
        ]
        possible = [free for free in places if min(free) >= -1e-9]
        assert not possible or any(max(free) < beside for free in possible)
