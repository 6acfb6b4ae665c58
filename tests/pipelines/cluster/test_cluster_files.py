"""The cluster's files: Ray's own checks of them, and what of Kubernetes is checkable."""

import re
import subprocess
from pathlib import Path

import pytest
import ray
from ray.autoscaler._private.util import prepare_config, validate_config
from ruamel.yaml import YAML

from pipelines.params import compose

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ("cluster.yaml", "pipelines/cluster/machines.yaml")
SCRIPTS = sorted((ROOT / "pipelines/cluster").glob("*.sh"))


def read(name: str) -> dict:
    return YAML(typ="safe").load((ROOT / name).read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_ray_accepts_the_configuration(name: str) -> None:
    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", CONFIGS)
def test_ray_rejects_a_key_that_it_does_not_know(name: str) -> None:
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config(prepare_config(read(name) | {"setup_command": []}))


def test_gpu_workers_start_from_none_and_fall_back_to_on_demand() -> None:
    config = read("cluster.yaml")
    head, spot, on_demand = (
        config["available_node_types"][name] for name in ("head", "gpu_spot", "gpu_on_demand")
    )
    assert config["head_node_type"] == "head"
    assert "InstanceMarketOptions" not in head["node_config"]
    assert spot["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in on_demand["node_config"]
    assert spot["priority"] > on_demand["priority"]
    assert spot["min_workers"] == on_demand["min_workers"] == 0
    for kind in (head, spot, on_demand):
        tags = {tag["Key"] for s in kind["node_config"]["TagSpecifications"] for tag in s["Tags"]}
        assert "project" in tags


def test_from_outside_only_ssh_is_open() -> None:
    rules = read("cluster.yaml")["provider"]["security_group"]["IpPermissions"]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in rules] == [(22, 22)]


@pytest.mark.parametrize("name", CONFIGS)
def test_ray_runs_with_its_token_and_the_dashboard_on_loopback(name: str) -> None:
    config = read(name)
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert any(path.endswith("/.ray/auth_token") for path in config["file_mounts"])
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        if "ray " in command:
            assert command.startswith("source ~/elsa/pipelines/cluster/env.sh && ")
    shown = subprocess.run(
        ["bash", "-c", "source pipelines/cluster/env.sh && env"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "RAY_HEAD_IP": "192.0.2.1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert "RAY_AUTH_MODE=token" in shown
    assert "MLFLOW_TRACKING_URI=http://192.0.2.1:5000" in shown
    assert f"ELSA_CHECKOUT={ROOT}" in shown


@pytest.mark.parametrize("name", [*CONFIGS, "pipelines/cluster/rayjob.yaml"])
def test_no_secret_is_in_the_file(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"(?i)(password|token|secret)\s*[:=]\s*[\"']?[A-Za-z0-9+/]{12,}", text)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_the_configurations_name_those_that_exist(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    for name in CONFIGS:
        assert f"~/elsa/{script.relative_to(ROOT)}" in (ROOT / name).read_text()


def pods() -> list[dict]:
    spec = read("pipelines/cluster/rayjob.yaml")["spec"]["rayClusterSpec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_ray_job_asks_for_this_ray_with_a_token_and_ends_after_the_job() -> None:
    job = read("pipelines/cluster/rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert "dvc repro" in spec["entrypoint"]
    assert spec["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["minReplicas"] == 0 < workers["maxReplicas"]


def test_pods_have_no_privileges_and_share_their_folders() -> None:
    for pod in pods():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) == set(volumes)
        for folder in ("/elsa/data", "/elsa/storage", "/elsa/.runs"):
            assert "persistentVolumeClaim" in volumes[mounts[folder]]
        assert not any("hostPath" in volume for volume in volumes.values())
        resources = container["resources"]
        assert resources["limits"] == resources["requests"]


def test_a_workers_pod_has_cpus_for_each_of_its_gpus() -> None:
    limits = pods()[1]["containers"][0]["resources"]["limits"]
    per_gpu = compose(["recipe=elsa_swin_tiny"]).scaling.cpus_per_worker
    assert int(limits["cpu"]) >= per_gpu * int(limits["nvidia.com/gpu"])


def test_pods_take_passwords_from_secrets() -> None:
    for pod in pods():
        variables = {v["name"]: v for v in pod["containers"][0]["env"]}
        named = {name for name in variables if name.startswith("MLFLOW_")}
        assert {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"} <= named
        for name in named:
            assert "secretKeyRef" in variables[name]["valueFrom"], name
