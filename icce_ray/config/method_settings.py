"""Settings of the clustering itself: neighbours, methods, consensus, classifier and assignment.

"Paper" marks a default that differs from the recipe of arXiv 2511.16213, which ``preset: paper`` restores
(docs/METHOD.md, "Paper recipe and defaults"), or from that of arXiv 2406.07236 for TURTLE.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from icce_ray.config.section import AtLeastTwo, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section

MIN_INPUTS = 32
"""Minimum number of input dimensions per head (capped at D)."""

ConsensusMethod = Literal["mcla", "hbgf", "cspa", "vote", "best_head"]
CONSENSUS_METHODS: tuple[ConsensusMethod, ...] = get_args(ConsensusMethod)
INNER_RATE_TIMES_DIM, PAPER_INNER_RATE = 1.5, 1e-3
"""Learning rates of TURTLE's linear classifiers (docs/METHOD.md, "TURTLE")."""


class ClusterCountConfig(Section):
    """How `num_clusters: auto` chooses the number: by clusterings of parts of a sample, from few clusters to many."""

    min_clusters: AtLeastTwo = 2
    """Smallest number of clusters to try."""
    max_clusters: AtLeastTwo | None = None
    """Largest number of clusters to try. Not set: 100, or a tenth of the sample if that is less."""
    num_seeds: AtLeastTwo = 5
    """Parts that are clustered, nine tenths of the sample each. Their spread is the uncertainty of the choice."""
    max_images: Annotated[int, Field(ge=20)] = 5_000
    """Size of the uniform random sample that is clustered, if there are more images."""

    @model_validator(mode="after")
    def _check(self) -> ClusterCountConfig:
        if self.max_clusters is not None and self.max_clusters < self.min_clusters:
            raise ValueError(f"max_clusters is {self.max_clusters}, below min_clusters {self.min_clusters}")
        most = self.max_clusters or self.min_clusters
        if most > self.max_images:
            raise ValueError(
                f"max_images is {self.max_images}, fewer than the {most} clusters to choose from: raise it"
            )
        return self


class NeighborsConfig(Section):
    similarity_threshold: float | Literal["auto"] | None = "auto"
    """Cosine from which on two images are neighbours, -1 to 1 (the paper's tau). `auto`: chosen by the audit of the
    features. `null`: no threshold, exactly `min_neighbors` for each image. Paper: 0.3."""
    min_neighbors: PositiveInt = 20
    """Number of most similar images that become neighbours if fewer reach the threshold (the paper's k_min). Paper: 50;
    shorter lists were better on weaker features."""
    max_neighbors: PositiveInt | None = 1000
    """Limit of a list of neighbours; a longer one keeps a uniform random subset. `null`: no limit. Paper: no limit."""
    center: bool = True
    """Subtract the mean feature before the cosine. Convolutional features that are not centred are all similar to each
    other. Paper: false."""

    @model_validator(mode="after")
    def _check(self) -> NeighborsConfig:
        tau = self.similarity_threshold
        if isinstance(tau, float) and not -1.0 <= tau <= 1.0:
            raise ValueError(f"similarity_threshold is {tau}; a cosine lies between -1 and 1")
        if self.max_neighbors is not None and self.max_neighbors < self.min_neighbors:
            raise ValueError(f"max_neighbors is {self.max_neighbors}, below min_neighbors {self.min_neighbors}")
        return self


