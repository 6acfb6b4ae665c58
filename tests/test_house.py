"""Files and functions that a reader can take in at once, outside the operator."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONG = ("elsa/swin.py",)  # one family of models, as timm has one file per family
FILES = [
    path
    for folder in ("elsa", "pipelines", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "tests/ops" not in path.as_posix()
]


@pytest.mark.parametrize("folder", ["elsa", "pipelines", "tests"])
def test_no_file_has_more_than_400_lines(folder: str) -> None:
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] == folder]
    assert files
    long = {path.relative_to(ROOT).as_posix(): len(path.open().readlines()) for path in files}
    assert {name for name, lines in long.items() if lines > 400} <= set(LONG)


def test_no_function_is_long_or_takes_many_parameters() -> None:
    """Models take timm's parameters, and say so where they are built."""
    wrong = []
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(("elsa/", "tests/")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([one for one in taken if one.arg not in ("self", "cls")])
                if lines > 60 or count > 7:
                    wrong.append(f"{name}:{node.lineno} {node.name}: {lines} lines, {count} args")
    assert not wrong, "\n".join(wrong)
