from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from icce_ray.config import Config
from icce_ray.count.choice import Measured, choose
from icce_ray.report import page_files
from icce_ray.report.page import run
from icce_ray.report.pictures import load_thumbnails
from icce_ray.store import Artifact, ArtifactWriter, Folder


class Page:
    """What a page holds: `core`, its data by name, and its sheets as pixels."""

    def __init__(self, folder: Path) -> None:
        self.html = (folder / "report.html").read_text(encoding="utf-8")
        self.core = json.loads(re.search(r"^const CORE = (.*);$", self.html, re.MULTILINE)[1])
        sheets = json.loads(re.search(r"^Object.assign\(INLINE_SHEETS, (.*)\);$", self.html, re.MULTILINE)[1])
        self.sheets = {name: base64.b64decode(data) for name, data in sheets.items()}
        scripts = [self.html]
        for file in sorted((folder / "report_data").glob("*")):
            if file.suffix == ".js":
                scripts.append(file.read_text())
            else:
                self.sheets[file.stem] = file.read_bytes()
        calls = [call for text in scripts for call in re.findall(r'^receive\("(.*?)", (.*)\);$', text, re.MULTILINE)]
        self.data = {name: json.loads(value) for name, value in calls}
        self.columns = {
            name: np.frombuffer(base64.b64decode(text), dtype) for name, (dtype, text) in self.data["columns"].items()
        }
        rows = [self.data[name] for name in sorted(self.data) if name.startswith("rows-")]
        self.uris = [uri for part in rows for uri in part["uris"]]
        self.ids = [image for part in rows for image in part["ids"]]
        self.similar = np.concatenate(
            [np.frombuffer(base64.b64decode(part["similar"]), np.int32).reshape(len(part["ids"]), -1) for part in rows]
        )

    def thumbnail(self, row: int) -> np.ndarray:
        with Image.open(io.BytesIO(self.sheets[f"sheet-{row // 64:05d}"])) as image:
            pixels = np.asarray(image)
        top, left = (128 * place for place in divmod(row % 64, 8))
        return pixels[top : top + 128, left : left + 128]


@pytest.fixture(scope="module")
def written(planted_run: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path]:
    folder = tmp_path_factory.mktemp("report")
    metrics = run(planted_run.config, planted_run.context(folder))
    assert metrics["num_bytes"] == len((folder / "report.html").read_bytes())
    return Page(folder), folder


def test_a_small_page_is_a_single_file_that_loads_nothing_from_a_network(written: tuple[Page, Path]) -> None:
    page, folder = written
    assert sorted(path.name for path in folder.iterdir()) == ["clusters.png", "report.html"]
    assert not re.search(r'(src|href)="(?!#)[^"]', page.html)
    assert "@import" not in page.html
    assert page.core["folder"] is None


