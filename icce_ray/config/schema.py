"""Every setting, declared once, with its meaning under it.

A config is YAML; three lines do for the common case::

    images: {uri: /data/photos}
    num_clusters: 10
    output: /data/clusters

Unknown keys, wrong types and impossible combinations are refused before any work starts. ``method`` and ``preset`` fill
in settings that the file leaves open; a setting that is given always wins. ``resources`` never changes a result.
"Paper" marks a default that differs from the recipe of arXiv 2511.16213, which ``preset: paper`` restores
(docs/METHOD.md, "Paper recipe and defaults").
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationInfo,
    field_validator,
    model_validator,
)

from icce_ray.config.presets import PRESETS
from icce_ray.errors import ConfigError
from icce_ray.methods import METHODS

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
PositiveInt = Annotated[int, Field(ge=1)]

AUTO: Literal["auto"] = "auto"
NumClusters = Annotated[int, Field(ge=2)]

MIN_INPUTS = 32
"""Minimum number of input dimensions per head (capped at D)."""

ConsensusMethod = Literal["mcla", "hbgf", "cspa", "vote", "best_head"]

CONSENSUS_METHODS: tuple[ConsensusMethod, ...] = get_args(ConsensusMethod)


MAX_PATH_CHARACTERS = 4096


def _check_place(place: str) -> str:
    """Refuse paths and URIs that cannot be meant as they are written."""
    if "\0" in place:
        raise ValueError("it holds a NUL character")
    if len(place) > MAX_PATH_CHARACTERS:
        raise ValueError(f"it is {len(place):,} characters long; at most {MAX_PATH_CHARACTERS:,} are possible")
    if place.startswith(("~", "$")):
        raise ValueError("~ and variables are not expanded; write the whole path")
    if re.match(r"\w[\w+.-]*://[^/]*@", place):
        raise ValueError(
            "it holds credentials, which manifests would repeat; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "storage.access_key and storage.secret_key"
        )
    return place


Place = Annotated[str, AfterValidator(_check_place)]
"""A local path or a URI."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _bool_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes false for 0 otherwise, and a threshold that is meant to be off becomes 0."""
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and field.annotation is not bool:
            remedy = "; write null to switch it off" if type(None) in get_args(field.annotation) and not value else ""
            raise ValueError(f"true and false are not allowed here{remedy}")
        return value


class ClusterCountConfig(Section):
    """How `num_clusters: auto` chooses the number: by small clusterings of a sample, from few clusters to many."""

    min_clusters: NumClusters = 2
    """Smallest number of clusters to try."""
    max_clusters: NumClusters | None = None
    """Largest number of clusters to try. Not set: 100, or a tenth of the sample if that is less."""
    num_seeds: Annotated[int, Field(ge=2)] = 3
    """Clusterings for each number of clusters, each with its own seed. Their spread is the uncertainty of the
    choice."""
    num_heads: PositiveInt = 4
    """Heads in each clustering. They are smaller than the heads of the run itself and learn faster."""
    num_epochs: PositiveInt = 40
    """Passes over the sample for each clustering."""
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


class ImagesConfig(Section):
    uri: Place | tuple[Place, ...] | None = None
    """Where the images are; one place or several. A folder or prefix, searched recursively for images (JPEG, PNG, WebP,
    BMP, GIF, TIFF, JPEG 2000, PPM, AVIF), for .tar shards in WebDataset layout and for .parquet files of images; a .tar
    file; a .parquet file or folder with a column of URIs or of image files; a .txt list with one URI per line. Local
    paths, s3:// and gs://."""
    uri_column: str = "uri"
    """Parquet column with the URIs."""
    bytes_column: str | None = None
    """Parquet column with the image files themselves: binary, or a struct with a binary field `bytes`. Not set: the
    only such column of a file that has no `uri_column`."""

    @property
    def uris(self) -> tuple[str, ...]:
        """`uri` as a tuple; empty if it is not set."""
        return (self.uri,) if isinstance(self.uri, str) else self.uri or ()

    @model_validator(mode="after")
    def _check(self) -> ImagesConfig:
        if self.uri is not None and (not self.uris or not all(self.uris)):
            raise ValueError("uri is empty; name a folder, a prefix or a list of images")
        return self


