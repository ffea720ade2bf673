"""From a bucket to embeddings, over HTTP: an S3 server, and a proxy before it that fails as networks and stores do."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from icce_ray import cli
from icce_ray.config import Config
from icce_ray.embed.feature_matrix import load_features
from icce_ray.errors import InputError, WorkerError
from icce_ray.images import read_images
from icce_ray.images.listing import Listing
from icce_ray.pipeline import run as pipeline
from icce_ray.pipeline.plan import plan
from icce_ray.store import Artifact, ArtifactWriter, Claim, Folder, claim, patient_filesystem, s3
from icce_ray.store.s3 import use_s3

from .stages import run_embed, wait_for, without_ray
from .storage_server import ACCESS_KEY, SECRET_KEY, Faults, client, faulty_proxy, moto_server

PIXELS = {"backbone": "pixels", "image_size": 8}
NUM_IMAGES = 96


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with moto_server() as url, pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        client(url).create_bucket(Bucket="photos")
        client(url).create_bucket(Bucket="results")
        for number in range(NUM_IMAGES):
            client(url).put_object(Bucket="photos", Key=f"all/{number % 3}/{number:03d}.png", Body=png(number))
        yield url


@pytest.fixture(autouse=True)
def _forget_storage() -> Iterator[None]:
    yield
    use_s3(Config(images={"uri": "x"}, num_clusters=2, output="x").storage)


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def config_for(url: str, output: str, uri: Any = "s3://photos/all/", **resources: Any) -> Config:
    return Config(
        output=output,
        num_clusters=2,
        images={"uri": uri},
        embed=PIXELS,
        storage={"endpoint": url, "access_key": ACCESS_KEY, "secret_key": SECRET_KEY},
        resources=resources,
    )


def parts_of(artifact: Artifact) -> dict[str, bytes]:
    return {name: artifact.read_bytes(name) for name in artifact.part_names("part-")}


@pytest.fixture(scope="module")
def undisturbed(endpoint: str) -> Artifact:
    """The embeddings as they should be. All are made in one process: a bucket and Ray are in test_many_nodes.py."""
    with without_ray():
        return run_embed(config_for(endpoint, "s3://results/undisturbed"))


@pytest.mark.slow
def test_a_bucket_is_embedded_into_a_bucket(endpoint: str, undisturbed: Artifact) -> None:
    features = load_features(undisturbed)
    assert features.image_ids.tolist() == list(range(NUM_IMAGES))
    in_order = sorted((f"{number % 3}/{number:03d}", number) for number in range(NUM_IMAGES))
    for row, (_, number) in enumerate(in_order):
        pixels = np.asarray(Image.open(io.BytesIO(png(number))).resize((8, 8), Image.Resampling.BILINEAR))
        np.testing.assert_allclose(features.matrix[row], pixels.reshape(-1) / 255, atol=2e-3)


@pytest.mark.slow
def test_no_secret_is_written_or_said(endpoint: str, undisturbed: Artifact) -> None:
    assert SECRET_KEY not in repr(undisturbed.folder)
    s3 = client(endpoint)
    found = [entry["Key"] for entry in s3.list_objects_v2(Bucket="results")["Contents"]]
    assert any(key.endswith("manifest.json") for key in found)
    for key in found:
        assert SECRET_KEY.encode() not in s3.get_object(Bucket="results", Key=key)["Body"].read(), key


@pytest.mark.slow
def test_faults_of_the_storage_cost_time_and_only_the_bad_object(endpoint: str, undisturbed: Artifact) -> None:
    """One read in ten is answered with 503, one in a hundred never, some are cut short, with and without a length that
    says so; one object always fails."""
    faults = Faults("/photos/all/", 0.1, 0.01, 0.05, 0.05, always_failing="/all/1/040.png")
    with faulty_proxy(endpoint, faults) as url, without_ray(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_images, "READ_TIMEOUTS_S", tuple(seconds / 4 for seconds in read_images.READ_TIMEOUTS_S))
        patch.setattr(read_images, "MIN_TRYING_S", 1.0)
        artifact = run_embed(config_for(url, "s3://results/faults"))
    assert all(faults.seen[f"GET {kind}"] > 0 for kind in ("error", "hang", "truncate", "short")), faults.seen
    errors = artifact.read_table("errors.parquet").to_pylist()
    assert [row["uri"] for row in errors] == ["s3://photos/all/1/040.png"]
    assert errors[0]["reason"].startswith("unreadable: ")
    good, all_of_them = load_features(artifact), load_features(undisturbed)
    assert good.num_images == NUM_IMAGES - 1
    assert np.array_equal(good.matrix, all_of_them.matrix[good.image_ids])

    # The object can be read again: it is tried alone, and the result is as if nothing had been.
    counted = Faults("/photos/all/")
    with faulty_proxy(endpoint, counted) as url, without_ray():
        config = config_for(url, "s3://results/faults")
        assert pipeline.retry_failed_images(config, plan(config), True)
        retried = run_embed(config)
    assert counted.seen["drawn"] == 1
    assert np.array_equal(load_features(retried).matrix, all_of_them.matrix)
    assert (retried.manifest.revision, retried.metrics["num_embedded"]) == (1, 1)
    assert retried.read_table("errors.parquet").num_rows == 0
    assert retried.identity != artifact.identity


JOB = [sys.executable, "-m", "icce_ray"]


def credentials(url: str) -> dict[str, str]:
    given = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_ENDPOINT_URL": url}
    return given | {"AWS_REGION": "us-east-1"}


def write_config(folder: Path, **changes: Any) -> str:
    settings = {
        "images": {"uri": "s3://photos/all/"},
        "output": "s3://results/job",
        "num_clusters": 2,
        "embed": PIXELS,
        "neighbors": {"min_neighbors": 10},
        "heads": {"num_heads": 2, "num_epochs": 3, "warmup_epochs": 1},
        "classifier": {"num_iterations": 50},
    }
    (folder / "run.yaml").write_text(json.dumps(settings | changes))
    return str(folder / "run.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["refused", "no bucket", "no output bucket", "nothing there"])
def test_storage_that_cannot_work_is_one_clear_message_and_is_not_waited_for(
    endpoint: str, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"output": f"s3://results/{tmp_path.name}"}
    if case == "no bucket":
        changes["images"] = {"uri": "s3://no-such-photos/all/"}
    if case == "no output bucket":
        changes["output"] = "s3://no-such-results/job"
    monkeypatch.setattr(s3, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: pytest.fail("waits")))
    monkeypatch.setattr(patient_filesystem, "time", s3.time)
    with faulty_proxy(endpoint, Faults(refuse=case == "refused")) as url:
        place = "http://127.0.0.1:9" if case == "nothing there" else url
        for name, value in credentials(place).items():
            monkeypatch.setenv(name, value)
        code = cli.main(["run", write_config(tmp_path, **changes)])
    said = capsys.readouterr().err
    assert code == 2, said
    says = {
        "refused": "was refused (InvalidAccessKeyId); check the credentials",
        "no bucket": "there is no bucket s3://no-such-photos",
        "no output bucket": "there is no bucket s3://no-such-results",
        "nothing there": "cannot be reached",
    }
    assert says[case] in said.splitlines()[-1]
    assert "Traceback" not in said
    assert SECRET_KEY not in said


@pytest.mark.slow
def test_a_killed_driver_is_followed_by_byte_identical_embeddings_and_a_second_job_is_told(
    endpoint: str, tmp_path: Path, undisturbed: Artifact
) -> None:
    """The driver is killed (-9) while it embeds, at the latest when it waits for the last image; a second job was told
    that the first is at work; the same settings go on from what is there."""
    path = write_config(tmp_path)
    config = config_for(endpoint, "s3://results/job")
    embed = next(step for step in plan(config) if step.name == "embed")
    command, environment = [*JOB, "run", path], os.environ | credentials(endpoint)

    def has_begun() -> bool:
        return any(name.endswith(".parquet") for name in embed.folder.sizes())

    with (
        faulty_proxy(endpoint, Faults(never_answered=f"{NUM_IMAGES - 1:03d}.png")) as url,
        subprocess.Popen(
            command, env=os.environ | credentials(url), start_new_session=True, stderr=subprocess.PIPE
        ) as first,
    ):
        wait_for(lambda: first.poll() is not None or has_begun())
        first.send_signal(signal.SIGSTOP)  # as slow as a job can be, and alive
        second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        asked = [*JOB, "status", "s3://results/job", "--json"]
        told = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
        first.send_signal(signal.SIGCONT)
        first.kill()
    assert first.returncode == -signal.SIGKILL
    assert second.returncode == 2, second.stderr
    assert f"process {first.pid} on " in second.stderr.splitlines()[-1]
    assert "is writing this artifact" in second.stderr.splitlines()[-1]
    assert told.returncode == 0, told.stderr
    (run,) = json.loads(told.stdout.splitlines()[-1])
    # The second job has not told its own story in the place of the first's, which is silent while it is stopped.
    assert run["pid"] == first.pid
    assert run["state"] in ("running", "stopped")
    progress = next(stage["progress"] for stage in run["stages"] if stage["stage"] == "embed")
    assert progress["stage"] == "embed"

    assert SECRET_KEY not in second.stderr + told.stderr
    # The rest of a whole run from bucket to bucket is in test_many_nodes.py.
    with without_ray():
        finished = run_embed(config)
    assert (finished.metrics["num_images"], finished.metrics["num_errors"]) == (NUM_IMAGES, 0)
    assert parts_of(finished) == parts_of(undisturbed)


def test_a_dead_machines_claim_is_taken_over_and_a_renewed_one_is_not(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_s3(config_for(endpoint, "s3://results/x").storage)
    folder = Folder.at("s3://results/claimed")
    monkeypatch.setattr(claim, "LEASE_S", 60.0)
    monkeypatch.setattr(claim, "POLL_S", 0.1)
    monkeypatch.setattr(claim, "RENEW_S", 0.2)
    # Two containers with the same host name, where process ids mean different processes.
    monkeypatch.setattr(claim.socket, "gethostname", lambda: "worker")
    monkeypatch.setattr(claim, "_machine", lambda: "container a")
    first = Claim(folder).__enter__()
    monkeypatch.setattr(claim, "_machine", lambda: "container b")
    with pytest.raises(InputError, match=f"process {os.getpid()} on worker is writing this artifact"):
        Claim(folder).__enter__()
    first._done.set()  # the machine is cut off: nothing renews the claim, nothing removes it
    assert first._renewer is not None
    first._renewer.join()
    monkeypatch.setattr(claim, "LEASE_S", 1.0)
    with Claim(folder) as second:
        monkeypatch.setattr(claim, "LEASE_S", 60.0)
        with pytest.raises(InputError, match="on worker is writing"):
            Claim(folder).__enter__()
        with pytest.raises(WorkerError, match="another job took this artifact over"):
            first.confirm()
        second.confirm()
    assert folder.sizes() == {}
    with pytest.raises(WorkerError, match="another job took this artifact over"):
        _work_while_another_takes_over(folder)
    folder.remove(claim.CLAIM_NAME)
    folder.create_bytes("manifest.json", b"first")
    with pytest.raises(FileExistsError):
        folder.create_bytes("manifest.json", b"second")


WRITE_UNTIL_STOPPED = """
import json, sys
from icce_ray.config import StorageConfig
from icce_ray.errors import WorkerError
from icce_ray.store import ArtifactWriter, Claim, Folder, claim
from icce_ray.store.s3 import use_s3
use_s3(StorageConfig(**json.loads(sys.argv[1])))
claim.RENEW_S = 60.0  # the writer finds out by itself
try:
    with Claim(Folder.at(sys.argv[2])) as held:
        while True:
            ArtifactWriter(held.folder).write_json("part.json", "of the first")
            print("written", flush=True)
            sys.stdin.readline()
