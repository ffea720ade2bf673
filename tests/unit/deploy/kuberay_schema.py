"""The parts of KubeRay's custom resources and of pods that the manifests use, as a JSON schema.

Names and types of `ray.io/v1` follow the CRD reference of KubeRay 1.7.0 (Apache-2.0, github.com/ray-project/kuberay).
Fields that are not listed are refused, as the API server would refuse a misspelt one; add what a manifest needs.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|[MGTPE]|[KMGTPE]i)?$"}
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
YES_NO: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
ANYTHING: Schema = {"type": "object"}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}


def record(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def items(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


METADATA = record(("name",), name=NAME)
RESOURCES = record(
    limits={"type": "object", "additionalProperties": QUANTITY},
    requests={"type": "object", "additionalProperties": QUANTITY},
)
CONTAINER = record(
    ("name", "image", "resources", "securityContext"),
    name=NAME,
    image=TEXT,
    resources=RESOURCES,
    ports=items(record(("containerPort",), name=NAME, containerPort={"type": "integer", "maximum": 65535})),
    volumeMounts=items(record(("name", "mountPath"), name=NAME, mountPath=TEXT, readOnly=YES_NO)),
    securityContext=record(allowPrivilegeEscalation=YES_NO, capabilities=record(drop=items(TEXT))),
)
POD = record(
    ("containers",),
    serviceAccountName=NAME,
    automountServiceAccountToken=YES_NO,
    securityContext=record(
        runAsNonRoot=YES_NO,
        runAsUser=WHOLE,
        fsGroup=WHOLE,
        seccompProfile=record(("type",), type=one_of("RuntimeDefault", "Localhost", "Unconfined")),
    ),
    tolerations=items(
        record(
            key=TEXT,
            operator=one_of("Exists", "Equal"),
            effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
        )
    ),
    containers=items(CONTAINER) | {"minItems": 1},
    volumes=items(
        record(
            ("name",),
            name=NAME,
            emptyDir=record(sizeLimit=QUANTITY),
            configMap=record(("name",), name=NAME),
        )
    ),
)
TEMPLATE = record(("spec",), spec=POD)
HEAD_GROUP = record(("template",), template=TEMPLATE, resources=TEXTS, rayStartParams=TEXTS)
WORKER_GROUP = record(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    groupName=NAME,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    resources=TEXTS,
    rayStartParams=TEXTS,
    template=TEMPLATE,
)
AUTOSCALER = record(
    resources=RESOURCES,
    image=TEXT,
    securityContext=ANYTHING,
    idleTimeoutSeconds=COUNT,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    version=one_of("v1", "v2"),
    volumeMounts=items(ANYTHING),
)
CLUSTER = record(
    ("headGroupSpec",),
    authOptions=record(mode=one_of("disabled", "token")),
    autoscalerOptions=AUTOSCALER,
    enableInTreeAutoscaling=YES_NO,
    headGroupSpec=HEAD_GROUP,
    rayVersion=TEXT,
    workerGroupSpecs=items(WORKER_GROUP),
)
JOB = record(
    rayClusterSpec=CLUSTER,
    entrypoint=TEXT,
    ttlSecondsAfterFinished=COUNT,
    shutdownAfterJobFinishes=YES_NO,
)
RESOURCES_BY_KIND = {
    kind: record(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )
    for kind, spec in (("RayCluster", CLUSTER), ("RayJob", JOB))
}
