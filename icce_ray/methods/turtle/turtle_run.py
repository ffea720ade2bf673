"""One run of TURTLE, from its own seed (docs/METHOD.md, "TURTLE")."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from icce_ray.config import TurtleConfig
from icce_ray.methods.turtle.bilevel_step import StepLosses, bilevel_step, mean_label, soft_labels
from icce_ray.methods.turtle.feature_batches import Chunk, FeatureBatch
from icce_ray.methods.turtle.linear_layers import AdamParameters, Layers, TaskEncoder, initial_layer
from icce_ray.runtime.threads import ThreadPool

LABEL_ROWS = 16_384


class TurtleRun:
    """The training of one run.

    Args:
        spaces: features of each space, (N, D) on the device, from :func:`prepare_features`.
        settings: the `turtle` section.
        num_clusters: K.
        seed: seed of all runs.
        run: number of this run.
        pool: threads.
    """

    def __init__(
        self,
        spaces: Sequence[torch.Tensor],
        settings: TurtleConfig,
        *,
        num_clusters: int,
        seed: int,
        run: int,
        pool: ThreadPool,
    ) -> None:
        self.spaces = spaces
        self.settings = settings
        self.num_clusters = num_clusters
        self.pool = pool
        self.step = 0
        self._seeds = [seed, run]
        self._dims = [space_ND.shape[1] for space_ND in spaces]
        self._num_images = len(spaces[0])
        self.encoder = TaskEncoder(self._dims, num_clusters, settings.learning_rate, self._generator(0))
        self.inner = self._new_inner()
        fits = self._num_images <= settings.batch_size
        self._whole = FeatureBatch.of(spaces) if fits else None

    def train_step(self) -> StepLosses:
        """One step on the next batch."""
        if self.step and not self.settings.warm_start:
            self.inner = self._new_inner()
        losses = bilevel_step(
            self.encoder,
            self.inner,
            self._whole or self._draw_batch(),
            inner_steps=self.settings.inner_steps,
            entropy_weight=self.settings.entropy_weight,
            pool=self.pool,
        )
        self.step += 1
        return losses

    def labels(self) -> npt.NDArray[np.int32]:
        """The most likely cluster of every image, (N,)."""
        layers = self.encoder.layers
        found = []
        for start in range(0, self._num_images, LABEL_ROWS):
            batch = FeatureBatch.of([space_ND[start : start + LABEL_ROWS] for space_ND in self.spaces])
            found += self.pool.map(partial(_most_likely, layers=batch.cast(layers)), batch.chunks)
        labels: npt.NDArray[np.int32] = torch.cat(found).cpu().numpy().astype(np.int32)
        return labels

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs besides `step`. Loading copies into them."""
        named = self.encoder.parameters.named("encoder")
        for space, parameters in enumerate(self.inner):
            named |= parameters.named(f"inner.{space}")
        return named

    def load(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Go on from what :meth:`tensors` gave after `step` steps."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.step = step

    def _new_inner(self) -> list[AdamParameters]:
        generator = self._generator(1 + self.step)
        return [
            AdamParameters(initial_layer(dim, self.num_clusters, generator), self.settings.inner_rate(dim))
            for dim in self._dims
        ]

    def _draw_batch(self) -> FeatureBatch:
        generator = np.random.default_rng([*self._seeds, self.step])
        rows = np.sort(generator.choice(self._num_images, self.settings.batch_size, replace=False, shuffle=False))
        rows_B = torch.from_numpy(rows).to(self.spaces[0].device)
        return FeatureBatch.of([space_ND.index_select(0, rows_B) for space_ND in self.spaces])

    def _generator(self, purpose: int) -> torch.Generator:
        """Draws of one purpose: 0 the encoder, 1 + step the inner classifiers of that step."""
        (state,) = np.random.SeedSequence([*self._seeds, purpose]).generate_state(1, np.uint64)
        return torch.Generator(self.spaces[0].device).manual_seed(int(state >> np.uint64(1)))


def _most_likely(chunk: Chunk, layers: Layers) -> torch.Tensor:
    """Cluster of each row, (n,)."""
    return mean_label(soft_labels(chunk, layers)).argmax(dim=0)
