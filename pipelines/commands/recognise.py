"""What model the weights of a checkpoint are of: its parameters, and the model with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.data.weights import DESCRIPTION
from pipelines.errors import PipelineError
from pipelines.params import Params, compose, load_params, override, parse_change, recipe_names
from pipelines.paths import RECIPES
from pipelines.tasks import Prediction, Task


def choose_params(
    task: Task, weights: Path, recipe: str | None, changes: list[str], use_ema: bool = True
) -> Params:
    """The parameters that the weights belong to: the recipe if given, else those of `params.yaml`
    if the weights fit their model, else the first recipe whose model they fit.

    Raises:
        PipelineError: none fits.
    """
    described = _description(weights)
    group = f"{described.get('method')}_{described.get('schedule')}"
    given = any(change.startswith(f"{task.stage}=") for change in changes)
    if (RECIPES / task.stage / f"{group}.yaml").is_file() and not given:
        own = [f"{task.stage}.config={described['config']}"] if "config" in described else []
        changes = [f"{task.stage}={group}", *own, *changes]
    if recipe:
        return _as_described(compose([f"recipe={recipe}", *changes]), task, described)
    faults = {}
    for name in ("params.yaml", *recipe_names()):
        try:
            params = _params_yaml(changes) if name == "params.yaml" else None
            params = params or compose([f"recipe={name}", *changes])
            params = _as_described(params, task, described)
        except PipelineError as error:
            faults[name] = str(error)  # a change that is not for this recipe
            continue
        fault = _misfit(task, weights, params, use_ema)
        if fault is None:
            return params
        faults[name] = fault
    shown = "\n".join(f"  {name}: {fault.splitlines()[0]}" for name, fault in faults.items())
    raise PipelineError(
        f"{weights} fits the model of no recipe. Tried:\n{shown}",
        "Name one with --recipe, and change it with -S model.<key>=<value>, to see what differs",
    )


def _as_described(params: Params, task: Task, described: Mapping[str, Any]) -> Params:
    """With the changes to the config that the weights were trained with, unless it has others."""
    options = described.get("cfg_options")
    if not options or task.section(params).cfg_options:
        return params
    section = task.section(params).model_copy(update={"cfg_options": options})
    return params.model_copy(update={task.stage: section})


def _params_yaml(changes: list[str]) -> Params:
    """`params.yaml` with the changes.

    Raises:
        PipelineError: a change that is not for it, such as one of a group.
    """
    return override(load_params(), dict(map(parse_change, changes)), " ".join(changes))


def _description(weights: Path) -> dict[str, Any]:
    """What `model.json` beside the weights says of the model; empty without one."""
    file = weights.parent / DESCRIPTION
    found: dict[str, Any] = json.loads(file.read_text())["model"] if file.is_file() else {}
    return found


def _misfit(task: Task, weights: Path, params: Params, use_ema: bool) -> str | None:
    """Why the weights are not of the parameters' backbone; None if they are."""
    import timm

    import elsa

    theirs = _description(weights)
    if theirs:
        known = {*theirs, "cfg_options", "config"}  # which are left out where there are none
        ours = {key: value for key, value in task.model(params).items() if key in known}
        differing = [key for key in ours if theirs.get(key) != ours[key]]
        return f"{DESCRIPTION} has another {', '.join(differing)}" if differing else None
    whole = task.name == "classify"
    kind = {"num_classes": params.pretrain.num_classes} if whole else {"features_only": True}
    try:
        model = timm.create_model(params.model.name, **params.model.overrides(), **kind)
        _load(model, weights, use_ema)
    except (elsa.CheckpointError, TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return None


def _load(model: Any, file: Path, use_ema: bool) -> None:
    import elsa

    if any(isinstance(part, elsa.ELSASwin) for part in model.modules()):
        elsa.load_checkpoint(model, file, use_ema=use_ema)
    else:
        model.load_state_dict(elsa.read_state_dict(file, use_ema=use_ema))


def load_model(task: Task, what: Prediction, file: Path, use_ema: bool = True) -> Any:
    """The whole model with the weights of `file`.

    Raises:
        PipelineError: they don't fit; names what differs.
    """
    import elsa

    model = task.evaluation_model(what)
    try:
        _load(model, file, use_ema)
    except (elsa.CheckpointError, RuntimeError) as error:
        group = f"-S {task.stage}=<group> chooses another method and schedule"
        fix = group if (RECIPES / task.stage).is_dir() else ""
        raise PipelineError(
            f"{error}\nThe model is that of recipe {what.params.recipe}", fix
        ) from None
    return model
