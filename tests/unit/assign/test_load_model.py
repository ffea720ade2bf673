"""The model of a network whose weights came from a file: timm's own test model (64 wide) stands for the large ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import icce_ray
from icce_ray.classifier.linear import DESCRIPTION_NAME, MODEL_NAME
from icce_ray.classifier.self_training import fit_classifier
from icce_ray.config import ClassifierConfig, Config
from icce_ray.embed.backbone_plan import embed_settings, plan_backbone
from icce_ray.embed.networks import build_backbone
from icce_ray.errors import InputError
from icce_ray.images.decoding import convert_image
from icce_ray.store import ArtifactWriter, Folder

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)


def build(config: Config, **options: Any) -> Any:
    return build_backbone(config.embed, config.seed, **options)


def settings_of(config: Config) -> dict[str, Any]:
    return embed_settings(config.embed, config.embeddings, config.seed)


def save_weights(path: Path, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_file(timm.create_model("test_vit", num_classes=0, img_size=64).state_dict(), path)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_weights(path, 0)
    return path


def write_model(folder: Path, weights: Path, *, include_backbone: bool) -> np.ndarray:
    """A model of the images PIXELS. Returns their features."""
    config = Config.model_validate(
        {
            "images": {"uri": "x"},
            "output": "x",
            "num_clusters": 2,
            "embed": {"backbone": "test_vit", "weights": str(weights), "image_size": 64, "batch_size": 7},
        }
    )
    preprocessing = plan_backbone(config.embed).preprocessing
    scaled = np.stack([np.asarray(convert_image(Image.fromarray(image), preprocessing)) for image in PIXELS])
    features = build(config).embed(scaled)
    classifier = fit_classifier(
        features, np.arange(24) % 2, ClassifierConfig(), num_clusters=2, seed=0, outlier_quantile=0.99
    )
    writer = ArtifactWriter(Folder.at(folder))
    writer.write_bytes(MODEL_NAME, classifier.to_bytes())
    if include_backbone:
        writer.copy_file("backbone.safetensors", str(weights))
    description = {
        "num_clusters": 2,
        "num_dims": classifier.num_dims,
        "seed": 0,
        "embed": config.embed.model_dump(mode="json"),
        "embed_identity": settings_of(config),
        "embeddings": {"uri": None},
        "backbone_file": "backbone.safetensors" if include_backbone else None,
    }
    writer.write_json(DESCRIPTION_NAME, description)
    writer.commit(stage="classifier", fingerprint="f", inputs={}, config={}, metrics={}, seconds=0)
    return features


def test_the_folder_is_all_that_another_machine_needs(tmp_path: Path, weights: Path) -> None:
    features = write_model(tmp_path / "model", weights, include_backbone=True)
    weights.unlink()
    model = icce_ray.load(tmp_path / "model")
    found, expected = model.predict([Image.fromarray(image) for image in PIXELS]), model.predict_features(features)
    assert (found.cluster == expected.cluster).all()
    np.testing.assert_allclose(found.consensus_probability, expected.consensus_probability, atol=1e-3)
    assert found.errors == {}


def test_other_weights_at_the_same_path_are_refused(tmp_path: Path, weights: Path) -> None:
    write_model(tmp_path / "model", weights, include_backbone=False)
    images = [Image.fromarray(PIXELS[0])]
    assert len(icce_ray.load(tmp_path / "model").predict(images).cluster) == 1
    save_weights(weights, 1)
    with pytest.raises(InputError, match="is not the file that the model was made with"):
        icce_ray.load(tmp_path / "model").predict(images)
    weights.unlink()
    with pytest.raises(ValueError, match="there is no file"):
        icce_ray.load(tmp_path / "model").predict(images)
