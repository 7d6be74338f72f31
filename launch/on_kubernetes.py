"""Write a manifest for KubeRay, which creates a Ray cluster for the run and removes it afterwards.

One RayJob runs all selected stages. The job file, configs included, is stored in a Secret, since
configs may hold the tracker's password. KubeRay creates the cluster's token itself (authOptions),
so the manifest contains none.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import yaml

from launch import frozen
from launch.frozen import Stages
from launch.progress import ProgressView
from launch.spec import USER_ERROR, LaunchSpec, write_private

HEADER = """\
# Rendered by `python -m wm_train.launch launcher=kubernetes`.
# Submit it with: kubectl create -f <this file>
# Needs KubeRay 1.5.1 or newer (authOptions). Checked against the field names and types of KubeRay's
# RayJob and of Kubernetes' pods; it has not been run on a Kubernetes cluster.
"""
JOB = "/etc/wm_train"


def run(spec: LaunchSpec, view: ProgressView) -> int:
    """Run one stage of one group of workers, see run_stages."""
    return run_stages([{"": spec}], view)


def run_stages(stages: Stages, view: ProgressView) -> int:
    """Write the manifest, and give it to kubectl if asked to.

    Returns 0, or 2 when kubectl is missing or refuses.
    """
    first = next(iter(stages[0].values()))
    assert first.pods is not None
    path = first.logs.parent / "rayjob.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private(path, HEADER + yaml.safe_dump_all(manifest(stages), sort_keys=False))
    command = ["kubectl", "create", "-f", str(path)]
    if not first.pods.submit:
        view.text(
            f"written; submit it with: {' '.join(command)}   (launcher.kubernetes.submit=true does"
            " that)"
        )
        return 0
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        reason = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        view.text(
            f"submitting {path}: got {reason}, expected a RayJob. Fix: kubectl's context, or the"
            " launcher.kubernetes keys"
        )
        return USER_ERROR
    view.text(f"{done.stdout.strip()}; follow it with: kubectl get rayjob {job_name(first)} -w")
    return 0


def manifest(stages: Stages) -> list[dict[str, Any]]:
    """Return the Secret with the job file and the RayJob that runs it."""
    first = next(iter(stages[0].values()))
    pods = first.pods
    assert pods is not None
    inside = [
        {pool: replace(spec, address="auto", pods=None, batch=None) for pool, spec in stage.items()}
        for stage in stages
    ]
    most = max(sum(spec.workers for spec in stage.values()) for stage in stages)
    cpus = -(-most // first.nodes) * max(
        spec.cpus_per_worker for stage in stages for spec in stage.values()
    )
    name = job_name(first)
    limits: dict[str, str] = {"cpu": str(cpus), "memory": pods.memory}
    if pods.devices:
        kind, _, count = pods.devices.rpartition(":")
        limits[kind] = count
    head = pod(first, {"cpu": "2", "memory": "8Gi"}, secret=name)
    cluster = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        # The head runs no worker, so that a worker's failure cannot end it.
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "disable-usage-stats": "true"},
            "template": head,
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": first.nodes,
                "minReplicas": first.nodes,
                "maxReplicas": first.nodes,
                "rayStartParams": {"num-cpus": str(cpus), "disable-usage-stats": "true"},
                "template": pod(first, limits),
            }
        ],
    }
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": pods.namespace},
        "type": "Opaque",
        "stringData": {"job.json": frozen.to_text("ray", inside)},
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": pods.namespace},
        "spec": {
            "entrypoint": f"python -m launch.frozen {JOB}/job.json",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            # our driver restarts workers itself; a second cluster would not help a mistake
            "backoffLimit": 0,
            "rayClusterSpec": cluster,
        },
    }
    return [secret, job]


def pod(spec: LaunchSpec, limits: Mapping[str, str], secret: str | None = None) -> dict[str, Any]:
    """Return a pod template: image, shared volume, shared memory, and for the head the job file."""
    pods = spec.pods
    assert pods is not None
    volumes: list[dict[str, Any]] = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": pods.claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "shared", "mountPath": pods.mount},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if secret:
        volumes.append({"name": "job", "secret": {"secretName": secret, "defaultMode": 0o400}})
        mounts.append({"name": "job", "mountPath": JOB, "readOnly": True})
    container: dict[str, Any] = {
        "name": "ray",
        "image": pods.image,
        "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
        "resources": {"limits": dict(limits), "requests": dict(limits)},
        "volumeMounts": mounts,
    }
    if pods.environment_from:
        container["envFrom"] = [{"secretRef": {"name": pods.environment_from}}]
    return {
        "spec": {
            "containers": [container],
            "volumes": volumes,
            "terminationGracePeriodSeconds": round(spec.grace_s) + 30,
        }
    }


def job_name(spec: LaunchSpec) -> str:
    """Convert the run's name to a Kubernetes name: lower case, dashes, at most 47 letters.

    47 leaves room for the suffixes that KubeRay adds.
    """
    assert spec.pods is not None
    return re.sub(r"[^a-z0-9]+", "-", spec.pods.name.lower()).strip("-")[:47].rstrip("-") or "run"
