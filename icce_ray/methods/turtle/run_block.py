"""Runs of TURTLE that are trained in the same products, each from its own seed (docs/METHOD.md, "TURTLE").

The blocks depend on the number of runs and of clusters alone, so a run gives the same bits on any number of workers.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from icce_ray.config import TurtleConfig
from icce_ray.methods.turtle.bilevel_step import (
    AdamParameters,
    FeatureBatch,
    Layers,
    StepLosses,
    TaskEncoder,
    bilevel_step,
    initial_layer,
)
from icce_ray.methods.turtle.feature_scaling import Space
from icce_ray.random_numbers import seed_of
from icce_ray.runtime.threads import ThreadPool

MAX_RUNS, MAX_COLUMNS = 3, 32
"""Limits of a block. On a CPU a product with 32 columns takes little longer than one with 10."""


def run_blocks(num_runs: int, num_clusters: int) -> list[range]:
    """The runs of each block, as even as possible."""
    most = max(1, min(MAX_RUNS, MAX_COLUMNS // num_clusters))
    num_blocks = -(-num_runs // most)
    bounds = [block * num_runs // num_blocks for block in range(num_blocks + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


class RunBlock:
    """The training of the runs of a block. They share their batches and differ in their initial layers. The pool is
    entered."""

    def __init__(
        self,
        spaces: Sequence[Space],
        settings: TurtleConfig,
        runs: Sequence[int],
        *,
        num_clusters: int,
        seed: int,
        pool: ThreadPool,
    ) -> None:
        self.spaces, self.settings, self.runs = spaces, settings, runs
        self.num_clusters, self.seed, self.pool = num_clusters, seed, pool
        self.step = 0
        self._features = [space.features_ND for space in spaces]
        self._dims = [features_ND.shape[1] for features_ND in self._features]
        self._num_images = len(self._features[0])
        self.encoder = TaskEncoder(self._dims, num_clusters, settings.learning_rate, self._generators(0))
        self.inner = self.new_inner()
        self._whole = FeatureBatch.of(self._features) if self._num_images <= settings.batch_size else None

    def train_step(self) -> StepLosses:
        """One step on the next batch."""
        if self.step and not self.settings.warm_start:
            self.inner = self.new_inner()
        losses = bilevel_step(
            self.encoder,
            self.inner,
            self.batch(),
            inner_steps=self.settings.inner_steps,
            entropy_weight=self.settings.entropy_weight,
            pool=self.pool,
        )
        self.step += 1
        return losses

    def batch(self) -> FeatureBatch:
        """The batch of this step."""
        if self._whole is not None:
            return self._whole
        generator = np.random.default_rng([self.seed, self.step])
        rows = np.sort(generator.choice(self._num_images, self.settings.batch_size, replace=False, shuffle=False))
        rows_B = torch.from_numpy(rows).to(self._features[0].device)
        return FeatureBatch.of([features_ND.index_select(0, rows_B) for features_ND in self._features])

    def new_inner(self) -> list[AdamParameters]:
        """The untrained classifiers of this step."""
        generators = self._generators(1 + self.step)
        return [
            AdamParameters([initial_layer(dim, self.num_clusters, generators)], self.settings.inner_rate(dim))
            for dim in self._dims
        ]

    def layers_on_given(self) -> Layers:
        """The encoder's layers on the features as they were given."""
        return [space.layer_on_given(layer) for space, layer in zip(self.spaces, self.encoder.layers, strict=True)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a resumed block needs besides `step`. Loading copies into them."""
        named = self.encoder.parameters.named("encoder")
        for space, parameters in enumerate(self.inner):
            named |= parameters.named(f"inner.{space}")
        return named

    def load(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Go on from what :meth:`tensors` gave after `step` steps."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.step = step

    def _generators(self, purpose: int) -> list[torch.Generator]:
        """Each run's draws of one purpose: 0 the encoder, 1 + step the classifiers of that step."""
        device = self._features[0].device
        return [torch.Generator(device).manual_seed(seed_of(self.seed, run, purpose)) for run in self.runs]
