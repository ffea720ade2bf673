import ast
import itertools
from pathlib import Path

import pytest
import yaml

import icce_ray.config
from icce_ray.config import Config, build_config, load_config
from icce_ray.errors import ConfigError

THREE_LINES = "images: {uri: photos}\nnum_clusters: 10\noutput: clusters\n"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(THREE_LINES)
    return path


def test_three_lines_are_a_config(config_file: Path) -> None:
    config = load_config(config_file)
    assert (config.images.uri, config.num_clusters, config.output) == ("photos", 10, "clusters")
    assert config.heads.num_heads == 50


def test_overrides_win_over_the_file_and_later_ones_over_earlier(config_file: Path) -> None:
    config = load_config(config_file, ["num_clusters=5", "heads.num_heads=3", "heads.num_heads=4"])
    assert (config.num_clusters, config.heads.num_heads) == (5, 4)


def test_an_override_keeps_the_other_settings_of_its_section(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(THREE_LINES + "heads: {num_epochs: 7}\n")
    config = load_config(path, ["heads.num_heads=3"])
    assert (config.heads.num_heads, config.heads.num_epochs) == (3, 7)


def test_a_method_fills_in_what_is_not_given_and_nothing_else(config_file: Path) -> None:
    config = load_config(config_file, ["method=temi", "neighbors.min_neighbors=20"])
    assert config.neighbors.similarity_threshold is None
    assert config.neighbors.min_neighbors == 20
    assert not config.heads.sinkhorn
    assert config.consensus.methods == ("best_head",)


def test_a_config_survives_the_way_through_json(config_file: Path) -> None:
    config = load_config(config_file, ["method=temi"])
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("heads.num_head=3", r"run\.yaml: heads\.num_head: unknown setting; did you mean num_heads"),
        ("heds.num_heads=3", r"heds: unknown setting; did you mean heads"),
        ("heads.num_heads=many", r"heads\.num_heads: 'many' is not usable: .*integer"),
        ("heads.num_heads=0", r"heads\.num_heads: 0 is not usable: .*greater than or equal to 1"),
        ("resources.assign.gpus_per_worker=1", r"resources: assign\.gpus_per_worker is 1; images are labelled on CPUs"),
        ("num_clusters=1", "num_clusters: 1 puts all images into one cluster.*at least 2"),
        ("num_clusters=0", r"num_clusters: 0 is not usable: .*greater than or equal to 1"),
        ("num_clusters=automatic", r"num_clusters: 'automatic' is not usable: .*integer"),
        ("given_num_clusters=3", "given_num_clusters: unknown setting; did you mean num_clusters"),
        ("cluster_count.min_clusters=1", r"cluster_count\.min_clusters: 1 is not usable: .*greater than or equal to 2"),
        ("cluster_count={min_clusters: 9, max_clusters: 8}", "max_clusters is 8, below min_clusters 9"),
        ("cluster_count={max_clusters: 60, max_images: 50}", "max_images is 50, fewer than the 60 clusters"),
        ("cluster_count.num_seeds=1", r"num_seeds: 1 is not usable: .*greater than or equal to 2"),
        ("neighbors.similarity_threshold=1.5", r"neighbors: similarity_threshold is 1\.5; a cosine lies between"),
        ("neighbors.max_neighbors=1", r"neighbors: max_neighbors is 1, below min_neighbors \d+"),
        ("images.uri=[]", "images: uri is empty; name a folder"),
        ("storage.access_key=id", "access_key and secret_key belong together"),
        ("embeddings.uri=x.npy", r"both are given: name the input with either images\.uri or embeddings\.uri"),
        ("images.uri=null", r"neither is given: name the input with either"),
        ("preset=best", r"preset: 'best' is not usable: .*'paper'"),
        ("preset=temi", r"preset: 'temi' is a method, not a preset; write method: temi"),
        ("preset=icce", r"preset: 'icce' is a method, not a preset; leave preset out"),
        ("method=best", r"method: 'best' is unknown; the methods are icce, temi, scan"),
        ("consensus.methods=[]", r"consensus: methods is empty"),
        ("heads", r"--set heads: write it as section\.key=value"),
        ("heads=5", r"heads: this is a section; write its settings below it"),
        ("heads=[1]", r"heads: this is a section; write its settings below it"),
        ("num_clusters=1e3", r"num_clusters: '1e3' is not usable: write 1000$"),
        ("num_clusters=Auto", r"num_clusters: 'Auto' is not usable: write auto$"),
        ("num_clusters=true", r"num_clusters: True is not usable: true and false are not allowed here"),
        ("sample.max_images=none", r"max_images: 'none' is not usable: write null$"),
        ("sample.max_images=20k", r"max_images: '20k' is not usable: write 20000$"),
        ("embed.max_error_rate=10%", r"max_error_rate: '10%' is not usable: write 0\.1$"),
        ("resources.object_store_bytes=2GB", r"object_store_bytes: '2GB' is not usable: write 2000000000$"),
        ("resources.object_store_bytes=1.5 GiB", r"'1\.5 GiB' is not usable: write 1610612736$"),
        ("resources.object_store_bytes=1.2.3 GB", r"'1\.2\.3 GB' is not usable: .*valid integer"),
        ("heads.learning_rate=.inf", r"learning_rate: inf is not usable: .*finite"),
        ("heads.learning_rate=.nan", r"learning_rate: nan is not usable"),
    ],
)
def test_a_mistake_is_answered_with_key_value_and_remedy(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, [override])