except WorkerError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_job_that_was_frozen_while_another_took_over_writes_nothing_more(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, is_finished: bool
) -> None:
    use_s3(config_for(endpoint, "s3://results/x").storage)
    folder = Folder.at(f"s3://results/frozen-{is_finished}")
    monkeypatch.setattr(claim, "LEASE_S", 1.0)
    monkeypatch.setattr(claim, "POLL_S", 0.1)
    monkeypatch.setattr(claim, "_machine", lambda: "another machine")
    storage = json.dumps({"endpoint": endpoint, "access_key": ACCESS_KEY, "secret_key": SECRET_KEY})
    command = [sys.executable, "-c", WRITE_UNTIL_STOPPED, storage, folder.uri]
    options = {"stage": "s", "fingerprint": "f", "inputs": {}, "config": {}, "metrics": {}, "seconds": 0.0}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "written\n"
        os.kill(first.pid, signal.SIGSTOP)
        with Claim(folder) as held:
            writer = ArtifactWriter(held.folder)
            writer.write_json("part.json", "of the second")
            if is_finished:
                finished = writer.commit(**options, exclusive=True)
            os.kill(first.pid, signal.SIGCONT)
            said = first.communicate("write on\n", timeout=60)[1]
            if not is_finished:
                finished = writer.commit(**options, exclusive=True)
    assert first.returncode == 1
    assert said.startswith(f"{folder.uri}: another job took this artifact over")
    assert finished.read_json("part.json") == "of the second"
    assert set(folder.sizes()) == {"part.json", "manifest.json", finished.manifest.parts.name}


