"""Fixtures that more than one area uses."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from icce_ray.runtime import ray_cluster as connection

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test that does not ask for `ray_cluster` does not join it because an earlier test did: small runs then take
    this process alone, in a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        if "ray_cluster" not in getattr(item, "fixturenames", ()):
            patch.setattr(connection, "_started_here", True)
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def _own_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No foreign Ray is joined, and copies of remote parts do not mix with a user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("ICCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """The one Ray that all tests in this process share: four logical CPUs."""
    import ray

    options = {
        "address": "local",
        "num_cpus": 4,
        "include_dashboard": False,
        "object_store_memory": 200_000_000,
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in connection.QUIET_ENVIRONMENT.items():
            patch.setenv(key, value)
        connection._init(options)  # tries again on a busy machine
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    """The real data sets, which are not part of the project."""
    if not (folder := os.environ.get("ICCE_TEST_DATA")):
        pytest.skip("no real data: set ICCE_TEST_DATA to its folder")
    return Path(folder)
