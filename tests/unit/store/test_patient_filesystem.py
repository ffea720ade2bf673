"""Remote file systems that fail: a fake one below a folder, which the URIs gs://photos/... and abfs://... open."""

from __future__ import annotations

import io
import pickle
import queue
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from icce_ray.config import ImagesConfig, StorageConfig
from icce_ray.errors import InputError, WorkerError
from icce_ray.images import read_images
from icce_ray.images.containers import members
from icce_ray.images.file_shards import File
from icce_ray.images.listing import ListedImage
from icce_ray.runtime import progress as progress_module
from icce_ray.runtime.progress import Progress
from icce_ray.store import ArtifactWriter, Folder, filesystem, patient_filesystem, s3
from icce_ray.store.artifact import Artifact

Fault = Callable[[str, str], None]


class FakeStore:
    """A pyarrow file system over a local folder. `fault` gets the name of each call and its path, and may raise."""

    type_name = "fake"

    def __init__(self, root: Path) -> None:
        self.files = pafs.SubTreeFileSystem(str(root), pafs.LocalFileSystem())
        self.fault: Fault = lambda call, path: None
        self.calls: list[tuple[str, str]] = []
        self.short_reads = 0
        """Number of the next reads that break off before their last byte."""

    def equals(self, other: object) -> bool:
        return self is other

    def __getattr__(self, name: str) -> Any:
        def call(where: Any, *rest: Any, **settings: Any) -> Any:
            path = (
                where.base_dir
                if isinstance(where, pafs.FileSelector)
                else "".join([*where][:1] if isinstance(where, list) else where)
            )
            self.calls.append((name, path))
            self.fault(name, path)
            if name == "open_output_stream":
                self.files.create_dir(path.rpartition("/")[0])
            if name == "open_input_file":
                return _FakeFile(self, path)
            return getattr(self.files, name)(where, *rest, **settings)

        return call


class _FakeFile:
    def __init__(self, store: FakeStore, path: str) -> None:
        self._store, self._path = store, path
        self._file = store.files.open_input_file(path)

    def size(self) -> int:
        return int(self._file.size())

    def read_at(self, num_bytes: int, start: int) -> bytes:
        self._store.fault("read_at", self._path)
        self._store.short_reads -= 1
        return bytes(self._file.read_at(num_bytes - (self._store.short_reads >= 0), start))


