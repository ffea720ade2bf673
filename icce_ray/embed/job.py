"""The ``embed`` stage on Ray Data: read and decode in tasks, embed and write in actors, one row for each work item.

An actor writes its item and the item's record to storage itself and returns the record, so each item is there once and
whole, or not at all, whoever dies.
"""

import json
import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any, cast

import pyarrow as pa

from icce_ray import errors
from icce_ray.embed.content_index import ContentIndex, ShardedIndex, num_shards
from icce_ray.embed.decode_and_embed import NOTHING_DECODED, DecodedPart, Outcome, decoded_from_table, decoded_to_table
from icce_ray.embed.embedding_parts import PartRange
from icce_ray.embed.gather_embeddings import known_hashes
from icce_ray.embed.part_embedder import ITEMS_AT_ONCE, EmbedTask, PartEmbedder
from icce_ray.embed.work_items import OpenPart, OpenParts, join_items, joined
from icce_ray.images.decoding_process import decode_or_die
from icce_ray.images.listing import Listing
from icce_ray.images.uris import is_remote
from icce_ray.runtime.cluster_resources import PoolCpus, available_cpus, worker_threads
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.threads import repeating
from icce_ray.runtime.worker_process import EmbedMetrics
from icce_ray.store import Artifact, Folder, PartRecord
from icce_ray.store.s3 import use_s3

POST_INTERVAL_S = 2.0
"""How often workers say how far they are in a part."""
ITEMS_PER_WAVE = 32_768
"""Work items that Ray Data is given at a time. For each wave it starts the actors again."""
LIMITS_S = 10.0
"""Time after which the limit of what is decoded ahead is set again: machines come and go."""
OUR_ERRORS = errors.UserError, errors.WorkerError, errors.DamagedArtifactError
ITEMS_PER_ACTOR = ITEMS_AT_ONCE + 2
"""Decoded items for each actor: those that it works on, and those that wait."""


class Embedder:
    """The actor. It can be restarted from its arguments."""

    def __init__(self, task: EmbedTask, shards: list[Any], num_threads: int, device: str) -> None:
        use_s3(task.config.storage)
        self.task = task
        decode_all = partial(task.decode, listing=Listing(task.images))
        self.embedder = PartEmbedder(
            task, _sharded(shards), num_threads=num_threads, device=device, decode=decode_all, on_batch=self._post
        )
        self._index, self._posted_at, self._posted = shards[0], time.monotonic(), set[str]()
        self._metrics = EmbedMetrics()

    def __call__(self, batch: Any) -> Any:
        if problem := batch["problem"][0].as_py():
            return _to_row(error=problem)
        return _recorded(self._embed, *decoded_from_table(batch))

    def _embed(self, part: PartRange, decoded: DecodedPart) -> PartRecord:
        record = self.embedder.embed(part, decoded, self.task.attempt(part, "embed"))
        if part.name in self._posted:
            self._posted.remove(part.name)
            self._index.post_batch.remote(part.name, 0)
        busy_s = self.embedder.backbone.busy_s
        self._metrics.add(part.num_images, len(record.metrics["errors"]), decoded.num_bytes, busy_s)
        return record

    def _post(self, part: PartRange, num_embedded: int) -> None:
        """Tell the driver about a part that takes long. Nothing waits for that."""
        if time.monotonic() - self._posted_at >= POST_INTERVAL_S:
            self._posted_at = time.monotonic()
            self._posted.add(part.name)
            self._index.post_batch.remote(part.name, num_embedded)


class _IndexActor(ContentIndex):
    """The content index, which also passes on how far the workers are in their parts."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._batches: dict[str, int] = {}

    def post_batch(self, part: str, num_embedded: int) -> None:
        self._batches[part] = num_embedded

    def num_unfinished(self) -> int:
        """Number of images of unfinished parts that are embedded."""
        self._batches = {part: number for part, number in self._batches.items() if number}
        return sum(self._batches.values())


def _sharded(shards: Sequence[Any]) -> ShardedIndex:
    """The index whose shards live in these actors. Embeddings travel between workers through Ray's object store."""
    import ray

    def call(method: str, arguments: dict[int, tuple[Any, ...]]) -> dict[int, Any]:
        answers = [getattr(shards[shard], method).remote(*values) for shard, values in arguments.items()]
        return dict(zip(arguments, ray.get(answers), strict=True))

    def get(published: list[Any]) -> dict[str, Outcome]:
        try:
            return cast(dict[str, Outcome], ray.get(published[0]))
        except ray.exceptions.ObjectLostError as error:
            raise LookupError(str(error)) from None

    # In a list: an argument that is itself a reference would be fetched by the index.
    return ShardedIndex(len(shards), call, put=lambda outcomes: [ray.put(outcomes)], get=get)