def test_all_mistakes_are_told_at_once(config_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, ["num_clusters=none", "heads.num_head=3", "seed=-1"])
    assert all(key in str(caught.value) for key in ("num_clusters", "heads.num_head", "seed"))


def test_auto_is_a_number_of_clusters_only_where_it_is_chosen(config_file: Path) -> None:
    config = load_config(config_file, ["num_clusters=auto", "cluster_count.max_clusters=30"])
    assert config.is_auto
    assert config.needed_images == (30, "cluster_count.max_clusters: 30 clusters")
    assert Config.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ConfigError, match="num_clusters: 'auto' is chosen by a run; a number is needed here"):
        _ = config.num_clusters
    chosen = config.with_num_clusters(7)
    assert (chosen.is_auto, chosen.num_clusters, chosen.needed_images) == (False, 7, (7, "num_clusters: 7 clusters"))
    assert chosen.model_dump()["num_clusters"] == 7
    assert chosen == load_config(config_file, ["num_clusters=7", "cluster_count.max_clusters=30"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds NoneType, not settings"),
        ("- a\n- b\n", "holds list, not settings"),
        ("a: [1\n", "not valid YAML"),
        ("images: {uri: photos}\noutput: x\n", "num_clusters: not given, and it has no default"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "run.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: there is no such config file"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_preset_belongs_to_one_method(config_file: Path) -> None:
    with pytest.raises(ConfigError, match="preset: 'paper' belongs to method: icce, not to 'temi'"):
        load_config(config_file, ["method=temi", "preset=paper"])


def test_the_paper_preset_is_the_recipe_of_the_paper(config_file: Path) -> None:
    config = load_config(config_file, ["preset=paper", "heads.num_epochs=800"])
    neighbors, heads = config.neighbors, config.heads
    assert (neighbors.similarity_threshold, neighbors.min_neighbors, neighbors.center) == (0.3, 50, False)
    assert (heads.num_heads, heads.learning_rate, heads.warmup_epochs) == (50, 1e-4, 20)
    assert (heads.input_norm, heads.rotate, heads.input_share, heads.balance) == ("batch_norm", False, 1.0, 1.0)
    assert heads.num_epochs == 800, "a setting that is given wins"
    assert load_config(config_file, ["preset=paper"]).heads.num_epochs == 400


def test_labels_from_folders_need_images() -> None:
    data = {"embeddings": {"uri": "x.npy"}, "num_clusters": 2, "output": "o", "evaluate": {"labels": "folder"}}
    with pytest.raises(ConfigError, match="ready-made embeddings have no folders"):
        build_config(data, "test")


def test_every_setting_has_its_meaning_under_it() -> None:
    trees = [ast.parse(path.read_text()) for path in Path(icce_ray.config.__file__).parent.glob("*.py")]
    sections = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    num_settings = 0
    for section in sections:
        for setting, below in itertools.pairwise([*section.body, ast.Pass()]):
            if isinstance(setting, ast.AnnAssign) and not is_section(ast.unparse(setting.annotation)):
                meaning = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                assert meaning, f"{section.name}.{ast.unparse(setting.target)} has no meaning under it"
                num_settings += 1
    assert num_settings > 80


def is_section(annotation: str) -> bool:
    return annotation.endswith(("Config", "Resources"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("embed={backbone: pixels, compile: true}", r"embed\.compile: True has no effect: the backbone is pixels"),
        ("embed.grayscale=true", r"embed\.grayscale: True has no effect: only the backbone pixels has it"),
        ("heads.scan_entropy_weight=2", r"heads\.scan_entropy_weight: 2\.0 has no effect: only SCAN's loss uses it"),
        ("evaluate={labels: folder, label_column: kind}", r"evaluate\.label_column: 'kind' has no effect"),
        ("kmeans.num_starts=3", r"kmeans\.num_starts: 3 has no effect: only the method kmeans uses it"),
        ("embeddings.column=vector", r"embeddings\.column: 'vector' has no effect: no embeddings are given"),
    ],
)
def test_a_setting_without_effect_is_refused(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, [override])


def test_settings_of_images_are_refused_beside_ready_made_embeddings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("embeddings: x.npy\nnum_clusters: 2\noutput: out\nembed: {batch_size: 8, max_error_rate: 0.1}\n")
    with pytest.raises(ConfigError, match=r"embed\.batch_size: 8 has no effect: embeddings are ready-made") as caught:
        load_config(path)
    assert "max_error_rate" not in str(caught.value), "a default that is written out changes nothing"


def test_a_place_alone_is_the_uri_of_its_section(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("images: [/data/a, /data/b]\nnum_clusters: 2\noutput: out\n")
    assert load_config(path).images.uris == ("/data/a", "/data/b")
    assert load_config(path, ["images=/data/photos"]).images.uris == ("/data/photos",)
    assert load_config(path, ["images=null", "embeddings=x.npy"]).embeddings.uri == "x.npy"


def test_a_section_with_nothing_below_is_the_default(config_file: Path) -> None:
    assert load_config(config_file, ["heads=null", "embed=~"]) == load_config(config_file)


def test_a_dotted_name_in_the_file_is_told_where_it_belongs(config_file: Path) -> None:
    config_file.write_text(config_file.read_text() + "heads.num_heads: 3\n")
    with pytest.raises(ConfigError, match=r"heads\.num_heads: unknown setting; write num_heads below heads$"):
        load_config(config_file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("images=~/photos", r"images\.uri.*: ~ and variables are not expanded; write the whole path"),
        ("output=$HOME/out", "output: .* ~ and variables are not expanded"),
        ('output="a\\0b"', "output: .*it holds a NUL character"),
        (f"output={'x' * 5000}", "output: .*it is 5,000 characters long; at most 4,096 are possible"),
        ("output=s3://key:secret@bucket/x", "output: it holds credentials, which manifests would repeat"),
        ("storage.endpoint=http://user:password@minio:9000", r"storage\.endpoint: it holds credentials"),
        ("output=' '", "output: .*it is empty"),
        ("images=[a, 5]", r"^\S+: images\.uri\.1: 5 is not usable: Input should be a valid string$"),
        ("method=[[icce]]", "method and preset: give names"),
        ("preset={a: 1}", "method and preset: give names"),
        ("embed={backbone: pixels, image_size: 100000}", r"image_size: 100000 is not usable: .*equal to 4096"),
        ("neighbors.similarity_threshold=false", "true and false are not allowed here; write null to switch it off"),
        ("heads.num_heads=true", r"heads\.num_heads: True is not usable: true and false are not allowed here"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(config_file, [override])
    assert "password" not in str(caught.value)
    assert "secret@" not in str(caught.value)


def test_a_device_is_no_config() -> None:
    with pytest.raises(ConfigError, match="at most 65,536 are read"):
        load_config("/dev/zero")


@pytest.mark.parametrize("method", ["icce", "temi", "scan"])
def test_a_config_that_is_written_out_whole_can_be_loaded_again(tmp_path: Path, method: str) -> None:
    config = load_config(None, base={"embeddings": "x.npy", "num_clusters": 3, "output": "out", "method": method})
    path = tmp_path / "whole.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(path) == config


def test_an_elastic_pool_starts_with_the_smaller_number_of_workers() -> None:
    data = {"images": {"uri": "x"}, "num_clusters": 2, "output": "o"}
    embed = build_config(data | {"resources": {"embed": {"num_workers": 8, "min_workers": 2}}}, "t").resources.embed
    assert (embed.num_workers, embed.at_start().num_workers) == (8, 2)
    fixed = build_config(data | {"resources": {"embed": {"num_workers": 8}}}, "t").resources.embed
    assert fixed.at_start() == fixed
    with pytest.raises(ConfigError, match=r"min_workers \(3\) is above num_workers \(2\)"):
        build_config(data | {"resources": {"embed": {"num_workers": 2, "min_workers": 3}}}, "t")
