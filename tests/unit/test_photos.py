"""``icce-ray cluster``: the settings it chooses, the file it writes, and the browser it opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import icce_ray.photos as photos_module
import icce_ray.pipeline.run as pipeline
from icce_ray import cli
from icce_ray.config import Config, load_config
from icce_ray.errors import InputError
from icce_ray.photos import photo_settings
from tests.unit.test_cli import RESULT


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configs that were run and pages that were opened; the machine has no GPU and no screen."""
    happened: list[Any] = []

    def run_pipeline(config: Config, quiet: bool) -> Any:
        assert load_config(Path(config.output) / "run.yaml").output == config.output  # there before the run
        happened.append(config)
        return RESULT

    monkeypatch.chdir(tmp_path)
    for photos in ("photos", "my photos", "a"):
        (tmp_path / photos).mkdir()
    monkeypatch.setattr(pipeline, "run_pipeline", run_pipeline)
    monkeypatch.setattr(photos_module, "num_gpus", lambda: 0)
    monkeypatch.setattr(photos_module, "has_screen", lambda: False)
    monkeypatch.setattr(photos_module.webbrowser, "open", happened.append)
    return happened


def test_the_results_lie_beside_the_photos_and_the_config_makes_the_same_run(run: list[Any], tmp_path: Path) -> None:
    assert cli.main(["cluster", "my photos/", "--set", "embed.backbone=pixels", "--set", "seed=3", "--quiet"]) == 0
    (config,) = run
    assert config.images.uri == str(tmp_path / "my photos")
    assert config.output == str(tmp_path / "my photos-clusters")
    assert (config.is_auto, config.seed, config.embed.backbone) == (True, 3, "pixels")
    assert load_config(tmp_path / "my photos-clusters" / "run.yaml") == config


def test_the_config_that_is_written_can_be_run_whatever_the_method_and_holds_no_secret(
    run: list[Any], tmp_path: Path
) -> None:
    secret = ["storage.access_key=me", "storage.secret_key=hidden", "storage.region=eu-1"]
    options = [text for setting in secret for text in ("--set", setting)]
    assert cli.main(["cluster", "photos", "--clusters", "12", "--output", "out", "--quiet", *options]) == 0
    written = (tmp_path / "out" / "run.yaml").read_text()
    assert "hidden" not in written
    config = load_config(tmp_path / "out" / "run.yaml")
    assert (config.num_clusters, config.storage.region, config.output) == (12, "eu-1", str(tmp_path / "out"))
    assert cli.main(["cluster", "a", "--clusters", "3", "--set", "method=kmeans", "--quiet"]) == 0
    assert "heads" not in (tmp_path / "a-clusters" / "run.yaml").read_text(), "settings of another method"


def test_the_place_of_the_config_is_said_unless_all_is_to_be_quiet(
    run: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["cluster", "a"]) == 0
    assert f"config       {tmp_path / 'a-clusters' / 'run.yaml'}\n" in capsys.readouterr().err
    assert cli.main(["cluster", "photos", "--quiet"]) == 0
    assert "run.yaml" not in capsys.readouterr().err


def test_the_page_is_opened_where_it_can_be_seen(
    run: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (tmp_path / "a-clusters" / "latest" / "report" / "report.html").as_uri()
    assert cli.main(["cluster", "a", "--quiet"]) == 0
    monkeypatch.setattr(photos_module, "has_screen", lambda: True)
    for options, opened in (["--no-open"], []), ([], [page]):
        (tmp_path / "a-clusters" / "run.yaml").unlink()
        (tmp_path / "a-clusters").rmdir()
        run.clear()
        assert cli.main(["cluster", "a", "--quiet", *options]) == 0
        assert run[1:] == opened


def test_the_settings_suit_the_machine() -> None:
    small = photo_settings("/photos", num_clusters="7", output=None, has_gpu=False)
    assert small["embed"] == {"backbone": "vit_small_patch14_dinov2.lvd142m"}
    assert (small["num_clusters"], small["heads"]) == (7, {"num_heads": 16})
    large = photo_settings("/photos", num_clusters="auto", output=None, has_gpu=True)
    assert {"embed", "heads"}.isdisjoint(large)
    assert large["resources"]["embed"] == {"gpus_per_worker": 1}


@pytest.mark.parametrize(
    ("photos", "output"),
    [
        ("s3://bucket/2024/photos/", "s3://bucket/2024/photos-clusters"),
        ("/data/list.txt", "/data/list-clusters"),
        ("/photos", "/photos-clusters"),
    ],
)
def test_the_place_beside_the_photos(photos: str, output: str) -> None:
    assert photo_settings(photos, num_clusters="auto", output=None, has_gpu=False)["output"] == output


@pytest.mark.parametrize("photos", ["/", "s3://bucket"])
def test_where_nothing_can_lie_beside_the_photos_the_output_has_to_be_given(photos: str) -> None:
    with pytest.raises(InputError, match="--output"):
        photo_settings(photos, num_clusters="auto", output=None, has_gpu=False)


def test_a_number_of_clusters_that_is_none_is_named(run: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cluster", "photos", "--clusters", "many"]) == 2
    assert "icce-ray cluster: num_clusters: 'many' is not usable" in capsys.readouterr().err


def test_photos_that_are_not_there_leave_nothing_and_name_the_folder_that_was_meant(
    run: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["cluster", "fotos"]) == 2
    assert f"fotos does not exist; did you mean {tmp_path / 'photos'}?" in capsys.readouterr().err
    assert not (tmp_path / "fotos-clusters").exists()