class EmbeddingsConfig(Section):
    uri: Place | None = None
    """Ready-made embeddings instead of images: a .npy file (N x D, floating point), or a Parquet file or folder with a
    list column. float16 is kept; everything else becomes float32."""
    column: str | None = None
    """Parquet list column with the embeddings. Not set: the only list column."""


PIXELS = "pixels"
"""The backbone that needs no weights."""


class BackboneConfig(Section):
    backbone: str = "vit_large_patch14_dinov2.lvd142m"
    """A timm model name, or `pixels`: the flattened pixels scaled to 0..1, which need no weights."""
    features: Literal["auto", "cls", "cls+patch_mean", "last4", "last4+patch_mean", "pooled"] = "auto"
    """Outputs of a vision transformer that make the embedding (docs/METHOD.md, "Features"). `auto`: `cls+patch_mean` if
    the model has a class token, else `pooled`."""
    weights: Place | None = None
    """Path or URI of a .safetensors file, or of a .pth, .pt or .bin file that holds weights only. Not set: the model
    hub. `random`: random initialisation, to try out the plumbing; the clusters mean nothing."""
    image_size: PositiveInt | None = None
    """Side of the square input in pixels. Not set: 224 (`pixels`: 32)."""
    grayscale: bool = False
    """With `pixels`: one channel (luma) instead of three."""


class EmbedConfig(BackboneConfig):
    extra: tuple[BackboneConfig, ...] = ()
    """More backbones, which make more feature sets in the same pass: each image is read and decoded once. Each takes
    the settings above, such as `{backbone: resnet50.a1_in1k}`. Later stages use the first feature set."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the networks' matrix products. `auto`: bfloat16 if the worker's processor multiplies it natively,
    else float32. Set it if machines differ and every bit must agree. Embeddings are stored as float16 in any case."""
    compile: bool = False
    """Run the networks through torch.compile. It takes about a minute per worker before the first image, so it pays for
    many images on GPUs. It changes embeddings by rounding only."""
    batch_size: PositiveInt | Literal["auto"] = "auto"
    """Images per forward pass. `auto`: 64 on CPUs; on a GPU each worker doubles it at its start for as long as that is
    faster and fits."""
    max_image_pixels: PositiveInt = 100_000_000
    """Largest image (width x height) that is decoded. A larger one goes into the errors table."""
    max_error_rate: Fraction = 0.1
    """Share of unusable images above which the stage stops."""

    @property
    def backbones(self) -> tuple[BackboneConfig, ...]:
        """All backbones; later stages use the first."""
        return (self, *self.extra)


class SampleConfig(Section):
    """Which images are trained on (neighbours, heads, consensus, classifier)."""

    max_images: Annotated[int, Field(ge=2)] | None = 2_000_000
    """Above this many images, a uniform random sample of them is trained on; the classifier labels the others. `null`:
    always train on all."""
    duplicate_threshold: float | Literal["auto"] | None = "auto"
    """Images at least this similar (cosine of centred features) are near-duplicates: they are listed, and of each group
    only the image with the lowest id is trained on; the others get its cluster. `auto`: a hundred times nearer to each
    other than neighbours usually are. `null`: near-duplicates are not looked for."""

    @model_validator(mode="after")
    def _check(self) -> SampleConfig:
        duplicate = self.duplicate_threshold
        if isinstance(duplicate, float) and not 0.0 < duplicate <= 1.0:
            raise ValueError(f"duplicate_threshold is {duplicate}; allowed is a cosine above 0 and up to 1")
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
    batch_size: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    """Pairs per step (B). `auto`: 1024, or less for small collections, so that an epoch has eight steps. Paper: 256 or
    1024."""
    learning_rate: PositiveFloat = 5e-4
    """Learning rate at 256 pairs per step; scaled linearly with the batch size. Paper: 1e-4."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
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
    scan_entropy_weight: Annotated[float, Field(ge=0.0)] = 5.0
    """Weight of the entropy of the mean assignment in SCAN's loss."""
    sinkhorn: bool = True
    """Make the teacher's targets by Sinkhorn-Knopp over the batch (ICCE) instead of a softmax (TEMI)."""
    sinkhorn_iterations: PositiveInt = 3
    """Sinkhorn-Knopp iterations."""
    teacher_temperature: PositiveFloat = 0.1
    """Temperature of the teacher's targets (T_sk with Sinkhorn-Knopp)."""
    student_temperature: PositiveFloat = 0.1
    """Temperature of the student's softmax."""
    beta: Annotated[float, Field(gt=0.0, le=1.0)] = 0.6
    """Exponent of the TEMI loss. 1 gives the pointwise mutual information; less makes clusters more even."""
    max_ce_weight: Annotated[float, Field(ge=0.0)] = 0.3
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

    def num_inputs(self, dim: int) -> int:
        """Number of input dimensions of a head (S), if the features have `dim`."""
        return min(dim, max(MIN_INPUTS, round(self.input_share * dim)))


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


