"""The page in a real Chromium, opened from the disk. Skipped where there is no Chromium or no Playwright."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icce_ray.report import page_files
from icce_ray.report.page import run

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine", allow_module_level=True)

WIDE, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}
VIEWS = ("clusters", "map", "uncertain", "outliers", "duplicates", "confusion", "hierarchy", "plots", "methods",
         "noise", "errors", "corrections", "run", "cluster/1", "search/green", "similar/3")  # fmt: skip
MARKUP = "<img src=x onerror=window.pwned=1>"
PLACE_OF_DOT = """row => {
  const canvas = document.querySelector("canvas");
  const unit = Math.min(canvas.width, canvas.height) / 65535;
  return [map.left + COLUMNS.x[row] * unit, map.top + (65535 - COLUMNS.y[row]) * unit];
}"""
HAS_COLORS = """wanted => {
  const canvas = document.querySelector("canvas");
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size === wanted;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def reports(planted_run: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same page as a single file, and with a folder of data."""
    folder = tmp_path_factory.mktemp("pages")
    run(planted_run.config, planted_run.context(folder / "single"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_files, "MAX_INLINE_BYTES", 20_000)
        run(planted_run.config, planted_run.context(folder / "folder"))
    return {name: folder / name / "report.html" for name in ("single", "folder")}


class Opened:
    """A page in a tab, with what the console said and what was requested."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        # Playwright's own waiting needs eval, which the page forbids.
        options = {"bypass_csp": True} | options
        self.context = browser.new_context(viewport=WIDE, accept_downloads=True, **options)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(60_000)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.tab.on("pageerror", lambda error: self.problems.append(str(error)))
        self.tab.on("console", lambda message: self.problems.append(message.text) if message.type == "error" else None)
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("dialog", lambda dialog: dialog.accept())
        self.path = path
        self.tab.goto(path.as_uri())
        self.tab.wait_for_selector("html[data-ready]")

    def go(self, view: str) -> None:
        self.tab.evaluate("view => { location.hash = view; }", view)
        self.tab.wait_for_selector(f"body[data-view='{view}']")

    def text(self, selector: str = "main") -> str:
        return str(self.tab.locator(selector).inner_text())


@pytest.fixture
def opened(browser: Any, reports: dict[str, Path]) -> Iterator[Opened]:
    page = Opened(browser, reports["folder"])
    yield page
    page.context.close()
    assert page.problems == []


@pytest.mark.parametrize(("kind", "scheme"), [("single", "light"), ("folder", "dark")])
def test_every_view_opens_from_the_disk_at_both_widths(
    browser: Any, reports: dict[str, Path], kind: str, scheme: str
) -> None:
    page = Opened(browser, reports[kind], color_scheme=scheme, bypass_csp=False)
    dark = page.tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, dark[4:-1].split(", "))) < 200) == (scheme == "dark")
    for size in (WIDE, PHONE):
        page.tab.set_viewport_size(size)
        for view in VIEWS:
            page.go(view)
            assert page.tab.evaluate("document.documentElement.scrollWidth") <= size["width"], (view, size)
            assert not {"null", "undefined"} & set(page.text().split()), view
            tab = page.tab.locator("#tabs [aria-current]")
            assert tab.count() == 0 or 0 <= tab.bounding_box()["x"] <= size["width"] - tab.bounding_box()["width"]
    assert page.problems == []
    assert all(url.startswith(("file:", "blob:", "data:")) for url in page.requests)
    assert any("report_data" in url for url in page.requests) == (kind == "folder")
    page.context.close()


def test_markup_in_names_stays_text(opened: Opened) -> None:
    opened.go("cluster/1")
    opened.tab.locator(".name-input").fill(MARKUP)
    opened.tab.locator(".name-input").press("Enter")
    for view in VIEWS:
        opened.go(view)
        assert (
            opened.tab.locator("main i:not(.meter i, .plot-legend i), main b:not(.figure b), img[src=x]").count() == 0
        ), view
    opened.go("clusters")
    assert MARKUP in opened.text()
    opened.tab.locator(".card .picture").first.click()
    assert "<i>.png" in opened.text("dialog")
    assert opened.tab.evaluate("window.pwned") is None


def test_a_cluster_shows_all_its_images_in_the_order_asked_for(opened: Opened, monkeypatch: Any) -> None:
    opened.tab.evaluate("document.querySelector('.card-head').click()")
    opened.tab.wait_for_selector(".tiles")
    assert opened.tab.locator(".tiles .tile").count() == 33
    opened.tab.locator("select[name=order]").select_option("agreement")
    captions = opened.tab.locator(".tiles figcaption").all_inner_texts()
    shares = [int(caption.rstrip("%")) for caption in captions]
    assert shares == sorted(shares)
    assert shares[:3] == [20, 20, 20]
    opened.tab.locator("select[name=order]").select_option("far")
    distances = [float(text) for text in opened.tab.locator(".tiles figcaption").all_inner_texts()]
    assert distances == sorted(distances, reverse=True)
    opened.tab.locator("details.filters summary").click()
    opened.tab.locator("input[name=most]").fill("50")
    assert opened.tab.locator(".tiles .tile").count() == 3
    assert "3 of 33 images" in opened.text()