def _work_while_another_takes_over(folder: Folder) -> None:
    # Processes that run tests side by side ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Claim(folder):
            folder.write_bytes(claim.CLAIM_NAME, b"{}")
            time.sleep(60)
            pytest.fail("was not interrupted")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_all_kinds_of_sources_in_one_run(endpoint: str, tmp_path: Path) -> None:
    """A prefix, tar shards with labels beside the images, Parquet with image files, Parquet with URIs and a text list;
    one picture is everywhere, and is embedded once."""
    s3 = client(endpoint)
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as tar:
        for number in range(200, 210):
            for ending, data in (("png", png(number)), ("cls", b"7"), ("json", b"{}")):
                member = tarfile.TarInfo(f"a/{number}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    s3.put_object(Bucket="photos", Key="mixed/shards/0.tar", Body=shard.getvalue())
    table = pa.table({"image": [{"bytes": png(number), "path": None} for number in (*range(210, 215), 200)]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=4)
    s3.put_object(Bucket="photos", Key="mixed/table.parquet", Body=sink.getvalue().to_pybytes())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"uri": ["s3://photos/all/0/000.png", "more/215.png"]}), sink)
    s3.put_object(Bucket="photos", Key="mixed/list.parquet", Body=sink.getvalue().to_pybytes())
    s3.put_object(Bucket="photos", Key="mixed/more/215.png", Body=png(215))
    (tmp_path / "216.png").write_bytes(png(216))
    (tmp_path / "200.png").write_bytes(png(200))
    (tmp_path / "list.txt").write_text("216.png\n200.png\ns3://photos/all/0/000.png\n")
    uris = [f"s3://photos/mixed/{name}" for name in ("shards/", "table.parquet", "list.parquet")]
    config = config_for(endpoint, str(tmp_path / "out"), [*uris, str(tmp_path / "list.txt")])
    artifact = run_embed(config)

    images = Artifact.find(Folder.at(config.output) / "images" / artifact.manifest.inputs["images"])
    assert images is not None
    listed = Listing(images).table(0, 100)["uri"].to_pylist()
    assert len(listed) == 10 + 6 + 2 + 2
    assert sum(".tar#" in uri and uri.endswith(".png") for uri in listed) == 10
    features = load_features(artifact)
    numbers = [int(Path(uri).stem) for uri in listed if uri.endswith(".png")]
    assert sorted(numbers) == sorted([*range(200, 210), 0, 215, 216, 200])
    expected = {number: np.asarray(Image.open(io.BytesIO(png(number))).resize((8, 8), Image.Resampling.BILINEAR)) for number in range(217)}  # fmt: skip  # noqa: E501
    for row, uri in zip(features.matrix, listed, strict=True):
        if uri.endswith(".png"):
            np.testing.assert_allclose(row, expected[int(Path(uri).stem)].reshape(-1) / 255, atol=2e-3)
    assert artifact.metrics["num_embedded"] == 18
    duplicates = artifact.read_table("duplicates.parquet").to_pylist()
    copies = [number for number, row in enumerate(features.matrix) if np.array_equal(row, features.matrix[duplicates[0]["duplicate_of"]])]  # fmt: skip  # noqa: E501
    assert len(copies) == 3
    assert [row["image_id"] for row in duplicates] == copies[1:]
    assert {row["duplicate_of"] for row in duplicates} == {copies[0]}


