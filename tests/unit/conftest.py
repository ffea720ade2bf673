"""Fixtures and settings of the unit tests."""

from hypothesis import HealthCheck, settings

# On a busy machine, an example may take any time.
settings.register_profile("any time", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any time")