def test_the_wall_says_what_changed_since_the_run_before(opened: Opened) -> None:
    opened.go("clusters")
    assert opened.text(".changes") == (
        "Since the run before: 2 clusters keep their numbers,  Cluster 0 new,  Cluster 1 took in 5, gone: 6"
    )
    cards = opened.tab.locator(".card-head")
    assert cards.filter(has_text="Cluster 0").locator(".soft").first.inner_text().endswith("images, new")
    opened.tab.click(".changes a >> text=Cluster 1")
    opened.tab.wait_for_selector("body[data-view='cluster/1']")
    assert "images; took in 5; agreement" in opened.text()


def test_many_images_are_paged(browser: Any, reports: dict[str, Path]) -> None:
    page = Opened(browser, reports["single"])
    page.go("search/.png")
    assert page.tab.locator(".tiles .tile").count() == 89
    page.tab.evaluate(
        "document.querySelector('main > div').replaceChildren(grid([...Array(89).keys(), ...Array(60).keys()]))"
    )
    assert page.tab.locator(".tiles .tile").count() == 120
    page.tab.get_by_role("button", name="Next", exact=True).click()
    assert page.tab.locator(".tiles .tile").count() == 29
    page.context.close()


def test_an_image_is_shown_large_with_what_is_known_about_it(opened: Opened, planted_run: Any) -> None:
    opened.go("search/blue/03")
    opened.tab.locator(".tiles .picture").first.click()
    text = opened.text("dialog")
    uri = next(uri for uri in planted_run.inputs["images"].read_table("images-00000.parquet")["uri"].to_pylist()
               if "/blue/03" in uri)  # fmt: skip
    for said in (uri, "Cluster 0", "90% of the clusterings", "true label\nblue", "Most similar"):
        assert said in text
    link = opened.tab.locator("dialog .path a").get_attribute("href")
    assert link.startswith("file:///")
    opened.tab.wait_for_function("document.querySelector('.large img')?.naturalWidth === 24")  # the original
    opened.tab.locator("dialog .strip .picture").first.click()
    assert uri not in opened.text("dialog .path")
    opened.tab.get_by_role("button", name="Next image").click()
    assert "2 of 16" in opened.text("dialog")
    opened.tab.get_by_role("button", name="Similar images").click()
    opened.tab.wait_for_selector("main .tiles")
    assert not opened.tab.locator("dialog").is_visible()
    assert opened.tab.locator(".tiles .tile").count() >= 17


def test_search_finds_paths(opened: Opened) -> None:
    opened.tab.locator("#search input").fill("green <b>&/2")
    opened.tab.locator("#search input").press("Enter")
    opened.tab.wait_for_selector("main .tiles")
    assert opened.tab.locator(".tiles .tile").count() == 10
    opened.go("errors")
    assert opened.tab.locator("#search input").input_value() == ""
    opened.go("search/blue")
    assert opened.tab.locator("#search input").input_value() == "blue"


def test_thumbnails_are_painted_from_their_sheet(opened: Opened) -> None:
    opened.go("cluster/0")
    picture = opened.tab.locator(".tiles .picture").nth(1)
    opened.tab.wait_for_function("document.querySelectorAll('.tiles .picture')[1].style.backgroundImage !== ''")
    opened.tab.wait_for_load_state("networkidle")
    from io import BytesIO

    from PIL import Image

    red, green, blue = np.asarray(Image.open(BytesIO(picture.screenshot())).convert("RGB")).mean(axis=(0, 1))
    assert blue > 150 > max(red, green)


