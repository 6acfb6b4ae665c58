"""The stage that trains a task: a Ray Train run, and the outputs from its last checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.data.weights import WeightsDescription
from pipelines.run.quotes import quoted
from pipelines.run.stage import Stage, StageRun
from pipelines.tasks.task import Task
from pipelines.train.job import Job

if TYPE_CHECKING:
    from pipelines.run.fit import RunSpec


def training_stage(task: Task, about: str) -> Stage:
    """The stage that trains `task`, for `run_stage`."""

    def run(stage_run: StageRun, job: Job) -> None:
        from pipelines.run.budget import within_budget
        from pipelines.run.fit import fit

        _log_inputs(task, stage_run, job)
        with within_budget(stage_run.params, stage_run.state, stage_run.folder) as left_s:
            checkpoint = fit(task.loop, job, _spec(task, stage_run, job, left_s))
        with checkpoint.as_directory() as folder:
            write_outputs(task, stage_run, Path(folder), job)
        _log_outputs(task, stage_run)

    def export(stage_run: StageRun, job: Job) -> bool:
        from pipelines.run.fit import last_checkpoint
        from pipelines.run.session import storage_path

        checkpoint = last_checkpoint(stage_run.run_name, storage_path(stage_run.params))
        if checkpoint is None:
            return False
        with checkpoint.as_directory() as folder:
            if not (Path(folder) / task.weights).is_file():
                return False
            write_outputs(task, stage_run, Path(folder), job)
        return True

    return Stage(
        task.stage,
        about,
        run,
        check=task.check,
        export=export,
        included=lambda params: task.name in params.tasks,
        hand_on=task.hand_on,
        preload=lambda params: task.loop.preload(params.scaling),
        trains=True,
    )


def _spec(task: Task, run: StageRun, job: Job, left_s: float) -> "RunSpec":
    from pipelines.run.fit import RunSpec
    from pipelines.run.session import storage_path

    return RunSpec(
        stage=run.name,
        name=run.run_name,
        mlflow_run_id=run.mlflow_run_id,
        scaling=run.params.scaling,
        storage=storage_path(run.params),
        data={task.dataset: job.dataset.place},
        local=run.session.local,
        stops=True,
        elastic=job.elastic,
        keep_checkpoints=run.params.storage.keep_checkpoints,
        stop_after_s=left_s,
    )


def _log_inputs(task: Task, run: StageRun, job: Job) -> None:
    if upstream := task.upstream(job):
        run.tracker.set_tags(
            {"upstream_weights": upstream.sha256, "upstream_run_id": upstream.mlflow_run_id}
        )
    data = job.dataset
    run.tracker.log_dataset(task.dataset, data.digest, data.place, "training")


def write_outputs(task: Task, run: StageRun, folder: Path, job: Job) -> None:
    """All outputs of the stage, from the last checkpoint in `folder`."""
    result = task.result(folder)
    task.write_results(run, folder, job)
    task.write_weights(
        folder,
        run.output(f"weights/{task.stage}"),
        WeightsDescription(
            model=task.model(run.params),
            identity=run.identity,
            mlflow_run_id=run.mlflow_run_id,
            metrics={key: result.metrics[key] for key in task.headline if key in result.metrics},
            upstream=task.upstream(job),
            classes=job.dataset.classes,
        ),
    )
    metrics = {**result.metrics, **quoted(task.stage, run.params)}
    run.write_metrics(metrics, **_chain(folder))


def _chain(checkpoint: Path) -> dict[str, str]:
    """A digest of what the training came to after each of its epochs, for `elsa verify`."""
    from pipelines.train.replay import chain_digest, read_chain

    return {"chain": chain_digest(read_chain(checkpoint))}


def _log_outputs(task: Task, run: StageRun) -> None:
    model = task.model(run.params)
    run.tracker.log_model(task.stage, run.output(f"weights/{task.stage}"), model)
    for path in task.artifacts:
        run.tracker.log_artifact(run.output(path))
