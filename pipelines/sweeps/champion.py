"""The best point of a sweep: its parameters, and its weights as a registered model with a card."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipelines.data.weights import WeightsDescription
from pipelines.errors import PipelineError
from pipelines.params import nested
from pipelines.run import tracking
from pipelines.run.fit import last_checkpoint
from pipelines.run.session import storage_path
from pipelines.run.stage import StageRun
from pipelines.sweeps.plan import Plan
from pipelines.sweeps.queue import Outcome


@dataclass(frozen=True)
class Champion:
    """The best point, and the trial of its best seed."""

    outcome: Outcome
    row: Mapping[str, Any]
    """The point in the comparison."""
    points: int
    """Among how many it was chosen."""
    score: str
    """The metric that it was chosen by."""


def best_yaml(stage: StageRun, plan: Plan, champion: Champion) -> str:
    """The parameters that make the best point, as a file to use again."""
    values = {**plan.space.fixed, **champion.outcome.trial.point}
    text = io.StringIO()
    YAML().dump(nested(values), text)
    options = " ".join(f"-S '{k}={json.dumps(v)}'" for k, v in values.items())
    return (
        f"# The best point of sweep {stage.section.space} (recipe {stage.params.recipe}) by"
        f" {champion.score}, the mean over {champion.row['runs']} seeds.\n"
        "# Into params.yaml or a recipe, or as options:\n"
        f"#   dvc exp run {plan.task.stage} {options}\n{text.getvalue()}"
    )


def register_champion(stage: StageRun, plan: Plan, champion: Champion, folder: Path) -> str:
    """Export and register the champion's weights, with a model card; its name and version.

    Raises:
        PipelineError: its checkpoint is gone.
    """
    outcome, trial, metric = champion.outcome, champion.outcome.trial, plan.task.metric
    checkpoint = last_checkpoint(outcome.run_name, storage_path(trial.params))
    if checkpoint is None:
        raise PipelineError(f"the checkpoint of {outcome.run_name} is gone from the storage")
    description = WeightsDescription(
        model=plan.task.model(trial.params),
        identity=trial.identity,
        mlflow_run_id=outcome.run_id,
        metrics={metric: champion.row["seeds"][str(trial.seed)]},
        classes=plan.job.dataset.classes,
    )
    with checkpoint.as_directory() as source:
        description = plan.task.write_weights(Path(source), folder / "champion", description)
    git = tracking.git_tags()
    name = f"elsa-{stage.params.recipe}-{stage.section.space}"
    card = _card(stage, plan, champion, name, description.sha256)
    (folder / "champion" / "README.md").write_text(card)
    tags = {
        "sha256": description.sha256,
        "identity": trial.identity,
        "sweep_run_id": stage.tracker.run_id,
        "space": stage.section.space,
        "data_digest": plan.job.dataset.digest,
        **git,
    }
    tracker = tracking.Tracker(outcome.run_id)
    version = tracking.register(name, "champion", tracker, folder / "champion", card, tags)
    return f"{name} version {version}"


def _card(stage: StageRun, plan: Plan, champion: Champion, name: str, sha256: str) -> str:
    outcome, trial, row = champion.outcome, champion.outcome.trial, champion.row
    params, dataset, metric = trial.params, plan.job.dataset, plan.task.metric
    spread = "" if row["ci95"] is None else f" ± {row['ci95']:.1f} (95%)"
    demo = " The images are the demo's." if params.prepare.source == "demo" else ""
    commit = tracking.git_tags().get("mlflow.source.git.commit", "unknown")[:12]
    return f"""# {name}

{params.model.name} with {trial.label}, the best of {champion.points} points of sweep
`{stage.section.space}` by {champion.score}, a mean over seeds; these are its best seed's weights.

- Data: {", ".join(f"{k} {v}" for k, v in dataset.counts.items())} images,
  {len(dataset.classes)} classes, digest {dataset.digest[:12]}.
- Recipe: `{stage.params.recipe}` with {json.dumps({**plan.space.fixed, **trial.point})}, seed
  {trial.seed}; all parameters are in `params.json` of run {outcome.run_id}.
- {metric} on the validation images: {row["seeds"][str(trial.seed)]:.1f} with this seed;
  {row["mean"]:.1f}{spread} over {row["runs"]} seeds.
- Limits: chosen among {champion.points} points and {row["runs"]} seeds, so expect a
  little less on new images.{demo}
- Lineage: sweep run {stage.tracker.run_id}, trial run {outcome.run_id}, identity
  {trial.identity}, commit {commit}, SHA-256 {sha256}.
"""