class Hangs:
    """Calls that hang. The time limit of such a call is over as soon as it hangs; the others have all the time they
    need, however busy the machine is."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self._go_on = threading.Event()
        self._threads: list[threading.Thread] = []

    def within(self, seconds: float | None, call: Callable[[], Any]) -> Any:
        said: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()

        def run() -> None:
            self._of_thread.said = said
            outcome: Future[Any] = Future()
            try:
                outcome.set_result(call())
            except BaseException as error:
                outcome.set_exception(error)
            said.put(outcome)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return said.get(timeout=60).result()

    def __call__(self, call: str, path: str) -> None:
        over: Future[Any] = Future()
        over.set_exception(s3.AwayError("no answer in 20 s"))
        self._of_thread.said.put(over)
        assert self._go_on.wait(60)

    def go_on(self) -> None:
        """Let the calls go on, and wait until they have returned."""
        self._go_on.set()
        for thread in self._threads:
            thread.join(60)


@pytest.fixture
def hangs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hangs]:
    made = Hangs()
    monkeypatch.setattr(patient_filesystem, "within", made.within)
    yield made
    made.go_on()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStore]:
    (tmp_path / "photos").mkdir()
    fake = FakeStore(tmp_path)
    monkeypatch.setattr(filesystem, "_from_uri", lambda uri: (fake, "photos/"))
    for module, limit in ((s3, "READ_TIMEOUT_S"), (s3, "CONNECT_TIMEOUT_S"), (patient_filesystem, "CHECK_S")):
        monkeypatch.setattr(module, limit, 60.0)
    monkeypatch.setattr(s3, "OUTAGE_POLL_S", 0.001)
    monkeypatch.setattr(patient_filesystem, "MIN_TRYING_S", 0.0)
    filesystem._remote.cache_clear()
    yield fake
    filesystem._remote.cache_clear()


def test_a_call_that_takes_too_long_is_left_alone_and_any_other_returns_what_it_returns() -> None:
    go_on = threading.Event()
    with pytest.raises(s3.AwayError, match="no answer in 0 s"):
        patient_filesystem.within(0.01, lambda: go_on.wait(60))
    go_on.set()
    assert patient_filesystem.within(60.0, lambda: "answer") == "answer"
    for error in (TimeoutError("of the call"), KeyError("of the call")):
        with pytest.raises(type(error), match="of the call"):
            patient_filesystem.within(60.0, partial(_raise, error))


def _raise(error: Exception) -> None:
    raise error


def away(call: str, path: str) -> None:
    raise OSError("google::cloud::Status(UNAVAILABLE: could not connect)")


class Outage:
    """Away for a number of calls."""

    def __init__(self, num_calls: int) -> None:
        self.left = num_calls

    def __call__(self, call: str, path: str) -> None:
        self.left -= 1
        if self.left >= 0:
            away(call, path)


def only(bad: str, fault: Fault) -> Fault:
    return lambda call, path: fault(call, path) if path.endswith(bad) else None


def refuse(call: str, path: str) -> None:
    raise OSError("google::cloud::Status(PERMISSION_DENIED: no storage.objects.get)")


def put(tmp_path: Path, *names: str) -> list[ListedImage]:
    for name in names:
        (tmp_path / "photos" / name).write_bytes(name.encode() * 100)
    return [
        ListedImage(number, f"gs://photos/{name}", 100 * len(name.encode()), None) for number, name in enumerate(names)
    ]


def read(rows: list[ListedImage]) -> list[bytes | str]:
    return [data for _, data in sorted(read_images.read_images(rows))]


def test_images_are_waited_for_while_their_store_is_away(store: FakeStore, tmp_path: Path) -> None:
    rows = put(tmp_path, "a.png", "b.png", "c.png")
    store.fault = Outage(30)
    assert read(rows) == [row.uri.rpartition("/")[2].encode() * 100 for row in rows]
    assert len(store.calls) > 30


def test_an_outage_of_hours_ends_the_job_with_one_line(
    store: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = put(tmp_path, "a.png")
    store.fault = away
    monkeypatch.setattr(s3, "OUTAGE_S", 0.05)
    with pytest.raises(WorkerError, match=r"the storage has been away for .* when gs://photos can be reached"):
        read(rows)
    with pytest.raises(WorkerError, match="gs://photos"):
        Folder.at("gs://photos/out").write_bytes("a.json", b"1")


@pytest.mark.parametrize("kind", ["errors", "no bytes"])
def test_a_bad_object_costs_itself(store: FakeStore, tmp_path: Path, hangs: Hangs, kind: str) -> None:
    rows = put(tmp_path, "a.png", "bad.png", "c.png")
    store.fault = only("bad.png", away if kind == "errors" else hangs)
    first, bad, last = read(rows)
    assert (first, last) == (b"a.png" * 100, b"c.png" * 100)
    assert str(bad).startswith("unreadable: BadObjectError: photos/bad.png")


def test_a_forbidden_object_is_a_row_and_a_forbidden_store_one_message(store: FakeStore, tmp_path: Path) -> None:
    rows = put(tmp_path, "a.png", "b.png")
    store.fault = only("b.png", refuse)
    first, second = read(rows)
    assert first == b"a.png" * 100
    assert "access to gs://photos was refused" in str(second)
    store.fault = refuse
    with pytest.raises(InputError, match="access to gs://photos was refused; check the credentials"):
        read(rows)


def test_a_missing_object_is_not_asked_for_again(store: FakeStore, tmp_path: Path) -> None:
    assert read([ListedImage(0, "gs://photos/none.png", 5, None)]) == ["missing"]
    assert len(store.calls) == 1


def test_the_names_of_objects_are_taken_as_they_are(store: FakeStore, tmp_path: Path) -> None:
    rows = put(tmp_path, "50% off #1.png", "what?.png", "a b.png", "%41.png", "ä\n.png")
    assert all(isinstance(data, bytes) for data in read(rows))


def shard_of(names: list[str]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 10
            tar.addfile(member, io.BytesIO(b"0123456789"))
    return sink.getvalue()


@pytest.mark.parametrize("name", ["s.tar", "t.parquet"])
def test_containers_are_waited_for_and_a_bad_one_is_a_row(store: FakeStore, tmp_path: Path, name: str) -> None:
    table = pa.table({"image": pa.array([b"1", b"2"], pa.binary())})
    pq.write_table(table, tmp_path / "photos/t.parquet")
    (tmp_path / "photos/s.tar").write_bytes(shard_of(["a.png", "b.png"]))
    file = File(f"gs://photos/{name}", 1, None, is_container=True)
    store.fault = Outage(20)
    store.short_reads = 3
    found = list(members(file, ImagesConfig(uri="gs://photos"), Counter()))
    assert [entry.problem for entry in found] == [None, None]
    assert store.short_reads < 0
    store.fault = only(name, away)
    (entry,) = members(file, ImagesConfig(uri="gs://photos"), Counter())
    assert "damaged" in str(entry.problem)
    assert "UNAVAILABLE" in str(entry.problem)


def test_files_are_written_whole_in_spite_of_an_outage_and_of_attempts_that_hang(
    store: FakeStore, tmp_path: Path, hangs: Hangs
) -> None:
    folder = Folder.at("gs://photos/out")
    faults = iter([hangs, away, away])

    def fault(call: str, path: str) -> None:
        if call == "open_output_stream" and (next_fault := next(faults, None)):
            next_fault(call, path)

    store.fault = fault
    data = bytes(range(256)) * 4096
    folder.write_bytes("a.bin", data)
    assert next(faults, None) is None
    assert folder.read_bytes("a.bin") == data
    (tmp_path / "photos/out/a.bin").write_bytes(b"of another attempt")
    hangs.go_on()  # the first attempt writes the file after all
    assert folder.read_bytes("a.bin") == data
    assert folder.sizes() == {"a.bin": len(data)}
    folder.remove("a.bin")
    assert not folder.exists("a.bin")
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("a.bin")


def test_an_artifact_is_committed_through_an_outage(store: FakeStore, tmp_path: Path) -> None:
    folder = Folder.at("gs://photos/out/stage/0123456789abcdef")
    writer = ArtifactWriter(folder)
    store.fault = Outage(9)
    writer.write_table("t.parquet", pa.table({"a": list(range(1000))}))
    store.fault = Outage(9)
    writer.commit(stage="s", fingerprint="f", inputs={}, config={}, metrics={}, seconds=0.0, exclusive=True)
    store.fault = Outage(9)
    found = Artifact.find(folder)
    assert found is not None
    assert found.read_table("t.parquet")["a"].to_pylist() == list(range(1000))


def test_a_command_finds_out_within_seconds_that_a_store_does_not_answer(store: FakeStore, hangs: Hangs) -> None:
    for fault, words in (
        (away, "gs://photos cannot be reached: .*UNAVAILABLE"),
        (hangs, "no answer"),
        (refuse, "refused"),
    ):
        store.fault = fault
        with pytest.raises(InputError, match=words):
            Folder.reachable("gs://photos/out")


def test_the_progress_line_tells_of_the_wait(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    said, told = [], threading.Event()
    progress = Progress("embed", quiet=True)

    def waits(text: str) -> None:
        if text:
            said.append(text)
            told.set()

    monkeypatch.setattr(progress, "waits", waits)
    monkeypatch.setattr(progress_module, "POLL_S", 0.001)
    store.fault = away
    with progress_module.outages_told(["gs://photos/a"], StorageConfig(), progress):
        assert told.wait(60)
    assert "waits for gs://photos, which has not answered" in said[0]


def test_a_patient_file_system_can_be_sent_to_workers() -> None:
    files = patient_filesystem.PatientFileSystem(pafs.LocalFileSystem(), "gs://photos", "photos")
    again = pickle.loads(pickle.dumps(pafs.PyFileSystem(files)))
    assert again.equals(pafs.PyFileSystem(files))
    assert again.handler.store == "gs://photos"


def test_googles_own_waits_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(filesystem, "_from_uri", lambda uri: (opened.append(uri), (pafs.LocalFileSystem(), "b"))[1])
    filesystem._remote.cache_clear()
    assert filesystem.open_uri("gs://b/a/c?d.png")[1] == "b/a/c?d.png"
    assert filesystem.open_uri("gs://b/a?endpoint_override=127.0.0.1:9")[1] == "b/a"
    assert opened == [
        "gs://b/?retry_limit_seconds=4",
        "gs://b/?endpoint_override=127.0.0.1:9&retry_limit_seconds=4",
    ]
    filesystem._remote.cache_clear()