def test_a_large_page_has_a_folder_with_the_same_data(
    planted_run: Any, written: tuple[Page, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(page_files, "MAX_INLINE_BYTES", 20_000)
    run(planted_run.config, planted_run.context(tmp_path))
    page = Page(tmp_path)
    assert sorted(path.name for path in (tmp_path / "report_data").iterdir()) == [
        "columns.js", "rows-00000.js", "sheet-00000.jpg", "sheet-00001.jpg",
    ]  # fmt: skip
    assert page.data == written[0].data
    assert page.sheets == written[0].sheets
    assert len(page.html) < len(written[0].html)


def test_every_image_has_its_row_and_its_picture(planted_run: Any, written: tuple[Page, Path]) -> None:
    page, _ = written
    assignments = planted_run.inputs["assign"].read_table("assignments/part-00000.parquet").to_pylist()
    by_id = {row["image_id"]: row for row in assignments}
    assert sorted(page.ids) == sorted(by_id)
    has_picture = np.frombuffer(base64.b64decode(page.core["images"]["has_picture"]), np.uint8)
    assert has_picture.tolist() == [1] * len(page.ids)
    for row, (image, uri) in enumerate(zip(page.ids, page.uris, strict=True)):
        wanted = by_id[image]
        assert uri == wanted["uri"]
        assert page.columns["cluster"][row] == wanted["cluster"]
        assert page.columns["second"][row] == wanted["second_choice"]
        assert page.columns["agreement"][row] / 250 == pytest.approx(wanted["agreement"], abs=0.003)
        assert page.columns["probability"][row] / 250 == pytest.approx(wanted["consensus_probability"], abs=0.003)
        assert page.columns["distance"][row] == wanted["outlier_score"]
        assert page.core["images"]["labels"][page.columns["label"][row]] == uri.rsplit("/", 2)[1]
        (picture,) = next(load_thumbnails([uri])) if row % 40 == 0 else (None,)
        if picture is not None:
            assert np.abs(page.thumbnail(row).astype(int) - picture).mean() < 12


def test_without_true_labels_the_page_offers_none(planted_run: Any, tmp_path: Path) -> None:
    writer = ArtifactWriter(Folder.at(tmp_path / "evaluate"))
    writer.write_bytes("metrics.json", planted_run.inputs["evaluate"].read_bytes("metrics.json"))
    evaluate = writer.commit(
        stage="evaluate", fingerprint="unlabelled", inputs={}, config={}, metrics={"generalization": 0.9}, seconds=1.0
    )
    unlabelled = replace(planted_run, inputs=planted_run.inputs | {"evaluate": evaluate})
    run(unlabelled.config, unlabelled.context(tmp_path / "report"))
    page = Page(tmp_path / "report")
    assert "label" not in page.columns
    assert page.core["images"]["labels"] == []
    assert page.core["scores"]["true"] == []


def test_images_are_in_the_order_of_clusters_and_exemplars_come_first(
    planted_run: Any, written: tuple[Page, Path]
) -> None:
    page, _ = written
    exemplars = planted_run.inputs["assign"].read_table("exemplars.parquet").to_pylist()
    for cluster in page.core["clusters"]:
        first, number = cluster["first"], cluster["shown"]
        assert (page.columns["cluster"][first : first + number] == cluster["cluster"]).all()
        wanted = [row["image_id"] for row in exemplars if row["cluster"] == cluster["cluster"]]
        assert page.ids[first : first + len(wanted)] == wanted
    assert sum(cluster["shown"] for cluster in page.core["clusters"]) == len(page.ids) == 89


def test_similar_images_are_those_with_the_highest_cosine(planted_run: Any, written: tuple[Page, Path]) -> None:
    page, _ = written
    table = pa.concat_tables([planted_run.inputs["embed"].read_table(f"part-0000{part}.parquet") for part in range(3)])
    x = np.stack(table["embedding"].to_numpy())[page.ids]
    x = x.astype(np.float64) - x.mean(axis=0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x -= x.mean(axis=0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosine = x @ x.T
    np.fill_diagonal(cosine, -2)
    found = np.take_along_axis(cosine, page.similar.astype(int), axis=1)
    best = -np.sort(-cosine, axis=1)[:, : found.shape[1]]
    np.testing.assert_allclose(found, best, atol=1e-3)


def test_names_of_files_cannot_end_the_script(written: tuple[Page, Path]) -> None:
    page, _ = written
    assert "'x' <" not in page.html
    assert "<b>&" not in page.html
    assert any("'x' <i>.png" in uri for uri in page.uris)


def test_the_page_has_the_numbers_of_the_run(written: tuple[Page, Path]) -> None:
    core = written[0].core
    assert core["counts"] == {"listed": 90, "assigned": 89, "errors": 1, "outliers": 1, "noise": 0, "shown": 89}
    assert core["scores"]["anmi"] == 0.8123
    assert core["scores"]["estimate"] == 0.87
    assert core["scores"]["true"][0] == ["ACC", 0.9111]
    assert core["errors"][0][2] == "truncated"
    assert core["run"]["consensus"] == [["mcla", 0.8123], ["hbgf", 0.7]]
    assert core["run"]["skipped"][0][0] == "cspa"
    assert core["made_for"]["num_clusters"] == 4
    assert "num_clusters: 4" in core["run"]["settings"]


def test_the_least_certain_images_come_first(written: tuple[Page, Path]) -> None:
    page, _ = written
    agreement = page.columns["agreement"][page.core["least_certain"]]
    assert (np.diff(agreement.astype(int)) >= 0).all()
    # The three images planted in the wrong cluster.
    assert {page.ids[row] for row in page.core["least_certain"][:3]} == {0, 1, 2}


def test_the_outlier_is_listed(written: tuple[Page, Path]) -> None:
    page, _ = written
    assert [page.ids[row] for row in page.core["outliers"]] == [7]


def test_there_is_a_diagram_of_each_kind(written: tuple[Page, Path]) -> None:
    plots = {plot["heading"]: plot for plot in written[0].core["plots"]}
    assert list(plots) == [
        "Cluster sizes",
        "Agreement and consensus probability",
        "Similarity of images",
        "Neighbours by threshold",
        "Precision by threshold",
        "Training",
    ]
    (sizes,) = plots["Cluster sizes"]["series"]
    assert (sizes["kind"], sizes["y"]) == ("bars", [33, 29, 27, 0])
    assert plots["Similarity of images"]["marks"] == [{"x": 0.4, "text": "given: 0.40"}]
    nearest = plots["Similarity of images"]["series"][1]
    assert (nearest["x"], len(nearest["y"])) == ([-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0], 6)
    assert sum(nearest["y"]) == pytest.approx(1, abs=1e-5)
    assert [one["name"] for one in plots["Training"]["series"]] == ["mean of the heads", "best head"]
    assert plots["Training"]["series"][1]["y"][:2] == [2.5, 1.25]


def test_the_contact_sheet_has_a_caption_and_the_exemplars_of_each_cluster(
    planted_run: Any, written: tuple[Page, Path]
) -> None:
    sheet = np.asarray(Image.open(written[1] / "clusters.png"))
    exemplars = planted_run.inputs["assign"].read_table("exemplars.parquet").to_pylist()
    sizes = np.bincount(planted_run.inputs["consensus"].read_array("labels.npy"))
    assert sheet.shape == (3 * 132 + 4, 150 + 12 * 132 + 4, 3)
    for row, cluster in enumerate(np.argsort(-sizes, kind="stable")):
        top = 4 + row * 132
        assert (sheet[top : top + 128, :150] < 128).any()
        uris = [image["uri"] for image in exemplars if image["cluster"] == cluster][:12]
        (pictures,) = load_thumbnails(uris)
        assert len({picture.tobytes() for picture in pictures}) == 12
        for column, picture in enumerate(pictures):
            left = 150 + column * 132
            np.testing.assert_array_equal(sheet[top : top + 128, left : left + 128], picture)


def test_the_same_run_gives_the_same_bytes(planted_run: Any, written: tuple[Page, Path], tmp_path: Path) -> None:
    run(planted_run.config, planted_run.context(tmp_path))
    for name in ("report.html", "clusters.png"):
        assert (tmp_path / name).read_bytes() == (written[1] / name).read_bytes()


def test_above_max_images_a_sample_of_each_cluster_is_shown(planted_run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("icce_ray.report.page_content.NUM_LISTED", 3)
    report = planted_run.config.report.model_copy(update={"max_images": 60, "title": "Fish & <chips>"})
    config = planted_run.config.model_copy(update={"report": report})
    exemplars = planted_run.inputs["assign"].read_table("exemplars.parquet")
    few = exemplars.filter(pc.less(exemplars["rank"], 4))
    read = Artifact.read_table
    monkeypatch.setattr(
        Artifact, "read_table", lambda self, name: few if name == "exemplars.parquet" else read(self, name)
    )
    run(config, replace(planted_run, config=config).context(tmp_path))
    page = Page(tmp_path)
    assert page.core["title"] == "Fish & <chips>"
    assert page.core["counts"]["assigned"] == 89
    # 20 of each cluster, its 4 exemplars, and the images that are listed elsewhere on the page.
    shown = [cluster["shown"] for cluster in page.core["clusters"] if cluster["size"]]
    assert min(shown) >= 20
    assert sum(shown) == len(set(page.ids)) == page.core["counts"]["shown"] <= 60 + 3 * 4 + 4


def test_images_that_are_gone_have_no_picture(planted_run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("icce_ray.report.pictures.read_image", lambda uri: "missing")
    metrics = run(planted_run.config, planted_run.context(tmp_path))
    page = Page(tmp_path)
    assert metrics["num_pictures"] == 0
    assert page.sheets == {}
    assert len(page.uris) == 89
    assert not (tmp_path / "clusters.png").exists()


def test_ready_made_embeddings_are_shown_by_their_rows(make_run: Callable[..., Any], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((60, 6), dtype=np.float32))
    config = Config.model_validate(
        {"embeddings": {"uri": str(tmp_path / "x.npy")}, "num_clusters": 3, "output": str(tmp_path / "out")}
    )
    planted = make_run(config, tmp_path / "out", 25)
    metrics = run(config, planted.context(tmp_path / "report"))
    page = Page(tmp_path / "report")
    assert metrics["num_pictures"] == 0
    assert any(uri.endswith("x.npy#0") for uri in page.uris)


def test_a_chosen_number_of_clusters_is_explained_with_its_curves(planted_run: Any, tmp_path: Path) -> None:
    points = []
    for number, height in ((2, 0.1), (4, 0.9), (8, 0.3)):
        values = np.array([height, height + 0.05])
        points.append(Measured(number, values, values / 2, values / 3))
    choice = choose(points, lambda coarse, fine: 0.0)
    writer = ArtifactWriter(Folder.at(tmp_path / "cluster_count"))
    writer.write_table("by_count.parquet", choice.by_count())
    metrics = {"choice": choice.sentence()}
    counted = writer.commit(stage="cluster_count", fingerprint="c", inputs={}, config={}, metrics=metrics, seconds=1.0)
    context = replace(planted_run.context(tmp_path / "report"), inputs={**planted_run.inputs, "cluster_count": counted})
    run(planted_run.config, context)
    core = Page(tmp_path / "report").core
    assert core["choice"].startswith("4 clusters were chosen, tried 2 to 8")
    plots = {plot["heading"]: plot for plot in core["plots"]}
    for heading in ("Score", "Silhouette", "Gap of the eigenvalues", "Share of clusters that recur"):
        assert plots[heading]["marks"] == [{"x": 4, "text": "chosen: 4"}]
        (line,) = plots[heading]["series"]
        assert line["x"] == [2, 4, 8]
        assert all(low <= y <= high for low, y, high in zip(line["low"], line["y"], line["high"], strict=True))


def test_noise_and_the_clusters_of_each_method_are_on_the_page(combined_run: Any, tmp_path: Path) -> None:
    run(combined_run.config, combined_run.context(tmp_path))
    page = Page(tmp_path)
    assert page.core["counts"]["assigned"] == page.core["counts"]["shown"] == 89
    assert page.core["counts"]["noise"] == 7
    cluster, ids = page.columns["cluster"], np.array(page.ids)
    assert sorted(ids[cluster == -1]) == list(range(40, 47))
    assert (cluster[-7:] == -1).all(), "noise comes last"
    assert {page.columns["cluster"][row] for row in page.core["least_certain"]} == {0, 1, 2}
    assert page.core["images"]["clusterings"] == ["icce", "<b>hdbscan"]
    assert [row["name"] for row in page.core["methods"]["rows"]] == ["consensus", "icce", "<b>hdbscan"]
    icce, hdbscan = (np.frombuffer(base64.b64decode(text), np.int32) for text in page.data["clusterings"])
    np.testing.assert_array_equal(hdbscan, cluster)
    np.testing.assert_array_equal(icce, np.maximum(cluster, 0))
