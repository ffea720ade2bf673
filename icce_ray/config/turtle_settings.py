"""Settings of TURTLE (docs/METHOD.md, "TURTLE"). "Paper" marks a default that differs from arXiv 2406.07236."""

from typing import Literal

from icce_ray.config.section import AtLeastTwo, NonNegativeFloat, PositiveFloat, PositiveInt, Section

INNER_RATE_TIMES_DIM, PAPER_INNER_RATE = 1.5, 1e-3
"""Learning rates of TURTLE's linear classifiers (docs/METHOD.md, "TURTLE")."""


class TurtleConfig(Section):
    num_runs: PositiveInt = 5
    """Runs that differ in their seeds, each a clustering. The run with the highest generalisation score counts as the
    best."""
    num_steps: PositiveInt = 1000
    """Updates of the labels. Paper: 6000."""
    batch_size: AtLeastTwo = 10_000
    """Images per step; all images if there are no more."""
    learning_rate: PositiveFloat = 1e-3
    """Adam's learning rate for the labels."""
    inner_steps: PositiveInt = 10
    """Steps that the linear classifiers are trained in each update."""
    inner_learning_rate: PositiveFloat | Literal["auto"] = "auto"
    """Adam's learning rate for the linear classifiers. `auto`: 1.5 / dimensions, so that they learn as much from any
    backbone; without `scale_features`, 0.001. Paper: 0.001."""
    entropy_weight: NonNegativeFloat = 10.0
    """Weight of the entropy of the mean label (gamma). More makes clusters more even."""
    warm_start: bool = False
    """Go on training the linear classifiers of the step before, instead of new ones."""
    scale_features: bool = True
    """Centre the features, rotate them at random (seeded), and divide them by one number, so that their mean variance
    is 1. Paper: false, features as they come."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the matrix products; sums, softmaxes and losses are float32. `auto`: bfloat16 if the processor
    multiplies it natively."""
    checkpoint_interval_s: PositiveFloat = 60.0
    """Seconds between checkpoints: what a killed run loses at most."""

    def inner_rate(self, dim: int) -> float:
        """Learning rate of the linear classifier of a feature set with `dim` dimensions."""
        if self.inner_learning_rate != "auto":
            return self.inner_learning_rate
        return INNER_RATE_TIMES_DIM / dim if self.scale_features else PAPER_INNER_RATE