class HeadsConfig(Section):
    num_heads: PositiveInt = 50
    """Clustering heads trained side by side (H). They differ in their initialisation and in the dimensions they see."""
    num_epochs: PositiveInt = 50
    """Passes over the images. Paper: 400."""
    batch_size: AtLeastTwo | Literal["auto"] = "auto"
    """Pairs per step (B). `auto`: 1024, or less for small collections, so that an epoch has eight steps. Paper: 256 or
    1024."""
    learning_rate: PositiveFloat = 5e-4
    """Learning rate at 256 pairs per step; scaled linearly with the batch size. Paper: 1e-4."""
    weight_decay: NonNegativeFloat = 1e-4
    """AdamW weight decay, on weights only."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 5
    """Epochs in which the learning rate rises linearly from 0; then it stays constant. Paper: 20."""
    freeze_last_layer_epochs: Annotated[int, Field(ge=0)] = 1
    """Epochs in which the prototypes (the last layer) are frozen."""
    hidden_dim: PositiveInt = 512
    """Width of a head's hidden layer."""
    bottleneck_dim: PositiveInt = 256
    """Width of a head's normalised output, which is compared with the prototypes."""
    input_norm: Literal["batch_norm", "standardize", "none"] = "batch_norm"
    """`batch_norm`: statistics of each batch (ICCE). `standardize`: mean and deviation of the whole set (TEMI)."""
    rotate: bool = True
    """Rotate the features at random (seeded) before `input_norm`. Without it, scaling each dimension inflates the noise
    dimensions of features that are sorted by variance, such as those of a PCA. Paper: false."""
    input_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of the (rotated) dimensions that each head sees: its own random choice, at least 32 dimensions. Heads that
    see different dimensions make different mistakes and train faster. Paper: 1, every head sees all."""
    loss: Literal["temi", "scan"] = "temi"
    """`temi`: weighted mutual information with a teacher, and the terms that are switched on below. `scan`: SCAN's
    loss, without a teacher."""
    scan_entropy_weight: NonNegativeFloat = 5.0
    """Weight of the entropy of the mean assignment in SCAN's loss."""
    sinkhorn: bool = True
    """Make the teacher's targets by Sinkhorn-Knopp over the batch (ICCE) instead of a softmax (TEMI)."""
    sinkhorn_iterations: PositiveInt = 3
    """Sinkhorn-Knopp iterations."""
    balance: Fraction | Literal["auto"] = "auto"
    """How strongly Sinkhorn-Knopp makes the clusters equally large: 1, as far as it can; 0, not at all. `auto`: each
    head lowers it for as long as few of its clusters are empty; if the heads then disagree about the sizes, those with
    empty clusters raise it again. Paper: 1."""
    teacher_temperature: PositiveFloat = 0.1
    """Temperature of the teacher's targets (T_sk with Sinkhorn-Knopp)."""
    student_temperature: PositiveFloat = 0.1
    """Temperature of the student's softmax."""
    beta: Annotated[float, Field(gt=0.0, le=1.0)] = 0.6
    """Exponent of the TEMI loss. 1 gives the pointwise mutual information; less makes clusters more even."""
    max_ce_weight: NonNegativeFloat = 0.3
    """Weight of the cross-entropy with the pseudo-labels at the end of training (lambda_max). It rises from 0 along
    half a cosine. 0 switches it off."""
    num_positives: PositiveInt = 1
    """Neighbours drawn for each image and step. With more than one, their teacher targets are averaged."""
    teacher_momentum: Fraction | Literal["auto"] = "auto"
    """Momentum of the teacher, the moving average of the student. `auto`: it remembers a twentieth of all steps, at
    most 250 (0.996). Paper: 0.996."""
    prior_momentum: Fraction = 0.9
    """Momentum of the moving average of the cluster prior."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the matrix products; sums and losses are float32. `auto`: bfloat16 if the processor multiplies it
    natively."""
    early_stop_change: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Stop after three epochs in a row in which less than this share of the labels changed. `null`: train all
    epochs."""
    checkpoint_interval_s: PositiveFloat = 60.0
    """Seconds between checkpoints, rounded up to whole epochs: what a killed run loses at most."""

    @property
    def finds_balance(self) -> bool:
        """Whether each head finds its own balance."""
        return self.balance == "auto" and self.sinkhorn and self.loss == "temi"

    def num_inputs(self, dim: int) -> int:
        """Number of input dimensions of a head (S), if the features have `dim`."""
        return min(dim, max(MIN_INPUTS, round(self.input_share * dim)))


class KMeansConfig(Section):
    """`method: kmeans`."""

    algorithm: Literal["lloyd", "mini_batch"] = "lloyd"
    """`lloyd`: every iteration sees all images, and the workers share them. `mini_batch`: the centroids move after each
    batch (arXiv 2008.10312), and the workers share the starts."""
    num_starts: PositiveInt = 10
    """Clusterings from different starts (k-means++): the rows of the label matrix."""
    num_iterations: PositiveInt = 100
    """Limit of the iterations of `lloyd`."""
    tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] = 1e-5
    """`lloyd` ends when an iteration lowers the inertia by less than this share of it."""
    num_epochs: PositiveInt = 60
    """Passes over the shuffled images of `mini_batch`."""
    batch_size: PositiveInt | Literal["auto"] = "auto"
    """Images in a batch of `mini_batch`. `auto`: 2048, or the next power of two from `num_clusters` on if that is
    more."""
    spherical: bool = False
    """Scale centred features, and centroids, to unit length."""
    num_components: PositiveInt | None = None
    """Principal components that are kept. Not set: all. PCA is then a rotation, which changes no distance, so the
    features are only centred."""

    def images_per_batch(self, num_clusters: int) -> int:
        """`batch_size`, as a number."""
        auto = max(2048, 1 << (num_clusters - 1).bit_length())
        return auto if self.batch_size == "auto" else self.batch_size


class ConsensusConfig(Section):
    methods: tuple[ConsensusMethod, ...] = ("mcla", "hbgf", "cspa", "vote")
    """Consensus functions to try; the result with the highest average NMI with the heads is kept. `hbgf` and `cspa`
    are left out, with a line that says why, if there are too many images for them."""
    extra_runs: tuple[str, ...] = ()
    """Other runs over the same images whose clusterings take part, for one consensus of several methods, backbones,
    thresholds or numbers of clusters. Names of runs under `output` (a run prints its name at the end), or the places of
    their records elsewhere (`<output>/runs/<name>.json`)."""
    imbalance: Annotated[float, Field(ge=1.0)] = 1.5
    """How much larger than the average a cluster may be when METIS partitions a graph."""
    refine: bool = True
    """Reassign images as long as that raises the average NMI. Paper: false."""
    recombine: bool = True
    """Recombine the clusterings and the consensus, cut the neighbour graph, and keep what holds together best on it, if
    the method has one. Paper: false."""
    relabel: bool = True
    """If most images have no majority of the heads, place these by their features. Paper: false."""
    numbers_from: str = "auto"
    """The run whose clusters keep their numbers here: a name or the place of a record, as in `extra_runs`; or `none`.
    `auto`: the newest run under `output` with the same settings and other images, so clusters keep their numbers when
    images are added, also if `num_clusters` changes."""

    @model_validator(mode="after")
    def _check(self) -> ConsensusConfig:
        if not self.methods:
            raise ValueError(f"methods is empty; name at least one of {', '.join(CONSENSUS_METHODS)}")
        return self


class ClassifierConfig(Section):
    num_iterations: PositiveInt | Literal["auto"] = "auto"
    """SGD steps; all learning rates share them. `auto`: 100 passes over the images, at least 1,000 and at most 12,500
    steps."""
    batch_size: PositiveInt = 128
    """Images per step."""
    learning_rates: tuple[PositiveFloat, ...] = (
        1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1,
    )  # fmt: skip
    """Learning rates to try, for 256 images per step; scaled linearly with the batch size. All are trained in one pass
    over the data."""
    momentum: Fraction = 0.9
    """SGD momentum."""
    holdout_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.1
    """Share of the images that is held out; the classifier that agrees best with the consensus on them is chosen."""
    include_backbone: bool = True
    """Copy the file `embed.weights` into the model folder, which then labels images on any machine. Off: other machines
    need the file at the same path."""


class AssignConfig(Section):
    num_exemplars: PositiveInt = 16
    """Exemplars per cluster."""
    outlier_quantile: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    """An image is an outlier if it lies farther from the mean of its cluster (Mahalanobis distance) than this share of
    the images that the classifier was trained on."""


class ConventionalConfig(Section):
    """Scikit-learn's clusterers (docs/METHOD.md, "Conventional clusterers")."""

    normalize: bool = True
    """Subtract the mean feature and scale each feature to length 1 first."""
    representation: Literal["raw", "pca", "umap"] = "pca"
    """The representation that is clustered. `raw`: the features, which `spectral` takes if nothing else is set. `pca`:
    their first 50 principal components. `umap`: 50 UMAP dimensions, 30 neighbours, min_dist 0,
    which needs the extra `[umap]`; it is the best of the three for all methods but `spectral`."""
    linkage: Literal["ward", "average", "complete", "single"] = "ward"
    """Distance between two clusters in `agglomerative`."""
    distance_threshold: PositiveFloat | None = None
    """`agglomerative` merges no clusters that are farther apart, and so finds the number of clusters. Not set: it goes
    on until `num_clusters` are left."""
    num_neighbors: PositiveInt = 10
    """Nearest neighbours that connect an image in the graph of `spectral`."""
    preference: Annotated[float, Field(lt=0.0)] | None = None
    """How suitable each image is as an exemplar in `affinity_propagation`: a negative squared distance. Lower values
    make fewer clusters. Not set: the median over all pairs, which makes many."""
    min_cluster_size: AtLeastTwo = 15
    """Smallest group of images that `hdbscan` takes for a cluster; smaller ones are noise."""
    covariance: Literal["full", "tied", "diag", "spherical"] = "full"
    """Shape of a cluster in `gmm`: a covariance of its own, one for all, variances along the axes, or one variance."""


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