def test_the_map_shows_selects_and_colours(opened: Opened) -> None:
    opened.go("map")
    canvas = opened.tab.locator("canvas")
    opened.tab.wait_for_function("document.querySelector('canvas').width > 300")
    box = canvas.bounding_box()
    place = opened.tab.evaluate(PLACE_OF_DOT, 40)
    x, y = box["x"] + place[0], box["y"] + place[1]
    opened.tab.mouse.move(x, y)
    opened.tab.wait_for_selector("#hover:not([hidden]) .picture")
    opened.tab.mouse.down()
    opened.tab.mouse.up()
    assert "1 selected" in opened.text("#selection")
    opened.tab.get_by_role("button", name="Lasso").click()
    opened.tab.mouse.move(box["x"] + 16, box["y"] + 16)  # inside the round corner
    opened.tab.mouse.down()
    for corner in ((16, box["height"] - 16), (box["width"] - 16, box["height"] - 16), (box["width"] - 16, 16)):
        opened.tab.mouse.move(box["x"] + corner[0], box["y"] + corner[1])
    opened.tab.mouse.up()
    assert "89 selected" in opened.text("#selection")
    opened.tab.get_by_role("button", name="Clear").click()
    for by, num_colors in (("agreement", 3), ("cluster", 4), ("agreement", 3), ("label", 4)):  # with the background
        opened.tab.locator("select[name=color]").select_option(by)
        opened.tab.wait_for_function(HAS_COLORS, arg=num_colors)
    opened.tab.locator(".legend-entry").first.click()
    opened.tab.wait_for_function(HAS_COLORS, arg=3)  # one class, the others faint, the background


def test_corrections_survive_a_reload_and_are_saved(opened: Opened) -> None:
    opened.go("cluster/1")
    opened.tab.locator(".name-input").fill("Green things")
    opened.tab.locator(".name-input").press("Enter")
    opened.tab.locator("select[name=order]").select_option("agreement")
    for place in range(3):
        opened.tab.locator(".tiles .tile").nth(place).hover()
        opened.tab.locator(".tiles .check input").nth(place).click()
    assert "3 selected" in opened.text("#selection")
    opened.tab.locator("#selection .move").select_option("0")
    opened.tab.wait_for_function("members.get(0).length === 30")
    opened.go("cluster/2")
    opened.tab.locator(".tiles .picture").nth(0).click(modifiers=["Control"])
    opened.tab.locator(".tiles .picture").nth(4).click(modifiers=["Shift"])
    assert "5 selected" in opened.text("#selection")
    opened.tab.get_by_role("button", name="Split off").click()
    opened.tab.wait_for_function("document.body.dataset.view === 'cluster/4'")
    assert opened.tab.locator(".tiles .tile").count() == 5
    opened.tab.locator(".tiles .picture").nth(0).click()
    opened.tab.get_by_role("button", name="Drop").click()
    opened.tab.keyboard.press("Escape")
    opened.go("cluster/0")
    opened.tab.get_by_label("Merge into").select_option("2")
    opened.tab.wait_for_function("document.body.dataset.view === 'cluster/2'")

    opened.tab.reload()
    opened.tab.wait_for_selector("html[data-ready]")
    opened.go("corrections")
    assert "Green things" in opened.text()
    with opened.tab.expect_download() as download:
        opened.tab.get_by_role("button", name="Save corrections.json").click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved["format"] == 1
    assert saved["made_for"]["num_clusters"] == 4
    assert saved["clusters"] == [
        {"cluster": 0, "merge_into": 2}, {"cluster": 1, "name": "Green things"}, {"cluster": 4, "is_new": True}
    ]  # fmt: skip
    assert [image["image_id"] for image in saved["images"] if image["cluster"] == 2] == [0, 1, 2]
    assert sum(image["cluster"] == 4 for image in saved["images"]) == 4
    assert sum(image["cluster"] is None for image in saved["images"]) == 1
    opened.tab.get_by_role("button", name="Forget all").click()
    opened.tab.wait_for_function("numEdits() === 0")
    opened.tab.locator("input[type=file]").set_input_files(
        files=[{"name": "corrections.json", "mimeType": "application/json", "buffer": json.dumps(saved).encode()}]
    )
    opened.tab.wait_for_function("numEdits() > 0")
    assert opened.tab.evaluate("toFile()") == saved


def test_a_correction_can_be_taken_back_alone(opened: Opened) -> None:
    opened.tab.evaluate("merge(0, 2)")
    opened.tab.evaluate("move([0], 2)")
    opened.go("corrections")
    assert opened.tab.get_by_role("button", name="Undo").count() == 2
    opened.tab.get_by_role("button", name="Undo").first.click()
    assert opened.tab.evaluate("clusterNumbers()") == [1, 2, 0]
    assert opened.tab.evaluate("members.get(2).includes(0)")


def test_the_hierarchy_is_cut_at_any_level_and_merges(opened: Opened) -> None:
    opened.go("hierarchy")
    for groups in (1, 2, 3):
        opened.tab.locator("input[name=cut]").fill(str(groups))
        assert f"{groups} group" in opened.text()
        assert opened.tab.locator("main .card").count() == min(groups, 3)
    opened.tab.locator("input[name=cut]").fill("2")
    opened.tab.get_by_role("button", name="Merge these groups").click()
    opened.tab.wait_for_function("clusterNumbers().length === 2")


