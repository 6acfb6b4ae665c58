"""What a node must have before a training starts, and what is said where it lacks it."""

import socket
from pathlib import Path

import pytest

from pipelines.commands import doctor
from pipelines.params import compose
from pipelines.run import preflight, shared_storage
from pipelines.run.finding import Finding
from pipelines.run.preflight import Needs
from pipelines.run.shared_storage import Mark

SCALING = compose(["recipe=elsa_swin_tiny"]).scaling  # 8 workers of 8 CPUs and a GPU each


def node(name: str, cpus: int, gpus: int = 0) -> dict:
    return {"NodeManagerAddress": name, "Resources": {"CPU": cpus, "GPU": gpus}}


def test_workers_fit_where_each_node_holds_whole_ones() -> None:
    assert not preflight.check_workers(SCALING, [node("a", 64, 8)]).fix
    assert not preflight.check_workers(SCALING, [node("a", 32, 4), node("b", 40, 4)]).fix


@pytest.mark.parametrize(
    ("nodes", "fit"),
    [
        ([], 0),
        ([node("head", 96)], 0),
        ([node("a", 64, 4)], 4),
        ([node("a", 100, 4), node("b", 12, 4)], 5),  # CPUs and GPUs suffice, but not where
    ],
)
def test_workers_that_do_not_fit_are_counted_by_node(nodes: list[dict], fit: int) -> None:
    finding = preflight.check_workers(SCALING, nodes)
    assert f"{fit} of scaling.num_workers=8 fit (8 CPU and 1 GPU each)" in finding.found
    assert all(one["NodeManagerAddress"] in finding.found for one in nodes)
    assert "scaling.num_workers" in finding.fix
    assert ("use_gpu=false" in finding.fix) == (fit == 0)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch):
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="runs")
    yield boto3.client("s3")
    server.stop()


def test_nodes_find_the_drivers_mark_in_a_shared_folder(tmp_path: Path) -> None:
    mark = Mark(str(tmp_path / "storage"))
    assert not mark.leave("driver").fix
    assert not mark.find("other").fix
    mark.remove()
    assert not list((tmp_path / "storage").iterdir())


def test_nodes_find_the_drivers_mark_in_a_bucket(bucket) -> None:
    mark = Mark("s3://runs/elsa")
    assert not mark.leave("driver").fix, mark.leave("driver")
    assert not mark.find("other").fix
    mark.remove()
    left = [one["Key"] for one in bucket.list_objects_v2(Bucket="runs").get("Contents", [])]
    assert left in ([], ["elsa/"])  # Arrow leaves an empty object for the folder
    assert "bucket its credentials" in Mark("s3://nobody").leave("driver").fix


def test_a_folder_of_each_nodes_own_is_no_storage(tmp_path: Path) -> None:
    mark = Mark(str(tmp_path))
    mark.leave("driver")
    mark.remove()  # as on a node whose folder of this name is another one
    finding = mark.find("other")
    assert "another folder than the driver's" in finding.found
    assert "s3://" in finding.fix


def test_storage_that_can_not_be_written_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = Mark(str(tmp_path / "file/storage")).leave("driver")
    assert "can't be written" in finding.found
    assert "free space" in finding.fix


def test_a_full_disk_is_told_before_training(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shared_storage, "NEEDED_DISK", 2**60)
    assert "delete runs" in Mark(str(tmp_path)).leave("driver").fix


def check(tmp_path: Path, **needs) -> dict[str, Finding]:
    all_needs = {"tracking_uri": "sqlite:///x.db", "data": {}, "use_gpu": False, "op": False}
    versions = needs.pop("versions", preflight.versions())
    driver = needs.pop("driver", True)
    given = Needs(storage=str(tmp_path), **(all_needs | needs))
    return {one.check: one for one in preflight.check_node(given, "n", versions, driver=driver)}


def test_a_node_of_other_versions_is_named_with_both(tmp_path: Path) -> None:
    expected = preflight.versions() | {"torch": "1.0"}
    finding = check(tmp_path, versions=expected)["versions"]
    assert "the driver has 1.0" in finding.found
    assert "uv sync" in finding.fix


def test_a_tracking_server_that_is_away_is_told_within_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    finding = check(tmp_path, tracking_uri=f"http://user:secret@127.0.0.1:{port}")["tracking"]
    assert "MLFLOW_TRACKING_URI" in finding.fix
    assert "secret" not in finding.found


def test_the_drivers_sqlite_file_is_no_tracking_for_other_nodes(tmp_path: Path) -> None:
    assert not check(tmp_path)["tracking"].fix
    assert "server" in check(tmp_path, driver=False)["tracking"].fix


def test_data_must_be_readable_on_the_node(tmp_path: Path) -> None:
    (tmp_path / "coco/train2017").mkdir(parents=True)
    places = {"coco": str(tmp_path / "coco"), "ade20k": str(tmp_path / "gone")}
    found = check(tmp_path, data=places)
    assert f"no file in {tmp_path}/coco" in found["data coco"].found
    assert found["data ade20k"].fix
    (tmp_path / "coco/train2017/1.jpg").write_bytes(b"jpeg")
    assert not check(tmp_path, data=places)["data coco"].fix


def test_a_missing_operator_is_told_with_how_to_build_it(
    tmp_path: Path, monkeypatch, compiled_library: Path
) -> None:
    monkeypatch.setattr(preflight, "ROOT", tmp_path)
    assert "ops.build" in check(tmp_path, op=True)["operator"].fix
    (tmp_path / "build").mkdir()
    (tmp_path / "build/op").symlink_to(compiled_library)
    assert not check(tmp_path, op=True)["operator"].fix
    gpu = check(tmp_path, op=True, use_gpu=True)["operator"]
    assert gpu.fix
    assert "GPU" in gpu.found or "CUDA" in gpu.found


def test_the_doctor_finds_the_lock_that_a_killed_dvc_left(tmp_path: Path) -> None:
    assert not doctor.check_dvc_lock(tmp_path).fix
    lock = tmp_path / ".dvc/tmp/rwlock"
    lock.parent.mkdir(parents=True)
    for whole in ("{}", '{"out": {"write": {"pid": 1, "cmd": "dvc repro"}}}'):
        lock.write_text(whole)
        assert not doctor.check_dvc_lock(tmp_path).fix
    for cut in ("", '{"out": {"wri'):
        lock.write_text(cut)
        assert "rm .dvc/tmp/rwlock" in doctor.check_dvc_lock(tmp_path).fix
