"""An ablation or search over a training stage: trials of a space, compared over their seeds."""

import os

from pipelines.params import Params
from pipelines.run.stage import Stage, StageRun, run_stage
from pipelines.sweeps.plan import Plan, make_plan
from pipelines.sweeps.space import NONE, load_space
from pipelines.tasks import task_of_stage


def check(params: Params) -> Plan | None:
    return None if params.sweep.space == NONE else make_plan(params)


def preload(params: Params) -> tuple[str, ...]:
    if params.sweep.space == NONE:
        return ()
    stage = load_space(params.sweep.space).stage
    return task_of_stage(stage).loop.preload(params.scaling)


def run(stage: StageRun, plan: Plan | None) -> None:
    from pipelines.run.budget import counted
    from pipelines.run.session import at_once, storage_path
    from pipelines.sweeps.findings import write_findings
    from pipelines.sweeps.queue import Trials
    from pipelines.sweeps.tuning import Tuning, run_trials

    folder = stage.output("sweeps")
    folder.mkdir(parents=True)
    if plan is None:
        stage.tracker.set_tags({"space": NONE})
        (folder / "README.md").write_text(
            "Nothing was swept: `sweep.space` is `none`. Choose a space, as in"
            " `dvc exp run sweep -S sweep.space=ghost_head`.\n"
        )
        stage.write_metrics({"trials": 0}, space=NONE)
        return
    stage.tracker.set_tags({"space": stage.section.space, "reference": plan.reference})
    dataset = plan.job.dataset
    stage.tracker.log_dataset(dataset.name, dataset.digest, dataset.place, "training")
    concurrent = at_once("sweep", plan.largest, {dataset.name: dataset.place})
    trials = Trials(stage, plan, concurrent)
    asha = trials.asha
    tuning = Tuning(
        task=plan.task.name,
        job=plan.job,
        name=stage.run_name,
        storage=storage_path(stage.params),
        local=stage.session.local,
        concurrent=concurrent,
        metric=trials.score,
        asha=(asha.grace_epochs, asha.reduction_factor, plan.base.epochs) if asha else None,
    )
    try:
        with counted(stage.state, stage.folder):
            run_trials(trials, tuning)
    finally:
        trials.close()
    stage.unfinished = bool(trials.spent)
    write_findings(stage, plan, trials, folder)


STAGE = Stage("sweep", __doc__ or "", run, check, preload=preload, trains=True, trials=True)

if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    run_stage(STAGE)
