"""Settings of storage and of the machines. They never change a result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import SecretStr, model_validator

from icce_ray.config.section import NonNegativeFloat, Place, PositiveFloat, PositiveInt, Section

SECRETS = ("access_key", "secret_key", "session_token")


class StorageConfig(Section):
    """Access to S3. Settings left open come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    AWS_SESSION_TOKEN, AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL) or the machine's role."""

    endpoint: Place | None = None
    """URL of an S3-compatible store. Not set: AWS_ENDPOINT_URL, else AWS itself."""
    region: str | None = None
    """Region of the buckets."""
    access_key: SecretStr | None = None
    """Access key id. Prefer the environment or a profile."""
    secret_key: SecretStr | None = None
    """Secret access key. Never written to manifests, logs or messages."""
    session_token: SecretStr | None = None
    """Session token of temporary credentials."""
    anonymous: bool = False
    """Send no credentials, for public buckets."""

    @model_validator(mode="after")
    def _check(self) -> StorageConfig:
        if (self.access_key is None) != (self.secret_key is None):
            raise ValueError("access_key and secret_key belong together: give both or neither")
        return self


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by section, as a config file may hold them: secrets come from the environment."""
    storage = {key: value for key, value in settings.get("storage", {}).items() if key not in SECRETS}
    kept = {section: value for section, value in settings.items() if section != "storage"}
    return kept | ({"storage": storage} if storage else {})


class WorkerResources(Section):
    num_workers: PositiveInt = 1
    """Number of processes that share the work of the stage."""
    cpus_per_worker: PositiveFloat | None = None
    """CPUs, and threads, per worker. Not set: a machine's CPUs divided among its workers."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """GPUs per worker."""

    def at_start(self) -> WorkerResources:
        """The workers that the stage starts with."""
        return self


class EmbedResources(WorkerResources):
    min_workers: PositiveInt | None = None
    """Number of workers to start with: others are added while there is work and room for them, up to num_workers, and
    workers without work end. Not set: num_workers."""

    def at_start(self) -> WorkerResources:
        return self.model_copy(update={"num_workers": self.min_workers or self.num_workers})

    @model_validator(mode="after")
    def _check(self) -> EmbedResources:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers ({self.min_workers}) is above num_workers ({self.num_workers}): lower it")
        return self


class ResourcesConfig(Section):
    ray_address: str | None = None
    """Address of a Ray cluster to join, or `auto`. Not set: RAY_ADDRESS, else a Ray of our own on this machine."""
    num_cpus: PositiveInt | None = None
    """CPUs of a Ray that we start. Not set: all that this process may use."""
    object_store_bytes: PositiveInt | None = None
    """Size of the object store of a Ray that we start. Not set: Ray's default, at most 2 GB."""
    embed: EmbedResources = EmbedResources()
    neighbors: WorkerResources = WorkerResources()
    """Each worker is a shard, which holds its share of the features in memory, or on its GPU."""
    method: WorkerResources = WorkerResources()
    classifier: WorkerResources = WorkerResources()
    """The workers share the learning rates to try, so no more than that are started."""
    assign: WorkerResources = WorkerResources()
    """CPUs only: reading the embeddings takes longer than labelling them."""

    @model_validator(mode="after")
    def _check_assign(self) -> ResourcesConfig:
        if self.assign.gpus_per_worker:
            raise ValueError(
                f"assign.gpus_per_worker is {self.assign.gpus_per_worker:g}; images are labelled on CPUs: leave it out"
            )
        return self
