"""From features to assignments: of a run's own images, and of new ones by its model."""

from __future__ import annotations

import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    """``icce_ray.assign`` names this package and the public function; so the package can be called."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from icce_ray.new_images import assign

        return assign(*arguments, **options)

    @property
    def assign(self) -> types.ModuleType:
        """What ``from icce_ray import assign`` gets."""
        return self


sys.modules[__name__].__class__ = _CallablePackage
