"""Which source files compute a result, and a digest of them that comments do not change."""

import ast
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.errors import PipelineError

PACKAGES = ("ops", "elsa", "pipelines")
NOT_COMPUTING = (
    "pipelines/data/errors.py",
    "pipelines/errors.py",
    "pipelines/mm/checkpoint.py",
    "pipelines/params.py",
    "pipelines/paths.py",
    "pipelines/schema/__init__.py",
    "pipelines/schema/training.py",
    "pipelines/schema/values.py",
    "pipelines/train/checkpoint.py",
)
"""Imported by what computes a result, and no input of it: the parameters that they check are inputs
by value, and the files of a checkpoint have a format number."""


def closure(modules: Sequence[str], root: Path) -> set[str]:
    """The files that `modules` load from this repository, themselves included.

    Every import counts, also one within a function; those under `if TYPE_CHECKING:` do not. An
    `__init__.py` that hands on a name stands for the file that defines it, so that importing one
    name of a package does not make an input of all others.

    Args:
        modules: dotted names, such as `pipelines.train.classify`.
        root: the checkout.

    Returns:
        paths relative to `root`.

    Raises:
        FileNotFoundError: there is no such module.
    """
    found: set[str] = set()
    waiting = [_file(module, root) for module in modules]
    if None in waiting:
        missing = [name for name, file in zip(modules, waiting, strict=True) if file is None]
        raise FileNotFoundError(f"no module {', '.join(missing)} in {root}")
    while waiting:
        file = waiting.pop()
        assert file is not None
        name = file.relative_to(root).as_posix()
        if name not in found and name not in NOT_COMPUTING:
            found.add(name)
            waiting += _imported(file, root)
    return found


def code_digest(file: Path) -> str:
    """SHA-256 of what a Python file does: comments, docstrings, layout and the names of our own
    modules do not count. Empty for a file that does nothing."""
    tree = _Bare().visit(ast.parse(file.read_text()))
    text = ast.dump(tree)
    return hashlib.sha256(text.encode()).hexdigest() if tree.body else ""


def config_files(file: Path) -> list[Path]:
    """An mmengine config and the files that it is based on, those of installed packages apart.

    Raises:
        PipelineError: one is missing, is no Python, or has a `_base_` that is no text.
    """
    try:
        assigned = [
            ast.literal_eval(node.value)
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_base_"
        ]
    except (OSError, SyntaxError, ValueError) as error:
        raise PipelineError(f"config {file} can't be read: {error}", "Correct it") from None
    bases = [one for given in assigned for one in ([given] if isinstance(given, str) else given)]
    local = [file.parent / base for base in bases if "::" not in base and "://" not in base]
    return [file, *(found for base in local for found in config_files(base))]


class _Bare(ast.NodeTransformer):
    """Takes away docstrings (of attributes too) and the imports of our own modules."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        literal = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if literal else self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> ast.AST | None:
        names = [alias for alias in node.names if not _is_ours(alias.name)]
        return ast.Import(names) if names else None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        return None if node.level or _is_ours(node.module or "") else node


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def _file(module: str, root: Path) -> Path | None:
    path = root.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def _imported(file: Path, root: Path) -> Iterator[Path]:
    """The files of this repository that the imports of `file` stand for."""
    tree = ast.parse(file.read_text())
    for node in _executed(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _is_ours(alias.name):
                    used = alias.asname or alias.name
                    yield from _of_module(alias.name, _attributes(tree, used), root)
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, file, root)
            if _is_ours(module):
                for alias in node.names:
                    yield from _of_name(module, alias, tree, root)


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from _executed(node)


def _absolute(node: ast.ImportFrom, file: Path, root: Path) -> str:
    if not node.level:
        return node.module or ""
    package = file.relative_to(root).parent.parts
    above = package[: len(package) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def _attributes(tree: ast.AST, name: str) -> set[str]:
    """What the file takes from the module that it calls `name`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == name
    }


def _of_name(module: str, alias: ast.alias, tree: ast.AST, root: Path) -> Iterator[Path]:
    submodule = f"{module}.{alias.name}"
    if _file(submodule, root):
        yield from _of_module(submodule, _attributes(tree, alias.asname or alias.name), root)
    else:
        yield from _of_module(module, {alias.name}, root)


def _of_module(module: str, names: set[str], root: Path) -> Iterator[Path]:
    """The files that stand for `names` of a module: the module's own, or of a package those that
    define them."""
    file = _file(module, root)
    if file is None:
        raise FileNotFoundError(f"no module {module} in {root}")
    if file.name != "__init__.py":
        yield file
        return
    tree = ast.parse(file.read_text())
    handed_on = {
        alias.asname or alias.name: (_absolute(node, file, root), alias)
        for node in ast.walk(tree)  # also what it imports when it is asked for, as `ops` does
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for name in sorted(names):
        if name in handed_on and _is_ours(handed_on[name][0]):
            yield from _of_name(*handed_on[name], tree, root)
        elif _file(f"{module}.{name}", root):
            yield from _of_module(f"{module}.{name}", set(), root)
        else:
            yield file
