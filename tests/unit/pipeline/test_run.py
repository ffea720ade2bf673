"""The pipeline with toy stages: three of them, count -> double -> score."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import icce_ray.pipeline.plan as plan_module
import icce_ray.pipeline.run as pipeline
from icce_ray.config import Config, build_config
from icce_ray.consensus.stage import CONSENSUS
from icce_ray.count.stage import CLUSTER_COUNT
from icce_ray.errors import InputError, ResourceError
from icce_ray.methods import METHODS
from icce_ray.pipeline.numbers_kept import remember
from icce_ray.pipeline.plan import stages_of
from icce_ray.report.stage import REPORT
from icce_ray.stage import Stage, StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder
from icce_ray.store.run_records import take_unfinished

ran: list[str] = []


def images(config: Config, context: StageContext) -> dict[str, Any]:
    ran.append("images")
    uris = [f"/photos/{'ab'[number % 2]}/{number}.png" for number in range(6)]
    context.output.write_table("images.parquet", pa.table({"image_id": list(range(6)), "uri": uris}))
    return {}


def embed(config: Config, context: StageContext) -> dict[str, Any]:
    ran.append("embed")
    num_images = context.inputs["images"].read_table("images.parquet").num_rows
    context.output.write_table("errors.parquet", pa.table({"image_id": [5]}))
    context.output.write_json("part.json", list(range(num_images - 1)))
    return {"num_embedded": num_images - 1}


def consensus(config: Config, context: StageContext) -> dict[str, Any]:
    ran.append("consensus")
    context.output.write_json("labels.json", [value % 2 for value in context.inputs["embed"].read_json("part.json")])
    return {"anmi": 0.75}


def assign(config: Config, context: StageContext) -> dict[str, Any]:
    ran.append("assign")
    context.output.write_json("assignments/rows.json", context.inputs["consensus"].read_json("labels.json"))
    return {}


def evaluate(config: Config, context: StageContext) -> dict[str, Any]:
    ran.append("evaluate")
    return {"acc": 1.0} if config.evaluate.labels else {}


def report(config: Config, context: StageContext) -> dict[str, Any]:
    ran.append("report")
    context.output.write_bytes("report.html", b"<html>")
    return {}


TOYS = (
    Stage("images", "toy_images", 1, (), lambda config: {"uri": config.images.uri}),
    Stage("embed", "toy_embed", 1, ("images",), lambda config: {"backbone": config.embed.backbone}),
    Stage("consensus", "toy_consensus", 1, ("embed",), lambda config: {"seed": config.seed}),
    Stage("assign", "toy_assign", 1, ("embed", "consensus"), lambda config: {}),
    Stage(
        "evaluate", "toy_evaluate", 1, ("assign",), lambda config: {"labels": config.evaluate.labels}, sees_labels=True
    ),
    Stage("report", "toy_report", 1, ("evaluate",), lambda config: {"title": config.report.title}),
)
ALL = [stage.name for stage in TOYS]


REAL_CHECK = pipeline.check_stages


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (images, embed, consensus, assign, evaluate, report):
        install(monkeypatch, function.__name__, function)
    use_stages(monkeypatch, lambda config: TOYS)
    monkeypatch.setattr(pipeline, "check_stages", lambda config, pending: None)
    ran.clear()


def use_stages(monkeypatch: pytest.MonkeyPatch, toy_stages_of: Callable[[Config], tuple[Stage, ...]]) -> None:
    for module in (plan_module, pipeline):
        monkeypatch.setattr(module, "stages_of", toy_stages_of)


def install(monkeypatch: pytest.MonkeyPatch, name: str, function: Any) -> None:
    module = types.ModuleType(f"toy_{name}")
    module.run = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def config_for(tmp_path: Path, **settings: Any) -> Config:
    data = {"images": {"uri": "photos"}, "num_clusters": 2, "output": str(tmp_path / "out")}
    return build_config(data | settings, "test")


def run_again(tmp_path: Path, **settings: Any) -> list[str]:
    ran.clear()
    pipeline.run_pipeline(config_for(tmp_path, **settings), quiet=True)
    return list(ran)


def part(tmp_path: Path, stage: str, name: str) -> Path:
    (path,) = (tmp_path / "out" / stage).glob(f"*/{name}")
    return path


def test_a_run_does_every_stage_once_in_order_and_sums_up(tmp_path: Path) -> None:
    result = pipeline.run_pipeline(config_for(tmp_path), quiet=True)
    assert ran == ALL
    assert (result.num_images, result.num_errors, result.num_clusters, result.anmi) == (6, 1, 2, 0.75)
    assert (result.metrics, result.finished_before) == ({}, ())
    assert Path(result.report).read_bytes() == b"<html>"
    assert list(result.seconds) == ALL


@pytest.mark.parametrize(
    ("settings", "stage"),
    [
        ({"num_clusters": 3}, []),
        ({"num_clusters": "auto"}, ["cluster_count"]),
        ({"num_clusters": "auto", "method": "hdbscan"}, ["method"]),
    ],
)
def test_the_stage_that_chooses_the_number_of_clusters(settings: dict[str, Any], stage: list[str]) -> None:
    config = build_config({"images": {"uri": "photos"}, "output": "out"} | settings, "test")
    assert [each.name for each in stages_of(config) if each.chooses_number] == stage


def test_the_same_run_again_does_nothing_and_gives_the_same(tmp_path: Path) -> None:
    first = pipeline.run_pipeline(config_for(tmp_path), quiet=True).to_json()
    ran.clear()
    second = pipeline.run_pipeline(config_for(tmp_path), quiet=True).to_json()
    assert ran == []
    assert second.pop("finished_before") == tuple(ALL)
    assert second.pop("seconds") == dict.fromkeys(ALL, 0.0)
    assert second.items() <= first.items()


def test_the_artifacts_of_stages_that_no_run_records_are_noted_before_they_are_made(tmp_path: Path) -> None:
    config, noted = config_for(tmp_path), []

    def spy(config: Config, context: StageContext) -> dict[str, Any]:
        noted.extend(take_unfinished(config.output, remove_old=False))
        return images(config, context)

    sys.modules["toy_images"].run = spy  # type: ignore[attr-defined]
    planned = plan_module.plan(config)
    pipeline.run_stages(config, planned, artifacts := {}, True)
    assert noted[0]["stages"] == {step.name: step.fingerprint for step in planned}
    next((tmp_path / "out" / "runs" / "unfinished").iterdir()).unlink()
    pipeline.run_stages(config, planned, artifacts, True)
    assert take_unfinished(config.output, remove_old=False) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"report": {"title": "Cats"}}, ["report"]),
        ({"evaluate": {"labels": "folder"}}, ["evaluate", "report"]),
        ({"seed": 1}, ["consensus", "assign", "evaluate", "report"]),
        ({"embed": {"backbone": "pixels"}}, ["embed", "consensus", "assign", "evaluate", "report"]),
        ({"images": {"uri": "others"}}, ALL),
        ({"resources": {"num_cpus": 1}}, []),
    ],
)
def test_a_changed_setting_redoes_what_depends_on_it_and_no_more(
    tmp_path: Path, change: dict[str, Any], expected: list[str]
) -> None:
    run_again(tmp_path)
    assert run_again(tmp_path, **change) == expected
    assert run_again(tmp_path) == []


def test_no_stage_but_evaluate_is_told_where_the_labels_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}
    for function in (images, embed, consensus, assign, evaluate, report):

        def spy(config: Config, context: StageContext, function: Any = function) -> dict[str, Any]:
            told[function.__name__] = config.evaluate.labels
            return dict(function(config, context))

        install(monkeypatch, function.__name__, spy)
    run_again(tmp_path, evaluate={"labels": "folder"})
    assert told == dict.fromkeys(ALL) | {"evaluate": "folder"}
    real = stages_of(config_for(tmp_path, **AUTO))
    assert [stage.name for stage in real if stage.sees_labels] == ["evaluate"]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Toy stages of a run with `num_clusters: auto`; what is in the list is chosen."""
    numbers = [3]

    def cluster_count(config: Config, context: StageContext) -> dict[str, Any]:
        ran.append("cluster_count")
        assert config.is_auto
        choice = f"{numbers[0]} clusters were chosen"
        return {"num_clusters": numbers[0], "num_clusters_range": [2, 4], "choice": choice}

    def consensus_of_three(config: Config, context: StageContext) -> dict[str, Any]:
        assert config.num_clusters == numbers[0], "later stages know a number only"
        return consensus(config, context)

    install(monkeypatch, "cluster_count", cluster_count)
    install(monkeypatch, "consensus", consensus_of_three)
    count = Stage("cluster_count", "toy_cluster_count", 1, ("embed",), lambda config: {}, chooses_number=True)
    drawn = replace(TOYS[2], settings=lambda config: {"seed": config.seed, "num_clusters": config.num_clusters})
    stages = (*TOYS[:2], drawn, *TOYS[3:])
    last = replace(stages[-1], inputs=(*stages[-1].inputs, "cluster_count"))
    with_count = (*stages[:2], count, *stages[2:-1], last)
    use_stages(monkeypatch, lambda config: with_count if config.is_auto else stages)
    return numbers


