"""A real Ray cluster on loopback, with a token: jobs, the doctor, a node that joins."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from .conftest import ROOT
from .ray_cluster import PASSWORD, RayCluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    started = RayCluster(tmp_path_factory.mktemp("cluster"))
    try:
        started.start_tracking()
        started.start_head()
        yield started
    finally:
        started.stop()


def test_a_job_runs_in_the_checkout_outlives_the_terminal_and_its_exit_code_counts(
    cluster: RayCluster, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    script = f'echo "in $PWD on $RAY_ADDRESS"; while [ ! -e {go} ]; do sleep 0.2; done; exit 3'
    process = subprocess.Popen(
        cluster.submit_command("--", "sh", "-c", script),
        cwd=ROOT,
        env=cluster.env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    seen = ""
    assert process.stdout
    while f"\nin {ROOT} on 127.0.0.1:{cluster.port}\n" not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    job = re.findall(r"--logs (\S+)", rest)[0]
    go.touch()
    code, output = cluster.submit("--logs", job)
    assert code == 1, output
    assert f"\nin {ROOT} on" in output  # from the start
    assert f"{job} failed" in output
    assert "exit code 3. To resume, submit the same command again" in output


def test_a_job_can_be_listed_and_stopped(cluster: RayCluster) -> None:
    _, output = cluster.submit("--detach", "--", "sleep", "600")
    job = output.split()[0]
    code, output = cluster.submit("--stop", job)
    assert code == 0, output
    _, output = cluster.submit("--list")
    row = next(line for line in output.splitlines() if job in line)
    assert "stopped" in row
    assert "sleep 600" in row


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (("--logs", "raysubmit_0"), {}, "no job raysubmit_0 on this cluster"),
        (("--list",), {"RAY_AUTH_TOKEN": "0" * 64}, "rejects this token"),
        (("--list", "--address", "http://127.0.0.1:1"), {}, "no Ray dashboard to submit to"),
    ],
)
def test_what_submit_can_not_do_it_says_in_one_line(cluster, arguments, env, message) -> None:
    code, output = cluster.submit(*arguments, **env)
    assert code == 1
    assert message in output
    assert "Traceback" not in output


WAIT = """
import ray, sys
from pipelines.errors import PipelineError
from pipelines.params import compose
from pipelines.run import preflight
from pipelines.run.session import ray_session

scaling = compose().scaling
with ray_session():
    preflight.wait_for_workers("pretrain", scaling.model_copy(update={"wait_s": 150}))
    print(len(preflight.alive_nodes()), "nodes", flush=True)
    try:
        many = scaling.model_copy(update={"num_workers": 9, "wait_s": 1})
        preflight.wait_for_workers("pretrain", many)
    except PipelineError as error:
        print(error)
"""


def test_a_stage_waits_for_a_node_that_joins_and_ends_where_none_does(cluster: RayCluster) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT],
        cwd=ROOT,
        env=cluster.env | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout
    line = process.stdout.readline()
    while line and "waiting up to" not in line:
        line = process.stdout.readline()
    assert "1 of scaling.num_workers=2 fit (1 CPU each)" in line
    cluster.join()
    output, _ = process.communicate(timeout=300)
    assert "2 nodes" in output
    assert (
        "too few resources after waiting scaling.wait_s=1 s: 2 of scaling.num_workers=9" in output
    )


def test_the_heads_tracking_server_asks_for_a_password_that_no_process_shows(cluster) -> None:
    output, _ = cluster.starting.communicate(timeout=300)
    assert cluster.starting.returncode == 0, output
    ask = (
        sys.executable,
        "-c",
        f"from pipelines.run import tracking; tracking.ping('{cluster.tracking}')",
    )
    assert cluster.run(*ask) == (0, "")
    code, output = cluster.run(*ask, HOME="/nonexistent")
    assert code == 1
    assert "You are not authenticated" in output
    server = psutil.Process(int((cluster.tracking_data / "server.pid").read_text()))
    for process in [server, *server.children(recursive=True)]:
        assert PASSWORD not in " ".join(process.cmdline())


def test_the_doctor_asks_every_node_of_a_cluster(cluster: RayCluster, compiled_library) -> None:
    """The second node joined in a test above."""
    places = {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}", "MLFLOW_TRACKING_URI": cluster.tracking}
    code, output = cluster.run(sys.executable, "-m", "pipelines.cli", "doctor", **places)
    rows = [[cell.strip() for cell in line.split("│")] for line in output.splitlines()]
    marks = [(row[2], row[1]) for row in rows if len(row) > 5 and row[1]]
    for check in ("storage", "versions", "tracking", "memory"):
        assert marks.count((check, "ok")) == 2, output
    assert ("workers", "ok") in marks
    assert PASSWORD not in output
    assert code == (1 if "fails" in [mark for _, mark in marks] else 0)


ELASTIC = """
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from pipelines.data.demo.draw import prepare
from pipelines.data.store import Dataset
from pipelines.params import compose
from pipelines.run import preflight, tracking
from pipelines.run.fit import RunSpec, fit
from pipelines.run.session import ray_session
from pipelines.tasks import task_of_stage
from pipelines.train.job import Job