def decode(batch: Any, task: EmbedTask, shards: list[Any]) -> Any:
    """The task: one row that names a part -> one row that holds the pixels of its new contents."""
    use_s3(task.config.storage)
    part = PartRange.from_json(batch["part"][0].as_py())
    attempt = task.attempt(part, "decode").begin()
    try:
        known = partial(known_hashes, _sharded(shards))
        decoded = task.decode(part, _listing(task.images), known=known, attempt=attempt, decode=decode_or_die)
    except OUR_ERRORS as error:
        return decoded_to_table(part, NOTHING_DECODED, _to_text(error))
    attempt.end()
    return decoded_to_table(part, decoded)


_listings: dict[tuple[str, str], Listing] = {}


def _listing(images: Artifact) -> Listing:
    """One per process: it keeps the part it read last."""
    key = (images.folder.uri, images.identity)
    if key not in _listings:
        _listings.clear()
        _listings[key] = Listing(images)
    return _listings[key]


def embed_on_ray(
    task: EmbedTask, pending: OpenParts, show: Callable[[int], None], progress: Progress
) -> Generator[PartRecord, None, None]:
    """Embed the `pending` parts; yields each as it is finished, in any order. Ray Data keeps figures of every item in
    the driver, so it gets some thousands at a time. `show` is told how many images of unfinished parts are embedded."""
    import ray.data

    resources, worker = task.config.resources.embed, task.config.resources.embed.at_start()
    num_workers = min(resources.num_workers, max(1, len(pending)))
    min_workers = min(worker.num_workers, num_workers)
    # While one task waits for the last slow answers of its part, another can use the CPU.
    cpus = PoolCpus.of(worker, min_workers, tasks_per_cpu=2 if any(map(is_remote, task.config.images.uris)) else 1)
    part_bytes = pending.images_per_item * math.prod(task.plan.preprocessing.shape)
    data_context = ray.data.DataContext.get_current().copy()
    data_context.enable_progress_bars = False
    data_context.execution_no_progress_timeout_s = 1800.0
    shards = _start_index(task.folders, pending.num_images)
    join_task: Any = ray.remote(_join).options(num_cpus=0, scheduling_strategy="SPREAD")  # type: ignore[attr-defined]

    def join(whole: OpenPart, items: list[PartRecord]) -> PartRecord:
        return _from_row(ray.get(join_task.remote(task, shards, whole, items)).to_pylist()[0])

    def tell() -> None:
        with suppress(ray.exceptions.RayError):  # the index is starting again, or busy
            show(ray.get(shards[0].num_unfinished.remote(), timeout=POST_INTERVAL_S))

    def limits() -> Any:
        """If decoding is the faster step, it would fill Ray's object store, the more the more images there are."""
        ahead = math.ceil(available_cpus() / cpus.task) + ITEMS_PER_ACTOR * num_workers
        return ray.data.ExecutionResources.for_limits(object_store_memory=ahead * part_bytes)

    def finished_items() -> Iterator[PartRecord]:
        left = iter(pending)
        while wave := list(islice(left, ITEMS_PER_WAVE)):
            dataset = _embedded(wave, task, shards, (min_workers, num_workers), cpus)
            rows, options, limited_at = dataset.iter_rows(), dataset.context.execution_options, time.monotonic()
            del dataset  # it would keep its figures during the next wave
            options.resource_limits = limits()
            for row in rows:
                if time.monotonic() - limited_at >= LIMITS_S:
                    options.resource_limits, limited_at = limits(), time.monotonic()
                yield _from_row(row)

    try:
        _wait_for_index(shards, progress)
        telling = repeating(tell, POST_INTERVAL_S, "icce_ray-embed-progress")
        with ray.data.DataContext.current(data_context), warnings.catch_warnings(), telling:
            warnings.simplefilter("ignore")  # Ray Data warns of max_retries, which it has no parameter for yet
            yield from joined(finished_items(), pending, join)
    except OUR_ERRORS:
        raise
    except (ray.exceptions.RayError, RuntimeError, OSError, ValueError) as error:
        raise errors.WorkerError(
            f"embed: workers failed for good; finished parts are kept, and the same command continues from there. "
            f"{errors.describe_cause(error)}"
        ) from error
    finally:
        for shard in shards:
            ray.kill(shard)