class EvaluateConfig(Section):
    labels: Place | None = None
    """True labels, for evaluation only: `folder` (the image's parent folder), `cls` (the .cls file beside the image in
    a WebDataset shard), or a .npy, .csv or .parquet file."""
    label_column: str = "label"
    """Label column of a CSV or Parquet file."""
    uri_column: str | None = None
    """Column of a CSV or Parquet file with the image URIs. Not set: the rows are in the order of the images."""


class ReportConfig(Section):
    title: str | None = None
    """Heading of the page."""
    images_per_cluster: PositiveInt = 12
    """Pictures shown per cluster."""
    max_clusters: PositiveInt = 200
    """Number of clusters shown with pictures; the table lists all."""


class StorageConfig(Section):
    """Access to S3. Settings left open come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    AWS_SESSION_TOKEN, AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL) or the machine's role."""

    endpoint: Place | None = None
    """URL of an S3-compatible store. Not set: AWS_ENDPOINT_URL, else AWS itself."""
    region: str | None = None
    """Region of the buckets."""
    access_key: SecretStr | None = None
    """Access key id. Prefer the environment or a profile."""
    secret_key: SecretStr | None = None
    """Secret access key. Never written to manifests, logs or messages."""
    session_token: SecretStr | None = None
    """Session token of temporary credentials."""
    anonymous: bool = False
    """Send no credentials, for public buckets."""

    @model_validator(mode="after")
    def _check(self) -> StorageConfig:
        if (self.access_key is None) != (self.secret_key is None):
            raise ValueError("access_key and secret_key belong together: give both or neither")
        return self


class WorkerResources(Section):
    num_workers: PositiveInt = 1
    """Number of processes that share the work of the stage."""
    cpus_per_worker: Annotated[float, Field(gt=0.0)] | None = None
    """CPUs, and threads, per worker. Not set: a machine's CPUs divided among its workers."""
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs per worker."""


class ResourcesConfig(Section):
    ray_address: str | None = None
    """Address of a Ray cluster to join, or `auto`. Not set: RAY_ADDRESS, else a Ray of our own on this machine."""
    num_cpus: PositiveInt | None = None
    """CPUs of a Ray that we start. Not set: all that this process may use."""
    object_store_bytes: PositiveInt | None = None
    """Size of the object store of a Ray that we start. Not set: Ray's default, at most 2 GB."""
    embed: WorkerResources = WorkerResources()
    neighbors: WorkerResources = WorkerResources()
    """Each worker is a shard, which holds its share of the features in memory, or on its GPU."""
    method: WorkerResources = WorkerResources()
    classifier: WorkerResources = WorkerResources()
    """The workers share the learning rates to try, so no more than that are started."""
    assign: WorkerResources = WorkerResources()
    """CPUs only: reading the embeddings takes longer than labelling them."""

    @model_validator(mode="after")
    def _check_assign(self) -> ResourcesConfig:
        if self.assign.gpus_per_worker:
            raise ValueError(
                f"assign.gpus_per_worker is {self.assign.gpus_per_worker:g}; images are labelled on CPUs: leave it out"
            )
        return self