folder, stage = Path(sys.argv[1]), sys.argv[2]
task = task_of_stage(stage)
sizes = {"image_size": 28, "train_variants": 4, "scene_size": 96}
counts = {"digits_per_class": 20, "train_scenes": 60, "val_scenes": 2, "max_digits": 3}
prepare(SimpleNamespace(seed=0, **sizes, **counts), folder / "data")
params = compose([
    "recipe=smoke", f"storage.path={folder / 'storage'}", "scaling.min_workers=1",
    f"{stage}.epochs=6", "pretrain.warmup_epochs=0", "segment.val_interval=6",
])
preflight.require = lambda *arguments: None  # this checkout may have no compiled operator
place = folder / "data" / task.dataset
classes = tuple(json.loads((place / "manifest.json").read_text())["classes"])
data = Dataset(task.dataset, str(place), classes, {}, "")
with ray_session() as session:
    run = tracking.start_run(stage, "test", {})
    fit(task.loop, Job(stage, params, data), RunSpec(
        stage=stage, name=f"{stage}-elastic", mlflow_run_id=run.run_id,
        scaling=params.scaling, storage=params.storage.path, data={}, local=session.local,
        stops=True, elastic=True,
    ))
    loss = {"pretrain": "train_loss", "segment": "loss"}[stage]
    steps = [m.step for m in run.client.get_metric_history(run.run_id, loss)]
    print("epochs", steps)
"""


WORKER_NODES = """
import ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
alive = [node for node in ray.nodes() if node["Alive"]]
print(*(n["NodeID"] for n in alive if "node:__internal_head__" not in n["Resources"]))
"""


def train_until_a_checkpoint(
    cluster: RayCluster, stage: str, folder: Path
) -> tuple[subprocess.Popen, Path]:
    """On two workers; its output is in the file. Ray Train knows of a node that has joined up to
    20 s later, and begins with the other one until then."""
    for number in range(4):
        scratch = folder / str(number)
        scratch.mkdir()
        process, output = train(cluster, stage, scratch), scratch / "output"
        deadline = time.monotonic() + 240
        while not list(scratch.glob("storage/*/checkpoint_2*/digests.json")):
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        if "num_workers=2 workers" not in output.read_text():
            return process, output
        process.send_signal(signal.SIGINT)
        process.wait(timeout=240)
    raise AssertionError(output.read_text())


def train(cluster: RayCluster, stage: str, folder: Path) -> subprocess.Popen:
    with (folder / "output").open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-c", ELASTIC, str(folder), stage],
            cwd=ROOT,
            env=cluster.env
            | {
                "RAY_ADDRESS": f"127.0.0.1:{cluster.port}",
                "MLFLOW_TRACKING_URI": cluster.tracking,
                "GLOO_SOCKET_IFNAME": "lo",
                "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
            },
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def join_another(cluster: RayCluster, gone: str) -> None:
    """Start a node, and wait until it is the only one beside the head."""
    cluster.join()
    address = {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
    deadline = time.monotonic() + 120
    while True:
        _, found = cluster.run(sys.executable, "-c", WORKER_NODES, **address)
        if len(found.split()) == 1 and found.strip() != gone:
            return
        assert time.monotonic() < deadline, found
        time.sleep(1)


needs_minutes = pytest.mark.skipif(
    not os.environ.get("ELSA_TEST_CLUSTER"), reason="two minutes: run it by `make test-cluster`"
)


@needs_minutes
def test_training_leaves_a_node_that_is_drained(cluster: RayCluster, tmp_path: Path) -> None:
    """As a spot instance is; the second node joined in a test above, and another follows it."""
    address = {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
    code, node = cluster.run(sys.executable, "-c", WORKER_NODES, **address)
    assert code == 0, node
    process, output = train_until_a_checkpoint(cluster, "pretrain", tmp_path)
    code, told = cluster.run(
        *("ray", "drain-node", "--address", address["RAY_ADDRESS"], "--node-id", node.strip()),
        *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a spot notice"),
        *("--deadline-remaining-seconds", "30"),
    )
    assert code == 0, told
    assert process.wait(timeout=240) == 0, output.read_text()
    shown = output.read_text()
    assert f"node {node[:8]} is about to be taken away" in shown
    assert "on 1 of scaling.num_workers=2 workers" in shown
    assert "failed" not in shown  # it left before the node was gone
    assert f"epochs {list(range(6))}" in shown
    cluster.nodes[-1].terminate()
    cluster.nodes[-1].wait(timeout=60)
    join_another(cluster, node.strip())


@needs_minutes
@pytest.mark.parametrize("stage", ["segment", "pretrain"])
def test_training_continues_when_a_node_is_lost(
    stage: str, cluster: RayCluster, tmp_path: Path
) -> None:
    """On the worker that is left."""
    address = {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
    _, node = cluster.run(sys.executable, "-c", WORKER_NODES, **address)
    process, output = train_until_a_checkpoint(cluster, stage, tmp_path)
    os.killpg(cluster.nodes[-1].pid, signal.SIGKILL)
    assert process.wait(timeout=240) == 0, output.read_text()
    assert "training resumes from the last checkpoint" in output.read_text()
    assert "on 1 of scaling.num_workers=2 workers" in output.read_text()
    assert f"epochs {list(range(6))}" in output.read_text()
    if stage == "segment":
        join_another(cluster, node.strip())
