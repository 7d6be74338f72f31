"""Check `ray up`'s cluster file and KubeRay's RayJob against their schemas.

Ray ships the schema of its file. KubeRay's is part of its operator, so the fields that we use stand
here as its API declares them (RayJobSpec and RayClusterSpec of ray.io/v1, PodSpec of core/v1): a
field that is not here is an error.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from launch import frozen, on_kubernetes
from launch.progress import ProgressView
from launch.spec import BatchJob, LaunchSpec, Pods

ROOT = Path(__file__).resolve().parents[2]


LOADER = """
import sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
validate_config(prepare_config(yaml.safe_load(open(sys.argv[1]))))
"""


def mapping(required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


def list_of(item: Any) -> dict[str, Any]:
    return {"type": "array", "items": item}


TEXT, COUNT, SWITCH = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
METADATA = mapping(("name",), name=NAME, namespace=NAME)
VOLUME = mapping(
    ("name",),
    name=NAME,
    persistentVolumeClaim=mapping(("claimName",), claimName=TEXT, readOnly=SWITCH),
    emptyDir=mapping(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
    secret=mapping(secretName=TEXT, defaultMode=COUNT),
)
CONTAINER = mapping(
    ("name",),
    name=NAME,
    image=TEXT,
    env=list_of(mapping(("name",), name=TEXT, value=TEXT)),
    envFrom=list_of(mapping(secretRef=mapping(name=TEXT))),
    resources=mapping(limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=list_of(
        mapping(("name", "mountPath"), name=NAME, mountPath=TEXT, readOnly=SWITCH)
    ),
)
POD = mapping(
    spec=mapping(
        ("containers",),
        containers=list_of(CONTAINER),
        volumes=list_of(VOLUME),
        terminationGracePeriodSeconds=COUNT,
    )
)
GROUP = {"rayStartParams": TEXTS, "template": POD}
WORKERS = mapping(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, **GROUP,
)  # fmt: skip
CLUSTER = mapping(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=mapping(mode={"enum": ["disabled", "token"]}),
    headGroupSpec=mapping(("rayStartParams", "template"), **GROUP),
    workerGroupSpecs=list_of(WORKERS),
)
RAYJOB = mapping(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=METADATA,
    spec=mapping(
        entrypoint=TEXT,
        shutdownAfterJobFinishes=SWITCH,
        ttlSecondsAfterFinished=COUNT,
        backoffLimit=COUNT,
        rayClusterSpec=CLUSTER,
    ),
)


@pytest.fixture
def asked(spec, tmp_path: Path) -> LaunchSpec:
    pods = Pods(
        "My_Run",
        "registry/wm:1",
        "volume",
        str(tmp_path),
        devices="vendor.com/device:4",
        environment_from="s3",
    )
    return spec(
        "print('hi')",
        workers=8,
        nodes=2,
        cpus_per_worker=3,
        pods=pods,
        title="stage one",
        environment={"NOTE": "it's"},
    )


def test_the_cluster_file_is_what_ray_expects() -> None:
    file = ROOT / "launch" / "ray_up" / "cluster.yaml"
    config = yaml.safe_load(file.read_text())
    found = find_spec("ray")
    assert found
    assert found.origin
    schema = json.loads((Path(found.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    # In a process of its own: Ray reads RAY_AUTH_MODE once, when it is imported, and other tests
    # here set it.
    subprocess.run([sys.executable, "-c", LOADER, str(file)], check=True, timeout=60)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "workers": 3}, schema)
    starts = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert starts.count("RAY_AUTH_MODE=token") == starts.count("--disable-usage-stats") == 2


def test_the_manifest_is_what_kuberay_expects(asked: LaunchSpec, view: ProgressView) -> None:
    assert on_kubernetes.run(asked, view) == 0
    file = asked.logs.parent / "rayjob.yaml"
    assert file.stat().st_mode & 0o777 == 0o600
    assert "not been run on a Kubernetes cluster" in file.read_text()
    assert f"kubectl create -f {file}" in view.out.getvalue()
    secret, job = yaml.safe_load_all(file.read_text())
    jsonschema.validate(job, RAYJOB)
    for broken in (
        {**job, "kind": "RayCluster"},
        {**job, "spec": {**job["spec"], "entryPoint": "x"}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, RAYJOB)
    assert (secret["kind"], secret["metadata"], job["metadata"]["name"]) == (
        "Secret",
        job["metadata"],
        "my-run",
    )
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert workers["replicas"] == 2
    assert workers["rayStartParams"]["num-cpus"] == "12"
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "12", "memory": "16Gi", "vendor.com/device": "4"}
    launcher, stages = frozen.from_text(secret["stringData"]["job.json"])
    assert launcher == "ray"
    assert stages[0][""].address == "auto"
    assert stages[0][""].command == asked.command


def test_what_is_frozen_comes_back_the_same(asked: LaunchSpec, spec) -> None:
    stages = [
        {"": asked},
        {
            "high": spec("1", batch=BatchJob("b", after=Path("/a/b"), options=("--x",))),
            "low": spec("2", fewer=(3, 1)),
        },
    ]
    assert frozen.from_text(frozen.to_text("ray", stages)) == ("ray", stages)


def test_frozen_stages_run_in_order_until_one_fails(
    spec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job.json"
    ends = {1: 0, 2: 5, 3: 0}
    stages = [
        {"": spec(f"print('this is', {number}); sys.exit({code})", title=f"stage {number}")}
        for number, code in ends.items()
    ]
    job.write_text(frozen.to_text("inline", stages))
    assert frozen.main([str(job)]) == 5
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith(("stage", "this"))] == [
        "stage 1",
        "this is 1",
        "stage 2",
        "this is 2",
    ]


def test_a_file_asks_a_frozen_job_to_save_and_leave(spec, tmp_path: Path) -> None:
    """As a process, since the request arrives as a signal to it."""
    import subprocess

    program = (
        "signal.signal(signal.SIGTERM, lambda *_: ((place / 'saved').touch(), sys.exit(75)))\n"
    )
    program += "(place / 'stop').touch()\ntime.sleep(60)"
    job = tmp_path / "job.json"
    job.write_text(frozen.to_text("inline", [{"": spec(program)}]))
    command = [
        sys.executable,
        "-m",
        "launch.frozen",
        str(job),
        "--stop-file",
        str(tmp_path / "stop"),
    ]
    assert (
        subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False).returncode
        == 128 + signal.SIGTERM
    )
    assert (tmp_path / "saved").exists()


def test_a_frozen_job_is_held_from_before_its_workers_until_they_have_ended(
    spec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between two attempts of a job nobody held the folder, and another command could take it."""
    held, job = tmp_path / "held", tmp_path / "job.json"
    program = f"""
import pathlib, signal, sys, time
place = pathlib.Path({str(held)!r})
signal.signal(signal.SIGTERM, lambda *_: (place.unlink(), sys.exit(0)))
place.touch()
print("held", flush=True)
time.sleep(60)"""
    holder = ("{python}", "-c", program)
    worker = f"import pathlib; print('is held', pathlib.Path({str(held)!r}).exists())"
    job.write_text(frozen.to_text("inline", [{"": spec(worker, holder=holder)}]))
    assert frozen.main([str(job)]) == 0
    assert "is held True" in capsys.readouterr().out
    assert not held.exists()


def test_a_frozen_job_whose_folder_is_anothers_starts_nothing(
    spec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job.json"
    refusal = ("{python}", "-c", "print('owned by another'); raise SystemExit(2)")
    job.write_text(frozen.to_text("inline", [{"": spec("print('ran')", holder=refusal)}]))
    assert frozen.main([str(job)]) == 2
    said = capsys.readouterr().out
    assert "owned by another" in said
    assert "ran" not in said.splitlines()


def test_secrets_stand_in_the_secret_alone(asked: LaunchSpec) -> None:
    text = '{"tracker": {"uri": "http://robot:hunter2@host"}}'
    secret, job = on_kubernetes.manifest([{"": dataclasses.replace(asked, config_text=text)}])
    assert "hunter2" in secret["stringData"]["job.json"]
    assert "hunter2" not in yaml.safe_dump(job)