@pytest.mark.slow
def test_a_refresh_embeds_what_is_new_and_keeps_the_ids_of_the_old(endpoint: str) -> None:
    s3 = client(endpoint)
    for number in range(300, 340):
        s3.put_object(Bucket="photos", Key=f"growing/{number}.png", Body=png(number))
    config = config_for(endpoint, "s3://results/growing", "s3://photos/growing/")
    before = run_embed(config)
    for number in (290, 341):
        s3.put_object(Bucket="photos", Key=f"growing/{number}.png", Body=png(number))
    s3.delete_object(Bucket="photos", Key="growing/301.png")
    s3.put_object(Bucket="photos", Key="growing/339.png", Body=png(999))
    assert run_embed(config).fingerprint == before.fingerprint  # a listing is a snapshot

    faults = Faults("/photos/growing/")
    with faulty_proxy(endpoint, faults) as url:
        config = config_for(url, "s3://results/growing", "s3://photos/growing/")
        pipeline.refresh_listing(config, True)
        after = run_embed(config)
        read = faults.seen["drawn"]
        pipeline.refresh_listing(config, True)
        again = run_embed(config)
    assert again.fingerprint == after.fingerprint != before.fingerprint
    assert after.metrics["num_embedded"] == 3  # 290, 341 and what is now 339
    # Only parts with a new, a changed or a removed image are read: the second of three is not.
    assert read == 15 + 10
    images = Artifact.find(Folder.at(config.output) / "images" / after.manifest.inputs["images"])
    assert images is not None
    names = [uri.rpartition("/")[2] for uri in Listing(images).table(0, 100)["uri"].to_pylist()]
    assert names == [f"{number}.png" for number in (*range(300, 340), 290, 341)]
    old, new = load_features(before), load_features(after)
    kept = [row for row in old.image_ids.tolist() if row not in (1, 39)]
    assert np.array_equal(new.matrix[np.searchsorted(new.image_ids, kept)], old.matrix[kept])
    errors = after.read_table("errors.parquet").to_pylist()
    assert [(row["image_id"], row["reason"]) for row in errors] == [(1, "removed")]
