"""Settings of the images, their embeddings, the sample that is trained on, and what is shown of the result."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from icce_ray.config.section import AtLeastTwo, Fraction, Place, PositiveInt, Section

PIXELS = "pixels"
"""The backbone that needs no weights."""


class ImagesConfig(Section):
    uri: Place | tuple[Place, ...] | None = None
    """Where the images are; one place or several. A folder or prefix, searched recursively for images (JPEG, PNG, WebP,
    BMP, GIF, TIFF, JPEG 2000, PPM, AVIF), for .tar shards in WebDataset layout and for .parquet files of images; a .tar
    file; a .parquet file or folder with a column of URIs or of image files; a .txt list with one URI per line; the
    manifest.json of an S3 Inventory. Local paths, s3:// and gs://."""
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
    images: Place | None = None
    """The image of each row, in order, so that the page and the exports show pictures: a .txt list with one path or URI
    per line, or a .parquet file with a column `images.uri_column`. Not set: that column of the embeddings, if they have
    it; else each row is named by its file and number."""
    extra: tuple[Place, ...] = ()
    """More embeddings of the same images in the same order, by other backbones: more feature sets. Later stages use the
    first feature set; the method `turtle` uses all."""

    @model_validator(mode="after")
    def _check(self) -> EmbeddingsConfig:
        for name in ("extra", "images"):
            if getattr(self, name) and self.uri is None:
                raise ValueError(f"{name} is given, but uri is not; name the embeddings with uri")
        return self


class BackboneConfig(Section):
    backbone: str = "vit_large_patch14_dinov2.lvd142m"
    """A timm model name, or `pixels`: the flattened pixels scaled to 0..1, which need no weights."""
    features: Literal["auto", "cls", "cls+patch_mean", "last4", "last4+patch_mean", "pooled"] = "auto"
    """Outputs of a vision transformer that make the embedding (docs/METHOD.md, "Features"). `auto`: `cls+patch_mean` if
    the model has a class token, else `pooled`."""
    weights: Place | None = None
    """Path or URI of a .safetensors file, or of a .pth, .pt or .bin file that holds weights only. Not set: the model
    hub. `random`: random initialisation, to try out the plumbing; the clusters mean nothing."""
    image_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Side of the square input in pixels. Not set: 224 (`pixels`: 32)."""
    grayscale: bool = False
    """With `pixels`: one channel (luma) instead of three."""


class EmbedConfig(BackboneConfig):
    extra: tuple[BackboneConfig, ...] = ()
    """More backbones, which make more feature sets in the same pass: each image is read and decoded once. Each takes
    the settings above, such as `{backbone: resnet50.a1_in1k}`. Later stages use the first feature set; the method
    `turtle` uses all."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the networks' matrix products. `auto`: bfloat16 if the worker's processor multiplies it natively,
    else float32. Set it if machines differ and every bit must agree. Embeddings are stored as float16 in any case."""
    compile: bool = False
    """Run the networks through torch.compile. It takes about a minute per worker before the first image, so it pays for
    many images on GPUs. It changes embeddings by rounding only."""
    batch_size: PositiveInt | Literal["auto"] = "auto"
    """Images per forward pass. `auto`: 64 on CPUs; on a GPU each worker doubles it at its start for as long as that is
    faster and fits."""
    decoder: Literal["pillow", "nvjpeg"] = "pillow"
    """What decodes JPEGs. `nvjpeg`: the GPUs of the embedding workers, which also scale them, so that fewer CPUs are
    needed. Pillow still decodes other images, and JPEGs that are rotated, over a MiB or 33 million pixels, or neither
    RGB nor grey. The pixels differ a little, also between kinds of GPUs."""
    max_image_pixels: PositiveInt = 100_000_000
    """Largest image (width x height) that is decoded. A larger one goes into the errors table."""
    max_error_rate: Fraction = 0.1
    """Share of unusable images, or rows of ready-made embeddings, above which the stage stops."""

    @property
    def backbones(self) -> tuple[BackboneConfig, ...]:
        """All backbones."""
        return (self, *self.extra)


class SampleConfig(Section):
    """Which images are trained on (neighbours, heads, consensus, classifier)."""

    max_images: AtLeastTwo | None = 2_000_000
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


class EvaluateConfig(Section):
    labels: Place | None = None
    """True labels, for evaluation only: `folder` (the image's parent folder), `cls` (the .cls file beside the image in
    a WebDataset shard), or a .npy, .csv or .parquet file."""
    label_column: str = "label"
    """Label column of a CSV or Parquet file."""
    uri_column: str | None = None
    """Column of a CSV or Parquet file with image URIs, or the ends of them; labels for some of the images are enough.
    Not set: the rows are in the order of the images."""
    silhouette_umap: bool = False
    """Also measure the silhouette in UMAP space, which needs no labels but umap-learn, and half a minute."""


class ReportConfig(Section):
    title: str | None = None
    """Heading of the page."""
    max_images: PositiveInt = 20_000
    """Images on the page. If there are more, it shows a uniform random sample of each cluster and says so; small
    clusters are shown whole."""
    map: Literal["auto", "pca", "umap"] = "auto"
    """How the images are laid out on the map. `auto`: UMAP if umap-learn is installed, else the first two principal
    components."""