class ClusteringConfig(Section):
    """Everything that determines a clustering of given features."""

    model_config = ConfigDict(serialize_by_alias=True)

    given_num_clusters: int | Literal["auto"] = Field(alias="num_clusters")
    """Number of clusters (K). `auto`: chosen without labels, as set by `cluster_count`."""
    cluster_count: ClusterCountConfig = ClusterCountConfig()
    """Used if `num_clusters` is `auto`."""
    method: str = "icce"
    """How the images are clustered: `icce` (arXiv 2511.16213), `temi` (arXiv 2303.17896), or `scan`, the loss of arXiv
    2005.12320 on frozen features. It fills in the settings that it needs and the config leaves open."""
    preset: Literal["paper"] | None = None
    """`paper`: every constant as the ICCE paper has it, where the config leaves it open. Not set: our defaults, which
    were measured to be better; docs/METHOD.md lists where they differ."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every random draw. The same config and seed give the same labels on the same kind of machine."""
    sample: SampleConfig = SampleConfig()
    neighbors: NeighborsConfig = NeighborsConfig()
    heads: HeadsConfig = HeadsConfig()
    consensus: ConsensusConfig = ConsensusConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    assign: AssignConfig = AssignConfig()

    @property
    def num_clusters(self) -> int:
        """K.

        Raises:
            ConfigError: it is `auto` and has not been chosen yet.
        """
        if self.given_num_clusters == AUTO:
            raise ConfigError("num_clusters: 'auto' is chosen by a run; a number is needed here")
        return self.given_num_clusters

    @property
    def is_auto(self) -> bool:
        """Whether the number of clusters is still to be chosen."""
        return self.given_num_clusters == AUTO

    @property
    def needed_images(self) -> tuple[int, str]:
        """Smallest number of images that the clusters can be made of, and the setting that asks for it."""
        if not self.is_auto:
            return self.num_clusters, "num_clusters"
        asked = self.cluster_count
        if asked.max_clusters is None:
            return asked.min_clusters, "cluster_count.min_clusters"
        return asked.max_clusters, "cluster_count.max_clusters"

    def with_num_clusters(self, num_clusters: int) -> Self:
        """The same with this K."""
        return self.model_copy(update={"given_num_clusters": num_clusters})

    @field_validator("given_num_clusters", mode="wrap")
    @classmethod
    def _number_or_auto(cls, value: Any, handler: Any) -> int | Literal["auto"]:
        # The union's own messages would name "num_clusters.int" and "num_clusters.literal['auto']".
        return AUTO if value == AUTO else TypeAdapter(NumClusters).validate_python(value)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Fill in what the method, then the preset, sets where the config leaves it open."""
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        method, preset = data.get("method", "icce"), data.get("preset")
        if preset in METHODS:
            remedy = "leave preset out" if preset == "icce" else f"write method: {preset}"
            raise ValueError(f"preset: {preset!r} is a method, not a preset; {remedy}")
        if method not in METHODS:
            raise ValueError(f"method: {method!r} is unknown; the methods are {', '.join(METHODS)}")
        if preset is not None and method != "icce":
            raise ValueError(f"preset: {preset!r} belongs to method: icce, not to {method!r}; leave one of them out")
        for section, settings in {**METHODS[method].settings, **PRESETS.get(preset or "", {})}.items():
            given = filled.get(section) or {}
            if isinstance(given, dict):
                filled[section] = {**settings, **given}
        return filled


class Config(ClusteringConfig):
    """All settings of a run."""

    output: Place
    """Folder or URI for all artifacts. Runs with the same output share embeddings and graphs."""
    images: ImagesConfig = ImagesConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    embed: EmbedConfig = EmbedConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    storage: StorageConfig = StorageConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @field_validator("images", "embeddings", mode="before")
    @classmethod
    def _place_alone(cls, value: Any) -> Any:
        """``images: /data/photos`` is short for ``images: {uri: /data/photos}``, and null for nothing."""
        if value is None:
            return {}
        return {"uri": value} if isinstance(value, (str, list, tuple)) else value

    @model_validator(mode="after")
    def _check(self) -> Config:
        if (self.images.uri is None) == (self.embeddings.uri is None):
            given = "neither is" if self.images.uri is None else "both are"
            raise ValueError(f"{given} given: name the input with either images.uri or embeddings.uri")
        if self.embeddings.uri is not None and self.evaluate.labels == "folder":
            raise ValueError("evaluate.labels is 'folder', but ready-made embeddings have no folders: name a file")
        return self
