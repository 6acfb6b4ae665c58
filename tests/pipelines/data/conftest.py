"""The demo's data sets at small size, as the demo has them and as public ones are given."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.data.demo import draw as demo

PARAMS = SimpleNamespace(
    seed=3,
    digits_per_class=10,
    image_size=32,
    train_variants=2,
    scene_size=96,
    train_scenes=14,
    val_scenes=8,
    max_digits=5,
)
SIZES = SimpleNamespace(
    seed=5,
    digits_per_class=10,
    image_size=32,
    train_variants=1,
    scene_size=96,
    train_scenes=9,
    val_scenes=5,
    max_digits=3,
)


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    demo.prepare(PARAMS, root)
    return root


@pytest.fixture
def copy_demo(demo_data: Path, tmp_path: Path) -> Callable[[str], Path]:
    def of(kind: str) -> Path:
        return Path(shutil.copytree(demo_data / kind, tmp_path / kind))

    return of


@pytest.fixture(scope="module")
def public_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three data sets as a colleague would have them: the manifests of ours lie beside."""
    root = tmp_path_factory.mktemp("public")
    demo.prepare(SIZES, root)
    for kind in demo.DATASETS:
        (root / kind / "manifest.json").rename(root / f"{kind}.json")
        (root / kind / "sources.json").unlink()
    (root / "ade20k/classes.txt").write_text("\n".join(demo.CLASSES["ade20k"]))
    return root


@pytest.fixture
def copy_public(public_data: Path, tmp_path: Path) -> Callable[[str], Path]:
    def of(kind: str) -> Path:
        return Path(shutil.copytree(public_data / kind, tmp_path / "given" / kind))

    return of
