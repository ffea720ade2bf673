"""What of KubeRay's custom resources and of Kubernetes' pods the manifests use, as a JSON schema.

Names and types of `ray.io/v1` follow the CRD reference of KubeRay 1.7.0 (Apache-2.0, github.com/ray-project/kuberay):
RayCluster, RayJob, HeadGroupSpec, WorkerGroupSpec, AutoscalerOptions and AuthOptions are whole; pods have the fields
that are used here. What is not listed is refused, as the API server would refuse a misspelt field.
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


METADATA = record(("name",), name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)
RESOURCES = record(
    limits={"type": "object", "additionalProperties": QUANTITY},
    requests={"type": "object", "additionalProperties": QUANTITY},
)
CONTAINER = record(
    ("name", "image", "resources", "securityContext"),
    name=NAME,
    image=TEXT,
    resources=RESOURCES,
    env=items(record(("name",), name=TEXT, value=TEXT)),
    ports=items(record(("containerPort",), name=NAME, containerPort={"type": "integer", "maximum": 65535})),
    volumeMounts=items(record(("name", "mountPath"), name=NAME, mountPath=TEXT, readOnly=YES_NO)),
    securityContext=record(
        allowPrivilegeEscalation=YES_NO, capabilities=record(drop=items(TEXT), add=items(TEXT)), runAsNonRoot=YES_NO
    ),
)
POD = record(
    ("containers",),
    serviceAccountName=NAME,
    automountServiceAccountToken=YES_NO,
    nodeSelector=TEXTS,
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
            value=TEXT,
            effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
        )
    ),
    containers=items(CONTAINER) | {"minItems": 1},
    volumes=items(
        record(
            ("name",),
            name=NAME,
            emptyDir=record(sizeLimit=QUANTITY, medium=one_of("", "Memory")),
            configMap=record(("name",), name=NAME),
        )
    ),
)
TEMPLATE = record(("spec",), metadata=record(labels=TEXTS, annotations=TEXTS), spec=POD)
HEAD_GROUP = record(
    ("template",),
    template=TEMPLATE,
    headService=ANYTHING,
    enableIngress=YES_NO,
    ingressOptions=ANYTHING,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
)
WORKER_GROUP = record(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    suspend=YES_NO,
    groupName=NAME,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    template=TEMPLATE,
    scaleStrategy=record(workersToDelete=items(TEXT)),
    numOfHosts=COUNT,
)
AUTOSCALER = record(
    resources=RESOURCES,
    image=TEXT,
    imagePullPolicy=one_of("Always", "Never", "IfNotPresent"),
    securityContext=ANYTHING,
    idleTimeoutSeconds=COUNT,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    version=one_of("v1", "v2"),
    env=items(ANYTHING),
    envFrom=items(ANYTHING),
    volumeMounts=items(ANYTHING),
)
CLUSTER = record(
    ("headGroupSpec",),
    upgradeStrategy=record(type=one_of("Recreate", "None")),
    authOptions=record(mode=one_of("disabled", "token"), enableK8sTokenAuth=YES_NO, secretName=TEXT),
    suspend=YES_NO,
    managedBy=TEXT,
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=YES_NO,
    gcsFaultToleranceOptions=ANYTHING,
    historyServerOptions=ANYTHING,
    networkPolicy=ANYTHING,
    tlsOptions=ANYTHING,
    headGroupSpec=HEAD_GROUP,
    rayVersion=TEXT,
    workerGroupSpecs=items(WORKER_GROUP),
)
JOB = record(
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    rayClusterSpec=CLUSTER,
    submitterPodTemplate=TEMPLATE,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=record(backoffLimit=COUNT),
    managedBy=TEXT,
    deletionStrategy=ANYTHING,
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=TEXT,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    ttlSecondsAfterFinished=COUNT,
    preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=YES_NO,
    suspend=YES_NO,
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
