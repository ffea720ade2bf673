"""Load a run's model from its folder and label new images in one process, without Ray.

    import icce_ray
    model = icce_ray.load("clusters")  # the output of a run
    found = model.predict(["new/1.jpg", "new/2.jpg"])
    print(found.cluster, found.consensus_probability, found.is_outlier)

The folder is a run's output, which means its newest model; or a model itself: the artifact of the classifier stage,
``latest/model``, or a copy of either on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from icce_ray.classifier.linear import DESCRIPTION_NAME, MODEL_NAME, LinearClassifier, Prediction
from icce_ray.config import EmbedConfig
from icce_ray.embed.backbone_plan import plan_backbone
from icce_ray.embed.networks import Backbone, build_backbone
from icce_ray.embed.weights import weights_digest
from icce_ray.errors import InputError
from icce_ray.images.decoding import convert_image
from icce_ray.images.decoding_process import DecodingProcess
from icce_ray.images.preprocessing import Pixels, Preprocessing
from icce_ray.images.read_images import read_image
from icce_ray.store import Artifact, Folder
from icce_ray.store.run_records import read_latest


@dataclass(frozen=True)
class ImagePrediction(Prediction):
    """Predictions for n images. An image that cannot be used has cluster and second choice -1 and probability NaN."""

    errors: dict[int, str]
    """Why images cannot be used, by their position in the input."""


def load(path: str | Path, *, device: str = "cpu") -> Model:
    """Load the model of a finished run.

    Args:
        path: the output of a run, whose newest model is loaded; or the folder of a model, `<output>/latest/model`,
            `<output>/classifier/<fingerprint>`, or a copy of it. Local or on object storage.
        device: torch device of the backbone.

    Raises:
        InputError: there is no model, or it has another format version.
        DamagedArtifactError: a file is not as it was written.
    """
    return Model(find_model(str(path)), device=device)


def find_model(path: str) -> Artifact:
    """The classifier artifact in the folder `path`, or that of the newest run whose output `path` is. Raises
    InputError: there is none."""
    folder = Folder.reachable(path)
    artifact = Artifact.find(folder)
    if artifact is None and (latest := read_latest(path)) is not None:
        artifact = Artifact.find(folder / "classifier" / latest["stages"].get("classifier", "none"))
    if artifact is None or artifact.manifest.stage != "classifier":
        raise InputError(
            f"{path}: no model there; give the output of a finished run, or its whole folder `latest/model` or "
            "`classifier/...` (the run's last lines and `icce-ray status` say where it is)"
        )
    return artifact


class Model:
    """Labels images as ``icce-ray assign`` does. Made by :func:`load`."""

    def __init__(self, artifact: Artifact, *, device: str = "cpu") -> None:
        self.classifier = LinearClassifier.from_bytes(artifact.read_bytes(MODEL_NAME))
        self.description: dict[str, Any] = artifact.read_json(DESCRIPTION_NAME)
        """How the model was made: backbone, features, cluster sizes, versions."""
        self._artifact = artifact
        self._device = device

    @property
    def num_clusters(self) -> int:
        return self.classifier.num_clusters

    def predict(self, images: Sequence[str | Path | Image.Image]) -> ImagePrediction:
        """Label images: paths or URIs of image files, or Pillow images. `errors` lists those that cannot be used.
        Raises InputError: the model was made from ready-made embeddings, or `images` holds something else; ConfigError,
        ResourceError: the backbone cannot be built here."""
        if isinstance(images, (str, Path, Image.Image)):
            raise InputError("predict takes a list of images: put a single image into brackets")
        batch_size = self._backbone.batch_size
        features: list[npt.NDArray[np.float16]] = [np.empty((0, self.classifier.num_dims), dtype=np.float16)]
        errors: dict[int, str] = {}
        for start in range(0, len(images), batch_size):
            features_nD, failed = self._embed(images[start : start + batch_size])
            features.append(features_nD)
            errors |= {start + place: reason for place, reason in failed.items()}
        found = self.classifier.label(np.concatenate(features))
        rows = list(errors)
        found.cluster[rows] = found.second_choice[rows] = -1
        found.consensus_probability[rows] = found.outlier_score[rows] = np.nan
        found.is_outlier[rows] = False
        return ImagePrediction(**vars(found), errors=errors)

    def predict_features(self, X: npt.ArrayLike) -> Prediction:
        """Label images by their features, (n, D), of the same kind that the run was trained on. Raises InputError:
        wrong number of dimensions, or values that are not finite."""
        features = np.asarray(X)
        if features.dtype.kind not in "fiu":
            raise InputError(f"features are {features.dtype}; give numbers")
        found = self.classifier.label(features)
        wrong = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(wrong):
            raise InputError(
                f"features of {len(wrong)} rows are not finite, such as row {wrong[0]}: leave these rows out"
            )
        return found

    def _embed(self, images: Sequence[str | Path | Image.Image]) -> tuple[npt.NDArray[np.float16], dict[int, str]]:
        """(n, D) features, 0 for images that failed, and why they failed, by position."""
        preprocessing = self._preprocessing
        max_pixels = self._embed_config.max_image_pixels
        pixels = np.zeros((len(images), *preprocessing.shape), dtype=np.uint8)
        failed: dict[int, str] = {}
        for place, image in enumerate(images):
            decoded = self._decode(image, preprocessing, max_pixels)
            if isinstance(decoded, str):
                failed[place] = decoded
            else:
                pixels[place] = decoded
        features_nD = self._backbone.embed(pixels)
        for row in np.flatnonzero(~np.isfinite(features_nD).all(axis=1)):
            failed.setdefault(int(row), "feature not finite")
        features_nD[list(failed)] = 0
        return features_nD, failed

    def _decode(self, image: str | Path | Image.Image, preprocessing: Preprocessing, max_pixels: int) -> Pixels | str:
        if isinstance(image, Image.Image):
            return convert_image(image, preprocessing, max_pixels=max_pixels)
        if not isinstance(image, (str, Path)):
            raise InputError(f"an image is a path, a URI or a Pillow image, not {type(image).__name__}")
        data = read_image(str(image))
        return data if isinstance(data, str) else self._decoder.decode(data, preprocessing, max_pixels=max_pixels)

    @cached_property
    def _decoder(self) -> DecodingProcess:
        return DecodingProcess()

    @cached_property
    def _embed_config(self) -> EmbedConfig:
        return embed_config(self._artifact, self.description)

    @cached_property
    def _preprocessing(self) -> Preprocessing:
        return plan_backbone(self._embed_config).preprocessing

    @cached_property
    def _backbone(self) -> Backbone:
        check_weights(self._embed_config, self.description)
        return build_backbone(self._embed_config, self.description["seed"], device=self._device)


def embed_config(artifact: Artifact, description: dict[str, Any]) -> EmbedConfig:
    """The settings that embed images like those that the model was trained on. Raises InputError: it was trained on
    ready-made embeddings."""
    ready_made = description["embeddings"]["uri"]
    if ready_made is not None:
        raise InputError(
            f"{artifact.folder.uri}: the model was made from ready-made embeddings ({ready_made}), so its backbone is "
            "unknown; embed the images in the same way and give the embeddings"
        )
    # The stages behind the embeddings see the first feature set.
    embed = EmbedConfig(**description["embed"]).model_copy(update={"extra": ()})
    copied = description["backbone_file"]
    is_remote = artifact.folder.local_path is None
    # The local copy of a file on object storage is on this machine only, while all workers may see the original.
    if copied is not None and not (is_remote and Path(str(embed.weights)).expanduser().is_file()):
        embed = embed.model_copy(update={"weights": str(artifact.local_file(copied))})
    return embed


def check_weights(embed: EmbedConfig, description: dict[str, Any]) -> None:
    """Refuse a weights file other than the one that the model was made with. Raises ConfigError: there is no such file;
    InputError: its content is different."""
    expected = description["embed_identity"]["embed"].get("weights") or ""
    if expected.startswith("sha256:") and f"sha256:{weights_digest(str(embed.weights))}" != expected:
        raise InputError(
            f"embed.weights: {embed.weights} is not the file that the model was made with ({expected}); its features "
            "would have another meaning"
        )
