"""What counts as code of a stage, and what a change of it must not look like."""

from pathlib import Path

import pytest

from ops.sources import code_digest as cpp_digest
from pipelines.run.code import closure, code_digest

FILES = {
    "pipelines/__init__.py": "import os\nos.environ['X'] = '1'\n",
    "pipelines/loop.py": (
        "from typing import TYPE_CHECKING\n"
        "import elsa\n"
        "from pipelines.tools import needed\n"
        "from pipelines import params\n"
        "if TYPE_CHECKING:\n    from pipelines.display import Display\n"
        "def train():\n"
        "    from pipelines.late import helper\n"
        "    return elsa.load(needed())\n"
    ),
    "pipelines/tools/__init__.py": "from .used import needed\nfrom .unused import other\n",
    "pipelines/tools/used.py": "def needed(): return 1\n",
    "pipelines/tools/unused.py": "def other(): return 2\n",
    "pipelines/late.py": "helper = 3\n",
    "pipelines/display.py": "class Display: ...\n",
    "pipelines/params.py": "lr = 1\n",
    "elsa/__init__.py": "from .checkpoints import load\nfrom .volo import VOLO\n",
    "elsa/checkpoints.py": "from .swin import build\ndef load(x): return build(x)\n",
    "elsa/swin.py": "def build(x): return x\n",
    "elsa/volo.py": "class VOLO: ...\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_closure_is_what_the_loop_runs_and_nothing_else(root: Path) -> None:
    assert closure(["pipelines.loop"], root) == {
        "pipelines/loop.py",
        "pipelines/tools/used.py",  # through the package that hands it on
        "pipelines/late.py",  # imported within a function
        "elsa/checkpoints.py",
        "elsa/swin.py",  # through a relative import
    }


def test_a_missing_module_is_named(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pipelines\.gone"):
        closure(["pipelines.gone"], root)


@pytest.mark.parametrize(
    "changed",
    [
        "# why\nx  =  1\ndef f(a, b):\n\n    return a + b  # sum\n",
        '"""About."""\nx = 1\n"""About x."""\ndef f(a, b):\n    """Sum."""\n    return a + b\n',
        "from pipelines.elsewhere import g\nimport elsa\nx = 1\ndef f(a, b):\n    return (a + b)\n",
    ],
    ids=["comments and layout", "docstrings", "where our own modules are"],
)
def test_what_does_nothing_does_not_count(tmp_path: Path, changed: str) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("from pipelines.here import g\nx = 1\ndef f(a, b):\n    return a + b\n")
    other.write_text(changed)
    assert code_digest(one) == code_digest(other)


@pytest.mark.parametrize("changed", ["x = 2\n", "import torch\nx = 1\n", "x = '1'\n"])
def test_what_does_something_counts(tmp_path: Path, changed: str) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("x = 1\n")
    other.write_text(changed)
    assert code_digest(one) != code_digest(other)


CPP = 'int f() { return g("// no comment", \'"\'); }\n'


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ("// about\n" + CPP, True),
        ("/* about\n   it */\n\n    " + CPP.replace("{ ", "{ /* here */ "), True),
        (CPP.replace("// no comment", "// other text"), False),
        (CPP.replace("return g", "return h"), False),
    ],
)
def test_comments_of_cpp_do_not_count(tmp_path: Path, changed: str, same: bool) -> None:
    one, other = tmp_path / "one.cpp", tmp_path / "other.cpp"
    one.write_text(CPP)
    other.write_text(changed)
    assert (cpp_digest(one) == cpp_digest(other)) is same