def _embedded(
    items: list[PartRange], task: EmbedTask, shards: list[Any], num_workers: tuple[int, int], cpus: PoolCpus
) -> Any:
    """A dataset with the record of each item. `num_workers` are the fewest and the most."""
    import ray.data

    worker = task.config.resources.embed.at_start()
    dataset = (
        _one_block_per_item(items, cpus.free)
        .map_batches(
            cast(Any, decode),
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"task": task, "shards": shards},
            num_cpus=cpus.task,
            max_retries=-1,  # `Attempt` decides when to give up
        )
        .map_batches(
            Embedder,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=num_workers[0],
                max_size=num_workers[1],
                max_concurrent_calls_per_actor=ITEMS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            fn_constructor_args=(task, shards, worker_threads(worker), "cuda" if worker.gpus_per_worker else "cpu"),
            num_cpus=cpus.actor,
            num_gpus=worker.gpus_per_worker or None,
        )
    )
    dataset.set_name("embed")
    return dataset


def _start_index(folders: list[Folder], num_new: int) -> list[Any]:
    """The actors of the shards of the content index. They can be restarted: their answers lie on storage."""
    import ray

    number, options = num_shards(folders, num_new), {"max_restarts": -1, "max_task_retries": -1}
    actor: Any = ray.remote(_IndexActor).options(num_cpus=0, scheduling_strategy="SPREAD", **options)
    return [actor.remote(folders, num_new, shard, number) for shard in range(number)]


def _wait_for_index(shards: Sequence[Any], progress: Progress) -> None:
    """Until it has read the hashes of the finished parts, which may take longer than Ray Data lets a step take."""
    import ray

    ready = [shard.num_unfinished.remote() for shard in shards]
    if ray.wait(ready, num_returns=len(ready), timeout=5.0)[1]:
        progress.waits("the content index reads the hashes of finished parts")
    ray.get(ready)
    progress.waits("")


def _join(task: EmbedTask, shards: list[Any], whole: OpenPart, items: list[PartRecord]) -> pa.Table:
    """The task: finished items -> the record of their part."""
    use_s3(task.config.storage)
    return _recorded(join_items, task.records, task.draw, _sharded(shards), whole, items)


def _one_block_per_item(items: list[PartRange], free_cpus: float) -> Any:
    """A dataset with a block for each work item. `free_cpus` CPUs must be enough to make it."""
    import ray.data

    rows = [{"part": item.to_json()} for item in items]  # a task would first look at an Arrow table
    if free_cpus < 1:
        # Ray's repartition needs a whole CPU, which a machine with one CPU doesn't have beside an actor.
        return ray.data.from_items(rows, override_num_blocks=len(rows))
    # Saves milliseconds and kilobytes for each part, of which there may be a million.
    return ray.data.from_items(rows, override_num_blocks=1).repartition(target_num_rows_per_block=1)


def _to_text(error: Exception) -> str:
    """For a row: raised in a worker, an error would come back inside Ray's own traceback."""
    return json.dumps([type(error).__name__, str(error)])


def _recorded(make: Callable[..., PartRecord], *arguments: Any) -> pa.Table:
    """A row with the record that `make` returns, or its error."""
    try:
        return _to_row(make(*arguments).model_dump_json())
    except OUR_ERRORS as error:
        return _to_row(error=_to_text(error))


def _to_row(record: str = "", error: str = "") -> pa.Table:
    return pa.table({"record": [record], "error": [error]})


def _from_row(row: dict[str, Any]) -> PartRecord:
    if row["error"]:
        kind, message = json.loads(row["error"])
        raise getattr(errors, kind)(message)
    return PartRecord.model_validate_json(row["record"])
