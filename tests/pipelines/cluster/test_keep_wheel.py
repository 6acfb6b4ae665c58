"""The wheel of an installed package, as an installer takes it."""

import base64
import csv
import hashlib
import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename

from pipelines.cluster.keep_wheel import LEFT_OUT, keep
from pipelines.paths import ROOT


@pytest.mark.parametrize("name", ["addict", "onedl-mmcv"])
def test_an_installed_package_becomes_a_wheel_again(name: str, tmp_path: Path) -> None:
    wheel = keep(name, tmp_path / "wheels")
    assert keep(name, tmp_path / "wheels") == wheel
    assert [file.name for file in wheel.parent.iterdir()] == [wheel.name]
    named, version, *_ = parse_wheel_filename(wheel.name)
    assert (named, str(version)) == (name, importlib.metadata.version(name))
    with zipfile.ZipFile(wheel) as content:
        [record] = [n for n in content.namelist() if n.endswith(".dist-info/RECORD")]
        rows = list(csv.reader(content.read(record).decode().splitlines()))
        assert {row[0] for row in rows} == set(content.namelist())
        for path, digest, _ in rows:
            assert Path(path).name not in LEFT_OUT
            if digest:
                found = hashlib.sha256(content.read(path)).digest()
                value = base64.urlsafe_b64encode(found).decode().rstrip("=")
                assert digest == f"sha256={value}"
        if name == "onedl-mmcv":
            assert any(n.endswith(".so") for n in content.namelist())


def test_what_is_not_installed_is_told_and_ends_nothing(tmp_path: Path) -> None:
    script = ROOT / "pipelines/cluster/keep_wheel.py"
    done = subprocess.run(
        [sys.executable, str(script), "not-installed", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the wheel is not kept, the next checkout compiles anew" in done.stderr
    assert not list(tmp_path.iterdir())