AUTO = {"num_clusters": "auto"}
COUNTED = [*ALL[:2], "cluster_count", *ALL[2:]]


def test_auto_chooses_first_and_is_then_the_run_of_that_number(
    tmp_path: Path, chosen: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert [step.name for step in pipeline.plan(config_for(tmp_path, **AUTO))] == COUNTED[:3]
    result = pipeline.run_pipeline(config_for(tmp_path, **AUTO))
    assert ran == COUNTED
    assert (result.num_clusters, result.num_clusters_range) == (3, (2, 4))
    assert (list(result.seconds), result.finished_before) == (COUNTED, ())
    assert "3 clusters were chosen" in capsys.readouterr().err

    planned = pipeline.plan(config_for(tmp_path, **AUTO))
    assert ([step.name for step in planned], pipeline.run_name(planned)) == (COUNTED, result.run)
    assert run_again(tmp_path, **AUTO) == []
    assert run_again(tmp_path, num_clusters=3) == ["report"], "nothing but the page knows where the number is from"


def test_what_the_run_of_the_number_has_finished_is_used_by_auto(tmp_path: Path, chosen: list[int]) -> None:
    run_again(tmp_path, num_clusters=3)
    ran.clear()
    result = pipeline.run_pipeline(config_for(tmp_path, **AUTO), quiet=True)
    assert ran == ["cluster_count", "report"]
    assert set(result.finished_before) == set(COUNTED) - set(ran)


def test_a_run_that_was_killed_after_the_choice_does_not_choose_again(
    tmp_path: Path, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(config: Config, context: StageContext) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        install(patch, "assign", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run_pipeline(config_for(tmp_path, **AUTO), quiet=True)
    assert run_again(tmp_path, **AUTO) == ["assign", "evaluate", "report"]


def test_the_record_of_a_run_with_auto_says_what_was_asked_and_what_was_chosen(
    tmp_path: Path, chosen: list[int]
) -> None:
    from icce_ray.store.run_records import read_records

    pipeline.run_pipeline(config_for(tmp_path, **AUTO), quiet=True)
    (record,) = read_records(str(tmp_path / "out"))
    assert list(record["stages"]) == COUNTED
    assert Config.model_validate(record["config"]).is_auto
    assert (record["result"]["num_clusters"], record["result"]["num_clusters_range"]) == (3, [2, 4])


def test_a_run_that_is_still_choosing_can_be_watched_under_a_name_of_its_own(
    tmp_path: Path, chosen: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from icce_ray.cli import main

    def killed(config: Config, context: StageContext) -> dict[str, Any]:
        context.progress.update(2, 8)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        install(patch, "cluster_count", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run_pipeline(config_for(tmp_path, **AUTO), quiet=True)
    assert main(["status", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert ": interrupted " in said
    assert "cluster_count interrupted at 2/8 " in said
    result = pipeline.run_pipeline(config_for(tmp_path, **AUTO), quiet=True)
    assert main(["status", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert (said.count("run "), f"run {result.run} in" in said) == (1, True)


def test_a_range_that_the_images_do_not_allow_is_refused_once_they_are_listed(
    tmp_path: Path, chosen: list[int]
) -> None:
    asked = AUTO | {"cluster_count": {"max_clusters": 7}}
    with pytest.raises(InputError, match=r"cluster_count\.max_clusters: 7 clusters asked for, but there are only 6"):
        pipeline.run_pipeline(config_for(tmp_path, **asked), quiet=True)
    asked = {"num_clusters": "auto", "method": "hdbscan"}
    with pytest.raises(InputError, match=r"min_cluster_size: 2 clusters of 15 images asked for, but there are only 6"):
        pipeline.run_pipeline(config_for(tmp_path, **asked), quiet=True)
    assert ran == ["images"]


@pytest.mark.parametrize(
    ("section", "setting", "values", "counts_anew"),
    [
        ("heads", "num_heads", (16, 50), False),  # it trains none
        ("neighbors", "center", (True, False), True),
        ("neighbors", "similarity_threshold", (0.5, None), False),
        ("cluster_count", "num_seeds", (4, 6), True),
    ],
)
def test_the_choice_is_made_anew_when_what_it_is_made_with_changes(
    tmp_path: Path, section: str, setting: str, values: tuple[Any, Any], counts_anew: bool
) -> None:
    one, other = (
        CLUSTER_COUNT.settings(config_for(tmp_path, **AUTO, **{section: {setting: value}})) for value in values
    )
    assert (one != other) == counts_anew


def test_the_stages_of_auto_are_those_of_a_number_and_the_choice(tmp_path: Path) -> None:
    auto, given = stages_of(config_for(tmp_path, **AUTO)), stages_of(config_for(tmp_path))
    assert [stage.name for stage in auto] == [
        "images", "embed", "sample", "cluster_count", "neighbors", "method", "consensus", "classifier", "assign",
        "evaluate", "report",
    ]  # fmt: skip
    inputs = {stage.name: stage.inputs for stage in auto if stage.name != "cluster_count"}
    assert inputs.pop("report") == ({stage.name: stage.inputs for stage in given}["report"] + ("cluster_count",))
    assert inputs == {stage.name: stage.inputs for stage in given if stage.name != "report"}


def test_a_method_that_needs_no_graph_has_no_stage_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "plain", replace(METHODS["icce"], needs_graph=False))
    stages = {stage.name: stage for stage in stages_of(config_for(tmp_path, method="plain"))}
    assert "neighbors" not in stages
    assert stages["method"].inputs == ("embed", "sample")
    assert "neighbors" not in stages["report"].inputs


def test_methods_with_the_same_settings_share_their_clusterings(tmp_path: Path) -> None:
    def identity(**settings: Any) -> tuple[Any, ...]:
        config = config_for(tmp_path, **settings)
        (stage,) = (stage for stage in stages_of(config) if stage.name == "method")
        return stage.version, stage.inputs, stage.settings(config)

    temi = METHODS["temi"].settings
    assert identity(method="temi") == identity(heads=temi["heads"]) != identity()
    assert identity(heads={"checkpoint_interval_s": 5}) == identity()


def test_numbers_are_those_of_the_run_that_was_newest_when_it_was_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, kept = config_for(tmp_path), []

    def overtaken(config: Config, pending: Any) -> None:  # as while another method trains
        Folder.at(tmp_path / "out" / "runs").write_bytes("other.json", b"{}")
        remember(asked, "other", "another listing", numbers_from="none")

    def keep(config: Config, context: StageContext) -> dict[str, Any]:
        kept.append(config.consensus.numbers_from)
        return consensus(config, context)

    monkeypatch.setattr(pipeline, "check_stages", overtaken)
    install(monkeypatch, "consensus", keep)
    pipeline.run_pipeline(asked, quiet=True)
    assert kept == ["none"]


def test_a_failed_stage_keeps_what_was_finished_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Config, context: StageContext) -> dict[str, Any]:
        context.output.write_json("labels.json", ["half"])
        raise RuntimeError("the machine is tired")

    with monkeypatch.context() as patch:
        install(patch, "consensus", broken)
        with pytest.raises(RuntimeError, match="tired"):
            pipeline.run_pipeline(config_for(tmp_path), quiet=True)
    assert [step.artifact is not None for step in pipeline.plan(config_for(tmp_path))] == [True, True] + [False] * 4
    assert run_again(tmp_path) == ["consensus", "assign", "evaluate", "report"]


def test_a_damaged_input_is_made_again_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_again(tmp_path)
    damaged = part(tmp_path, "embed", "part.json")
    sound = damaged.read_bytes()
    damaged.write_bytes(sound.replace(b"1", b"7"))
    ran.clear()
    pipeline.run_pipeline(config_for(tmp_path, seed=1))
    assert ran == ["consensus", "embed", "consensus", "assign", "evaluate", "report"]
    assert damaged.read_bytes() == sound
    assert "embed: damaged on storage (part.json), made again" in capsys.readouterr().err


def test_an_input_that_keeps_being_damaged_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiling(config: Config, context: StageContext) -> dict[str, Any]:
        path = part(tmp_path, "embed", "part.json")
        path.write_bytes(path.read_bytes().replace(b"1", b"7"))
        return consensus(config, context)

    install(monkeypatch, "consensus", spoiling)
    with pytest.raises(RuntimeError, match=r"part\.json: the bytes are not those that were written"):
        pipeline.run_pipeline(config_for(tmp_path), quiet=True)
    assert ran.count("embed") == 2


@pytest.mark.parametrize(("stage", "name"), [("embed", "part.json"), ("consensus", "labels.json")])
def test_a_truncated_part_makes_its_stage_and_no_other_run_again(tmp_path: Path, stage: str, name: str) -> None:
    run_again(tmp_path)
    path = part(tmp_path, stage, name)
    sound = path.read_bytes()
    path.write_bytes(sound[:-1])
    assert run_again(tmp_path) == [stage]
    assert path.read_bytes() == sound


def test_labels_that_do_not_fit_the_images_are_refused_before_they_are_embedded(tmp_path: Path) -> None:
    np.save(tmp_path / "true.npy", np.arange(5))
    with pytest.raises(InputError, match=r"true\.npy"):
        pipeline.run_pipeline(config_for(tmp_path, evaluate={"labels": str(tmp_path / "true.npy")}), quiet=True)
    assert ran == ["images"]


def test_more_clusters_than_usable_images_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num_clusters: 6 clusters asked for, but there are only 5 usable images"):
        pipeline.run_pipeline(config_for(tmp_path, num_clusters=6), quiet=True)
    assert ran == ["images", "embed"]


def test_an_output_that_cannot_be_used_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output: .* cannot be read"):
        pipeline.run_pipeline(config_for(tmp_path, output=str(tmp_path / "file" / "out")), quiet=True)
    assert ran == []


def test_extra_runs_that_are_not_there_are_refused_before_any_work(tmp_path: Path) -> None:
    config = config_for(tmp_path, consensus={"extra_runs": ["gone"]})
    with pytest.raises(InputError, match=r"consensus\.extra_runs: there is no run 'gone'"):
        REAL_CHECK(config, [CONSENSUS, REPORT])


def test_the_record_of_a_run_names_its_artifacts(tmp_path: Path) -> None:
    from icce_ray.store.run_records import read_records

    result = pipeline.run_pipeline(config_for(tmp_path), quiet=True)
    (record,) = read_records(str(tmp_path / "out"))
    assert record["run"] == result.run
    assert record["stages"] == {step.name: step.fingerprint for step in pipeline.plan(config_for(tmp_path))}
    assert record["result"]["anmi"] == 0.75
    assert Config.model_validate(record["config"]) == config_for(tmp_path)


def test_the_summary_says_what_came_out_and_where_it_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = pipeline.run_pipeline(config_for(tmp_path, evaluate={"labels": "folder"}))
    said = capsys.readouterr().err
    assert "6 images, 1 error, 2 clusters; ANMI 0.750, ACC 1.000" in said
    latest = tmp_path / "out" / "latest"
    assert f"assignments  {latest}/assignments.parquet\n" in said
    assert f"report       {latest}/report/report.html\n" in said
    assert result.errors in said
    assert (latest / "report").resolve() == Path(result.report).parent
    pipeline.run_pipeline(config_for(tmp_path, evaluate={"labels": "folder"}))
    assert capsys.readouterr().err.count("finished before") == len(ALL)


def test_a_retry_leaves_nothing_of_the_parts_that_it_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder.at(tmp_path / "embed")
    writer = ArtifactWriter(folder)
    for name in ("part-00000", "part-00001"):
        writer.write_bytes(f"{name}.parquet", b"?")
        folder.write_bytes(f"{name}.hashes", b"?")
    commit: dict[str, Any] = {"stage": "embed", "fingerprint": "e", "inputs": {}, "config": {}, "seconds": 0.0}
    writer.write_table("errors.parquet", pa.table({"reason": ["truncated"]}))
    artifact = writer.commit(**commit, metrics={"num_errors": 1})

    def retry(config: Config, context: StageContext, artifact: Artifact) -> dict[str, Any]:
        context.output.add(artifact.part("part-00001.parquet"))
        context.output.write_bytes("part-00000.r1.parquet", b"?")
        folder.write_bytes("part-00000.r1.hashes", b"?")
        context.output.write_table("errors.parquet", pa.table({"reason": pa.array([], pa.string())}))
        return {"num_errors": 0}

    monkeypatch.setitem(sys.modules, "toy_embed", types.SimpleNamespace(retry=retry))
    monkeypatch.setattr(pipeline, "check_stages", lambda *values: None)
    stage: Any = types.SimpleNamespace(
        module="toy_embed", unit="images", inputs=("images",), config_of=lambda config: config
    )
    step: Any = types.SimpleNamespace(
        name="embed", stage=stage, artifact=artifact, folder=folder, fingerprint="e", input_fingerprints={}
    )
    images: Any = types.SimpleNamespace(name="images", artifact=artifact)
    assert pipeline.retry_failed_images(config_for(tmp_path), [images, step], True)
    assert [name for name in folder.names() if name.startswith("part-")] == [
        "part-00000.r1.hashes",
        "part-00000.r1.parquet",
        "part-00001.hashes",
        "part-00001.parquet",
    ]


def test_workers_that_do_not_fit_are_refused_with_the_numbers() -> None:
    from icce_ray.config import WorkerResources
    from icce_ray.runtime.cluster_resources import shortfall

    machines = [(4.0, 0.0), (4.0, 1.0)]
    assert shortfall("method", WorkerResources(num_workers=8), machines) is None
    assert shortfall("method", WorkerResources(num_workers=2, cpus_per_worker=4), machines) is None
    assert "9 workers, but Ray has 8 CPUs" in str(shortfall("method", WorkerResources(num_workers=9), machines))
    assert "2 x 5 CPUs" in str(shortfall("method", WorkerResources(num_workers=2, cpus_per_worker=5), machines))
    assert "2 x 1 GPUs" in str(shortfall("method", WorkerResources(num_workers=2, gpus_per_worker=1), machines))
    assert issubclass(ResourceError, ValueError)