def test_confusion_leads_to_the_images_that_another_cluster_would_take(opened: Opened) -> None:
    opened.go("confusion")
    opened.tab.locator(".matrix td a").first.click()
    opened.tab.wait_for_selector(".tiles .tile")
    chosen = opened.tab.locator("select[name=second]").input_value()
    rows = [
        int(row) for row in opened.tab.locator(".tiles figure").evaluate_all("all => all.map(one => one.dataset.row)")
    ]
    assert rows
    seconds = opened.tab.evaluate("Array.from(COLUMNS.second)")
    assert {seconds[row] for row in rows} == {int(chosen)}


def test_lists_and_errors(opened: Opened) -> None:
    assert "88%\nagreement\n≈ 87%\nestimated accuracy" in opened.text(".figures")
    opened.go("errors")
    assert "truncated" in opened.text()
    opened.go("outliers")
    assert opened.tab.locator(".tiles .tile").count() == 1
    opened.go("run")
    assert "ANMI\t0.812\nestimated accuracy\t0.870\ngeneralisation score\t0.900" in opened.text()


def test_diagrams_have_legends_values_numbers_and_words(opened: Opened) -> None:
    opened.go("plots")
    figures = opened.tab.locator(".plots figure")
    assert figures.count() == 7
    assert figures.locator("svg[role=img][aria-label]").count() == 7
    training = figures.filter(has_text="Training")
    assert training.locator(".plot-legend").inner_text().split("\n") == ["mean of the heads", "best head"]
    words = training.locator("svg").get_attribute("aria-label")
    assert "mean of the heads: 8 values, 0.375 to 3, the highest at 1." in words
    box = training.locator("svg").bounding_box()
    opened.tab.mouse.move(box["x"] + box["width"] - 12, box["y"] + box["height"] / 2)
    assert training.locator(".plot-value").inner_text() == "8: mean of the heads 0.375, best head 0.3125"
    training.locator("summary").click()
    training.locator("tbody tr").first.wait_for()
    assert training.locator("tbody tr").count() == 16
    assert training.locator("tbody tr").first.inner_text() == "mean of the heads\t1\t3"
    line = training.locator("path").first.get_attribute("d")
    heights = [float(place.split()[1]) for place in line[1:].split("L")]
    assert heights == sorted(heights), "a falling loss goes down"
    tree = figures.filter(has_text="Hierarchy").locator("text").all_text_contents()
    assert sorted(tree[:3]) == ["Cluster 0", "Cluster 1", "Cluster 2"], "the empty cluster is no branch"


def test_noise_has_its_place_and_can_be_given_a_cluster(browser: Any, combined_run: Any, tmp_path: Path) -> None:
    run(combined_run.config, combined_run.context(tmp_path))
    page = Opened(browser, tmp_path / "report.html")
    assert "Noise7" in page.text("#tabs").replace("\n", "")
    page.tab.locator(".card-head", has_text="Noise").click()
    page.tab.wait_for_selector("body[data-view=noise] .tiles")
    assert page.tab.locator(".tiles .tile").count() == 7
    page.tab.locator(".tiles .picture").first.click()
    assert page.tab.locator("dialog dd a").first.inner_text().strip() == "Noise"
    page.tab.locator("dialog .move").select_option("2")
    page.tab.wait_for_function("members.get(NOISE).length === 6 && figures(NOISE).size === 6")
    page.tab.get_by_role("button", name="Drop").click()
    page.tab.wait_for_function("members.get(NOISE).length === 7")
    assert page.tab.evaluate("numEdits()") == 0, "noise that is dropped is as it was"
    page.context.close()


def test_a_combined_run_shows_its_methods(browser: Any, combined_run: Any, tmp_path: Path) -> None:
    run(combined_run.config, combined_run.context(tmp_path))
    page = Opened(browser, tmp_path / "report.html")
    page.go("methods")
    assert "<b>hdbscan\t3\t7\t0.900\t\N{EN DASH}" in page.text()
    assert page.text(".matrix tbody tr >> nth=0") == "consensus\t1.00\t0.75\t0.75"
    page.go("map")
    page.tab.locator("select[name=color]").select_option("clustering-1")
    assert page.tab.locator(".legend-entry", has_text="Noise").inner_text().endswith("7")
    page.tab.locator("select[name=color]").select_option("clustering-0")
    assert page.tab.locator(".legend-entry", has_text="Noise").count() == 0
    assert page.problems == []
    page.context.close()


def test_a_missing_data_folder_is_named(browser: Any, reports: dict[str, Path], tmp_path: Path) -> None:
    alone = tmp_path / "report.html"
    shutil.copy(reports["folder"], alone)
    context = browser.new_context()
    tab = context.new_page()
    tab.goto(alone.as_uri())
    tab.wait_for_selector(".problem")
    assert "keep that folder beside the page" in tab.locator(".problem").inner_text()
    context.close()
