"""``kuberay.yaml`` without Kubernetes: every field is one that KubeRay or Kubernetes knows.

The lists below are the fields of KubeRay 1.5 (RayJob, RayCluster) and of Kubernetes' own kinds that a study may need;
a field that is misspelt, in the wrong place or of a newer version fails with its path.
"""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

Any_ = object()  # whatever is below is free, or a plain value
META = {"name": Any_, "namespace": Any_, "labels": Any_, "annotations": Any_}
RESOURCES = {"requests": Any_, "limits": Any_}
ENV = [
    {
        "name": Any_,
        "value": Any_,
        "valueFrom": {
            "secretKeyRef": {"name": Any_, "key": Any_, "optional": Any_},
            "fieldRef": {"fieldPath": Any_},
        },
    }
]
PROBE = {
    "httpGet": {"path": Any_, "port": Any_},
    "tcpSocket": {"port": Any_},
    "exec": {"command": Any_},
    **dict.fromkeys(("initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold"), Any_),
}
CONTAINER = {
    **dict.fromkeys(("name", "image", "imagePullPolicy", "command", "args", "workingDir"), Any_),
    "env": ENV,
    "ports": [dict.fromkeys(("name", "containerPort", "protocol"), Any_)],
    "resources": RESOURCES,
    "volumeMounts": [dict.fromkeys(("name", "mountPath", "subPath", "readOnly"), Any_)],
    "readinessProbe": PROBE,
    "livenessProbe": PROBE,
    "securityContext": Any_,
}
POD = {
    "metadata": META,
    "spec": {
        "containers": [CONTAINER],
        "initContainers": [CONTAINER],
        "volumes": [
            {
                "name": Any_,
                "persistentVolumeClaim": {"claimName": Any_, "readOnly": Any_},
                "emptyDir": {"medium": Any_, "sizeLimit": Any_},
                "secret": {"secretName": Any_, "defaultMode": Any_},
                "configMap": {"name": Any_},
            }
        ],
        "tolerations": [dict.fromkeys(("key", "operator", "value", "effect", "tolerationSeconds"), Any_)],
        **dict.fromkeys(
            ("nodeSelector", "affinity", "restartPolicy", "serviceAccountName", "securityContext"), Any_
        ),
        **dict.fromkeys(
            (
                "automountServiceAccountToken",
                "terminationGracePeriodSeconds",
                "priorityClassName",
                "imagePullSecrets",
            ),
            Any_,
        ),
    },
}
RAY_CLUSTER = {
    **dict.fromkeys(
        ("rayVersion", "enableInTreeAutoscaling", "suspend", "headServiceAnnotations", "managedBy"), Any_
    ),
    "authOptions": {"mode": Any_, "secretName": Any_},
    "autoscalerOptions": {
        **dict.fromkeys(("version", "upscalingMode", "idleTimeoutSeconds", "image", "imagePullPolicy"), Any_),
        "env": ENV,
        "resources": RESOURCES,
        "securityContext": Any_,
        "volumeMounts": Any_,
    },
    "gcsFaultToleranceOptions": {
        **dict.fromkeys(("redisAddress", "externalStorageNamespace"), Any_),
        "redisUsername": {"value": Any_, "valueFrom": Any_},
        "redisPassword": {"value": Any_, "valueFrom": Any_},
    },
    "headGroupSpec": {
        **dict.fromkeys(
            ("serviceType", "enableIngress", "rayStartParams", "headService", "labels", "resources"), Any_
        ),
        "template": POD,
    },
    "workerGroupSpecs": [
        {
            **dict.fromkeys(
                ("groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "suspend"), Any_
            ),
            **dict.fromkeys(("rayStartParams", "idleTimeoutSeconds", "labels", "resources"), Any_),
            "scaleStrategy": {"workersToDelete": Any_},
            "template": POD,
        }
    ],
}
POLICY_PEER = {
    "podSelector": {"matchLabels": Any_},
    "namespaceSelector": {"matchLabels": Any_},
    "ipBlock": {"cidr": Any_, "except": Any_},
}
KINDS: dict[str, Any] = {
    "ray.io/v1 RayJob": {
        **dict.fromkeys(
            ("entrypoint", "runtimeEnvYAML", "submissionMode", "backoffLimit", "jobId", "suspend"), Any_
        ),
        **dict.fromkeys(
            ("activeDeadlineSeconds", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"), Any_
        ),
        **dict.fromkeys(("entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "metadata"), Any_),
        **dict.fromkeys(
            ("clusterSelector", "managedBy", "deletionStrategy", "preRunningDeadlineSeconds"), Any_
        ),
        "submitterConfig": {"backoffLimit": Any_},
        "submitterPodTemplate": POD,
        "rayClusterSpec": RAY_CLUSTER,
    },
    "v1 PersistentVolumeClaim": {
        **dict.fromkeys(("accessModes", "storageClassName", "volumeName", "volumeMode"), Any_),
        "resources": RESOURCES,
    },
    "v1 Service": {
        **dict.fromkeys(("type", "selector", "clusterIP"), Any_),
        "ports": [dict.fromkeys(("name", "port", "targetPort", "protocol"), Any_)],
    },
    "apps/v1 Deployment": {
        **dict.fromkeys(("replicas", "strategy", "revisionHistoryLimit"), Any_),
        "selector": {"matchLabels": Any_},
        "template": POD,
    },
    "networking.k8s.io/v1 NetworkPolicy": {
        "podSelector": {"matchLabels": Any_},
        "policyTypes": Any_,
        "ingress": [{"from": [POLICY_PEER], "ports": [dict.fromkeys(("protocol", "port", "endPort"), Any_)]}],
    },
}


def unknown_fields(value: Any, known: Any, where: str) -> list[str]:
    """Paths that ``known`` lacks; a list where there should be none, or the other way round, counts."""
    if known is Any_:
        return []
    if isinstance(known, list):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [p for item in value for p in unknown_fields(item, known[0], f"{where}[]")]
    if not isinstance(value, dict):
        return [f"{where} is no mapping"]
    found = []
    for key, below in value.items():
        found += unknown_fields(below, known[key], f"{where}.{key}") if key in known else [f"{where}.{key}"]
    return found


def problems(document: dict[str, Any]) -> list[str]:
    kind = f"{document['apiVersion']} {document['kind']}"
    if kind not in KINDS:
        return [f"unknown kind {kind}"]
    known = {"apiVersion": Any_, "kind": Any_, "metadata": META, "spec": KINDS[kind]}
    return unknown_fields(document, known, document["kind"])


@pytest.fixture
def documents(root: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((root / "cluster" / "kuberay.yaml").read_text()))


@pytest.fixture
def job(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return next(d["spec"] for d in documents if d["kind"] == "RayJob")


def test_every_field_is_known(documents: list[dict[str, Any]]) -> None:
    assert [p for document in documents for p in problems(document)] == []


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("spec",), "backofLimit"),
        (("spec", "rayClusterSpec"), "rayversion"),
        (("spec", "rayClusterSpec", "autoscalerOptions"), "idleTimeout"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec"), "container"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0), "maxReplica"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0), "resource"),
    ],
)
def test_a_wrong_field_is_named(path: tuple[Any, ...], wrong: str, documents: list[dict[str, Any]]) -> None:
    document = copy.deepcopy(next(d for d in documents if d["kind"] == "RayJob"))
    place: Any = document
    for step in path:
        place = place[step]
    place[wrong] = {}
    assert [p.rsplit(".", 1)[1] for p in problems(document)] == [wrong]


def test_it_runs_the_locked_ray_in_this_project_s_image(job: dict[str, Any], root: Path) -> None:
    pinned = re.search(r"^ray==(\S+)", (root / "requirements.lock").read_text(), re.M)
    assert pinned
    assert job["rayClusterSpec"]["rayVersion"] == pinned[1]
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    images = re.findall(r"^\s+image: (\S+)", (root / "cluster" / "kuberay.yaml").read_text(), re.M)
    assert set(images) == {f"retain-study:{version}"}


def test_workers_start_at_zero_and_the_head_runs_no_trial(job: dict[str, Any]) -> None:
    cluster = job["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
        assert "nvidia.com/gpu" in group["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_the_token_comes_from_the_secret_that_the_first_command_makes(
    job: dict[str, Any], root: Path
) -> None:
    text = (root / "cluster" / "kuberay.yaml").read_text()
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "retain-study"}
    made = set(re.findall(r"--from-literal=(\w+)=", text))
    used = set(re.findall(r"secretKeyRef: \{name: retain-study, key: (\w+)\}", text)) | {"auth_token"}
    assert made == used


def test_names_refer_to_what_is_there(documents: list[dict[str, Any]]) -> None:
    names = {(d["kind"], d["metadata"]["name"]) for d in documents}
    text = yaml.safe_dump(documents)
    for claim in re.findall(r"claimName: (\S+)", text):
        assert ("PersistentVolumeClaim", claim) in names
    for document in documents:
        if document["kind"] in ("Service", "NetworkPolicy"):
            spec = document["spec"]
            chosen = spec.get("selector") or spec["podSelector"]["matchLabels"]
            assert f"app: {chosen['app']}" in text
    service = next(d for d in documents if d["kind"] == "Service")
    assert f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}" in text
    for pod in re.findall(r"volumeMounts|volumes", text):
        assert pod
