"""Parameters: `params.yaml` holds the value of each, and a typed schema checks them.

DVC composes that file from recipes (`pipelines/recipes`, Hydra's config groups): `dvc exp run -S
recipe=smoke -S detect=mask-rcnn_1x -S pretrain.lr=5e-4`, or `elsa compose` with the same words.
Nothing else resolves parameters.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML, YAMLError

from pipelines.errors import PipelineError
from pipelines.paths import RECIPES, ROOT
from pipelines.schema import Budget, BuildOp, Loader, Model, Params, Prepare, Scaling
from pipelines.schema.training import Detect, Downstream, Pretrain, Segment, Training
from pipelines.schema.values import Positive, Section

__all__ = [
    "Budget",
    "BuildOp",
    "Detect",
    "Downstream",
    "Loader",
    "Model",
    "Params",
    "ParamsError",
    "Positive",
    "Prepare",
    "Pretrain",
    "Scaling",
    "Section",
    "Segment",
    "Training",
    "changed",
    "compose",
    "flatten",
    "load_params",
    "nested",
    "override",
    "parse_change",
    "read_yaml",
    "recipe_names",
]


class ParamsError(PipelineError):
    """A parameter that the schema rejects; names the key and what is allowed."""


def recipe_names() -> list[str]:
    """Names of the recipes that can be chosen."""
    return sorted(path.stem for path in (RECIPES / "recipe").glob("*.yaml"))


OPEN = ("opt_kwargs", "cfg_options")
"""Parameters that are mappings with any keys."""


def load_params(path: Path = ROOT / "params.yaml") -> Params:
    """The parameters of a file, by default of what runs.

    Raises:
        ParamsError: the file is missing or not YAML, a key is unknown or missing, a value has the
            wrong type or is out of range, or values do not fit each other.
    """
    return _validate(read_yaml(path), path.name)


def compose(overrides: Sequence[str] = (), root: Path = ROOT) -> Params:
    """The parameters that `dvc exp run` composes from the recipes.

    Args:
        overrides: Hydra's, such as `recipe=smoke`, `detect=mask-rcnn_1x` or `pretrain.lr=1e-3`.

    Raises:
        ParamsError: an unknown recipe, group or key, or what the schema rejects.
    """
    where = " ".join(overrides) or "recipe=demo"
    return _validate(composed(overrides, root), where)


def composed(overrides: Sequence[str], root: Path = ROOT) -> dict[str, Any]:
    """The values of `compose`, before the schema has seen them."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with _without_working_directory():
        try:
            with initialize_config_dir(str(root / "pipelines/recipes"), version_base=None):
                config = hydra_compose(config_name="config", overrides=list(overrides))
            values: Any = OmegaConf.to_container(config, resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            text, _, _ = str(error).partition("Config search path")
            raise ParamsError(f"{' '.join(overrides)}: {' '.join(text.split())}") from None
    assert isinstance(values, dict)
    return values


@contextmanager
def _without_working_directory() -> Iterator[None]:
    """Hydra keeps one state per process: begin and leave without one."""
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().clear()


def override(params: Params, values: Mapping[str, Any], where: str) -> Params:
    """`params` with other values by dotted name (`model.lam`).

    Raises:
        ParamsError: the schema rejects them; the message starts with `where`.
    """
    return _validate(_merge(params.model_dump(mode="json"), nested(values)), where)


def changed(params: Params) -> dict[str, tuple[Any, Any]]:
    """What differs from the recipe, by dotted key: the recipe's value and the one that is used."""
    recipe = flatten(compose([f"recipe={params.recipe}"]).model_dump(mode="json"))
    used = flatten(params.model_dump(mode="json"))
    return {
        key: (recipe.get(key), value) for key, value in used.items() if recipe.get(key) != value
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted names; a parameter whose keys are the user's is one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in OPEN:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse_change(text: str) -> tuple[str, Any]:
    """Dotted key and value of `section.key=value`, the value as YAML has it.

    Raises:
        ParamsError: not of that form.
    """
    key, equals, value = text.partition("=")
    try:
        if not equals or "." not in key:
            raise ValueError
        return key, YAML(typ="safe").load(value)
    except (ValueError, YAMLError):
        raise ParamsError(f"{text} is not of the form section.key=value") from None


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted name as nested mappings: the inverse of `flatten`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        found = _merge(found, value)
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """A file of sections.

    Raises:
        ParamsError: missing, not YAML, or not a mapping.
    """
    try:
        data = YAML(typ="safe").load(path.read_text())
    except FileNotFoundError:
        raise ParamsError(
            f"{path.name} is missing", f"Restore it with `git checkout {path.name}`"
        ) from None
    except (YAMLError, ValueError) as error:  # bytes that are no text, dates that are none
        raise ParamsError(f"{path.name} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ParamsError(f"{path.name} must map section names to sections")
    return data


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = _merge(base[key], value)
        else:
            merged[key] = value
    return merged


def _validate(values: Mapping[str, Any], where: str) -> Params:
    try:
        # JSON mode is strict about types and still takes a list for a tuple.
        return Params.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ParamsError(f"{where}:\n  " + "\n  ".join(_explanations(error))) from None


def _explanations(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        key = ".".join(location) or "params"
        section: Any = Params
        for part in location[:-1]:
            field = section.model_fields.get(part) if _is_section(section) else None
            section = field.annotation if field else None
        kind, given = item["type"], item["input"]
        field = (
            section.model_fields.get(location[-1]) if location and _is_section(section) else None
        )
        if kind == "extra_forbidden":
            known = ", ".join(section.model_fields) if _is_section(section) else ""
            yield f"{key}: unknown key; known here: {known}"
        elif kind == "missing":
            yield f"{key}: missing; compose the file again (`elsa compose recipe=...`)"
        elif isinstance(given, str) and field is not None and _is_section(field.annotation):
            yield (
                f"{key}: it is the text {given!r} in place of a section; a group is composed by"
                f" `elsa compose {key}={given}`, or by `dvc exp run -S {key}={given}` without"
                " --no-hydra"
            )
        else:
            shown = "" if isinstance(given, dict) else f" (given: {given!r})"
            yield f"{key}: {item['msg'].removeprefix('Value error, ')}{shown}"


def _is_section(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)
