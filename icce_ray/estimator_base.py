"""The base class of the scikit-learn estimators."""

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from icce_ray.errors import ConfigError, InputError
from icce_ray.runtime.progress import Progress

MAX_SEED = 2**31 - 1
FLOATS = [np.float32, np.float16]
"""Features of these types are used as they are, everything else becomes float32."""


class FeatureClusterer(ClusterMixin, BaseEstimator):
    """Clusters the rows of a matrix. Subclasses have the parameters `random_state` and `verbose`."""

    def _check_rows(self, X: npt.ArrayLike, num_clusters: int | None = None) -> npt.NDArray[Any]:
        """The rows to fit, checked. Raises ConfigError: no clusters are asked for; InputError: fewer rows than
        clusters."""
        if num_clusters is not None and num_clusters < 1:
            raise ConfigError(f"{type(self).__name__}: n_clusters is {num_clusters}; at least 1 is needed")
        features_ND: npt.NDArray[Any] = validate_data(self, X, dtype=FLOATS, ensure_min_samples=2)
        if num_clusters is not None and len(features_ND) < num_clusters:
            raise InputError(f"X has {len(features_ND)} rows, fewer than n_clusters={num_clusters}")
        return features_ND

    def _check_new(self, X: npt.ArrayLike) -> npt.NDArray[Any]:
        """Rows to predict, checked."""
        check_is_fitted(self)
        features_nD: npt.NDArray[Any] = validate_data(self, X, dtype=FLOATS, reset=False)
        return features_nD

    def _seed(self) -> int:
        seed = self.random_state
        return int(seed if isinstance(seed, (int, np.integer)) else check_random_state(seed).randint(MAX_SEED))

    def _progress(self, stage: str, unit: str) -> Progress:
        return Progress(stage, unit, quiet=not self.verbose)
