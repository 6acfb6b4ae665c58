"""Compose params.yaml from the recipes without running anything, and show parameters."""

from collections.abc import Sequence

from pipelines.params import compose, load_params
from pipelines.paths import ROOT


def write_params(overrides: Sequence[str]) -> None:
    """Write `params.yaml` as `dvc exp run` would with these overrides, after a check.

    Raises:
        ParamsError: an unknown recipe, group or key, or what the schema rejects.
    """
    from dvc.utils.hydra import compose_and_dump

    compose(overrides)
    aside = ROOT / ".params.yaml"
    recipes, plugins = ROOT / "pipelines/recipes", ROOT / ".dvc"
    try:
        compose_and_dump(aside, str(recipes), None, "config", str(plugins), list(overrides))
        aside.replace(ROOT / "params.yaml")
    finally:
        aside.unlink(missing_ok=True)


def show_params(overrides: Sequence[str]) -> str:
    """As JSON, the parameters that run, or those of the overrides.

    Raises:
        ParamsError: as `load_params` and `compose`.
    """
    params = compose(overrides) if overrides else load_params()
    return params.model_dump_json(indent=2)
