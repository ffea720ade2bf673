from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from icce_ray.config import Config
from icce_ray.count.choice import Measured, choose
from icce_ray.report.page import run
from icce_ray.report.pictures import load_thumbnails
from icce_ray.store import ArtifactWriter, Folder

VOID = {"meta", "img", "br", "link", "input", "path", "use"}


class Page(HTMLParser):
    """Collects what a page loads and says; fails where a tag is closed that is not open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster"):
                self.loaded.append(value or "")
            elif name in ("href", "xlink:href"):
                self.links.append(value or "")
            elif name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


@pytest.fixture(scope="module")
def written(planted_run: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path]:
    folder = tmp_path_factory.mktemp("report")
    metrics = run(planted_run.config, planted_run.context(folder))
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert metrics["num_bytes"] == len((folder / "report.html").read_bytes())
    return page, folder


def test_the_page_needs_nothing_from_anywhere(written: tuple[Page, Path]) -> None:
    page, _ = written
    assert page.loaded
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.loaded)
    assert all(link.startswith("#") for link in page.links)
    for word in ("http:", "https:", "<script", "<link", "@import", "url(/", "url(h"):
        assert word not in page.html


def test_every_link_within_the_page_leads_somewhere(written: tuple[Page, Path]) -> None:
    page, _ = written
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_every_picture_opens_and_is_the_color_of_its_cluster(written: tuple[Page, Path]) -> None:
    page, _ = written
    for source in page.loaded:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            assert image.size == (96, 96)
    # Blue sorts first, so it is cluster 0 but for the three planted in cluster 1.
    start = page.html.index('id="cluster-0"')
    exemplar = page.html.index("data:image/jpeg;base64,", start)
    data = page.html[exemplar : page.html.index('"', exemplar)].partition(",")[2]
    red, green, blue = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean(axis=(0, 1))
    assert blue > 150 > max(red, green)


def test_names_of_files_are_text_and_never_markup(written: tuple[Page, Path]) -> None:
    page, _ = written
    assert "<i>" not in page.html
    assert "<b>&" not in page.html
    assert "'x' &lt;i&gt;.png" in page.html or "&#39;x&#39; &lt;i&gt;.png" in page.html


def test_the_summary_gives_the_numbers_of_the_run(written: tuple[Page, Path]) -> None:
    text = " ".join(written[0].text.split())
    for said in ("90 images", "1 errors", "4 clusters", "0.812 ANMI", "0.911 ACC", "truncated", "mcla (chosen) 0.8123",
                 "cspa not tried: it compares all pairs of images", "1 (25%)", "consensus 2 s", "num_clusters: 4",
                 "99.0% of 9 held-out images"):  # fmt: skip
        assert said in text


def test_the_least_certain_images_come_first(written: tuple[Page, Path]) -> None:
    html = written[0].html
    shown = html[html.index('id="uncertain"') : html.index('id="errors"')]
    captions = [text.partition("<")[0] for text in shown.split("<figcaption>")[1:]]
    certainties = [float(caption.rpartition(" ")[2]) for caption in captions if "or" in caption]
    assert certainties == sorted(certainties)
    # The three images planted in the wrong cluster.
    assert [caption.partition(",")[0] for caption in captions[:3]] == ["1 or 0"] * 3


def test_the_outlier_is_shown_as_one(written: tuple[Page, Path]) -> None:
    html = written[0].html
    assert "07 " in html[html.index('id="outliers"') : html.index('id="errors"')]


def test_there_is_a_diagram_of_each_kind(written: tuple[Page, Path]) -> None:
    page, _ = written
    assert page.tags.count("svg") == 6
    for label in (
        "threshold 0.40",
        "mean number of neighbours",
        "given: 0.40",
        "best head",
        "clusters, largest first",
        "confidence, agreement",
        "share of heads that merge them",
    ):
        assert label in page.html
    assert "#000000" not in page.html


def test_the_contact_sheet_has_a_caption_and_the_exemplars_of_each_cluster(
    planted_run: Any, written: tuple[Page, Path]
) -> None:
    sheet = np.asarray(Image.open(written[1] / "clusters.png"))
    exemplars = planted_run.inputs["assign"].read_table("exemplars.parquet").to_pylist()
    sizes = np.bincount(planted_run.inputs["consensus"].read_array("labels.npy"))
    assert sheet.shape == (3 * 100 + 4, 120 + 12 * 100 + 4, 3)
    for row, cluster in enumerate(np.argsort(-sizes, kind="stable")):
        top = 4 + row * 100
        assert (sheet[top : top + 96, :120] < 128).any()
        uris = [image["uri"] for image in exemplars if image["cluster"] == cluster][:12]
        pictures = load_thumbnails(uris)
        assert len({picture.tobytes() for picture in pictures.values()}) == 12
        for column, uri in enumerate(uris):
            left = 120 + column * 100
            np.testing.assert_array_equal(sheet[top : top + 96, left : left + 96], pictures[uri])


def test_the_same_run_gives_the_same_bytes(planted_run: Any, written: tuple[Page, Path], tmp_path: Path) -> None:
    run(planted_run.config, planted_run.context(tmp_path))
    for name in ("report.html", "clusters.png"):
        assert (tmp_path / name).read_bytes() == (written[1] / name).read_bytes()


def test_settings_bound_what_is_shown(planted_run: Any, tmp_path: Path) -> None:
    report = planted_run.config.report.model_copy(
        update={"images_per_cluster": 2, "max_clusters": 1, "title": "Fish & <chips>"}
    )
    config = planted_run.config.model_copy(update={"report": report})
    run(config, replace(planted_run, config=config).context(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    assert page.html.count('class="cluster"') == 1
    exemplars = page.html[page.html.index('class="cluster"') : page.html.index('id="uncertain"')]
    assert exemplars.count("<img") == 2
    assert "Fish & <chips>" in page.text


def test_images_that_are_gone_are_named_instead(planted_run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("icce_ray.report.pictures.read_image", lambda uri: "missing")
    metrics = run(planted_run.config, planted_run.context(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    assert metrics["num_pictures"] == 0
    assert page.loaded == []
    assert "blue/" in page.text
    assert not (tmp_path / "clusters.png").exists()


def test_ready_made_embeddings_are_shown_by_their_rows(make_run: Callable[..., Any], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((60, 6), dtype=np.float32))
    config = Config.model_validate(
        {"embeddings": {"uri": str(tmp_path / "x.npy")}, "num_clusters": 3, "output": str(tmp_path / "out")}
    )
    planted = make_run(config, tmp_path / "out", 25)
    metrics = run(config, planted.context(tmp_path / "report"))
    page = Page((tmp_path / "report" / "report.html").read_text())
    assert metrics["num_pictures"] == 0
    assert page.loaded == []
    assert "x.npy" in page.text


def test_a_chosen_number_of_clusters_is_explained_with_its_curves(planted_run: Any, tmp_path: Path) -> None:
    points = {}
    for number, height in ((2, 0.1), (4, 0.9), (8, 0.3)):
        values = np.array([height, height + 0.05])
        points[number] = Measured(number, (0, 1), np.array([number, number]), values, 1 - values, values)
    choice = choose(points)
    writer = ArtifactWriter(Folder.at(tmp_path / "cluster_count"))
    writer.write_table("by_count.parquet", choice.by_count())
    metrics = {"choice": choice.sentence()}
    counted = writer.commit(stage="cluster_count", fingerprint="c", inputs={}, config={}, metrics=metrics, seconds=1.0)
    context = replace(planted_run.context(tmp_path / "report"), inputs={**planted_run.inputs, "cluster_count": counted})
    run(planted_run.config, context)
    page = Page((tmp_path / "report" / "report.html").read_text())
    assert "Number of clusters" in page.text
    assert "4 clusters were chosen, tried 2 to 8" in page.text
    assert "clusters (chosen: 4)" in page.html
    assert "#count" in page.links
    assert "generalisation score" in page.html


def test_a_given_number_of_clusters_is_not(written: tuple[Page, Path]) -> None:
    assert "Number of clusters" not in written[0].text
    assert "#count" not in written[0].links
