"""How much faster several workers are: images/s of each training stage, each with its own images.

    python -m pipelines.benchmarks.scaling --workers 2

One worker, and then several with as many images each per step, train two epochs on a local Ray, on
the prepared data; the second epoch counts. `efficiency` is the images/s of several workers over
those of one times their number. `exposed` is the time of a step in which a worker waits for the
others' gradients after its backward passes.
`elsa plan` estimates the same for GPUs and their links.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pipelines.benchmarks.common import (
    STAGES,
    Noted,
    markdown,
    params_of,
    parser_of,
    scratch_tracking,
    spec_of,
    training,
)
from pipelines.errors import PipelineError
from pipelines.params import Params
from pipelines.tasks import task_of_stage


def noted(given: Noted, device: Any, reporter: Any) -> None:
    """A stage's training loop that also writes the metrics of each epoch to a file."""
    kind = type(reporter)
    save = kind.save

    def saved(self: Any, metrics: Any, epoch: int, folder: Path | None) -> None:
        save(self, metrics, epoch, folder)
        if self.rank == 0:
            with Path(given.notes).open("a") as file:
                file.write(json.dumps(dict(metrics)) + "\n")

    kind.save = saved
    task_of_stage(given.job.stage).loop(given.job, device, reporter)


def measure(stage: str, params: Params, scratch: Path) -> dict[str, float]:
    """Metrics of the last epoch of a stage."""
    from pipelines.run import tracking
    from pipelines.run.fit import fit

    name, job = f"{stage}-{params.scaling.num_workers}", training(stage, params)
    tracker = tracking.start_run(stage, "benchmark", {})
    notes = scratch / name
    fit(noted, Noted(job, str(notes)), spec_of(job, f"{name}-scaling", tracker.run_id))
    metrics: dict[str, float] = json.loads(notes.read_text().splitlines()[-1])
    return metrics


def compare(stage: str, recipe: Params, workers: int, scratch: Path) -> dict[str, str]:
    """One row of the table."""
    model, _ = task_of_stage(stage).step_model(recipe)
    gradients = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    each = getattr(recipe, stage).batch_size // recipe.scaling.num_workers
    found = []
    for count in (1, workers):
        values = recipe.model_dump()
        values["scaling"]["num_workers"] = count
        short = {"epochs": 2, "warmup_epochs": 0, "val_interval": 2, "milestones": []}
        values[stage] |= {key: value for key, value in short.items() if key in values[stage]}
        values[stage] |= {"batch_size": each * count, "shares": count}
        found.append(measure(stage, Params.model_validate(values), scratch))
        print(f"{stage}, workers {count}: {found[-1]['images_per_second']:.1f} img/s", flush=True)
    one, several = found
    return {
        "stage": stage,
        "images per worker": str(each),
        "img/s of 1": f"{one['images_per_second']:.1f}",
        f"img/s of {workers}": f"{several['images_per_second']:.1f}",
        "efficiency": f"{several['images_per_second'] / one['images_per_second'] / workers:.0%}",
        "gradients MB": f"{gradients / 1e6:.1f}",
        "exposed ms": f"{several['communication_ms']:.1f}",
    }


def main() -> None:
    from pipelines.run.session import ray_session

    parser = parser_of("scaling", __doc__)
    parser.add_argument("--workers", type=int, default=2, help="default %(default)s")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    arguments = parser.parse_args()
    with scratch_tracking() as scratch:
        try:
            if arguments.workers < 2:
                raise PipelineError("--workers must be 2 or more")
            recipe = params_of(arguments.set, {"storage.path": str(scratch)})
            with ray_session():
                rows = [
                    compare(stage, recipe, arguments.workers, scratch) for stage in arguments.stages
                ]
        except PipelineError as error:
            sys.exit(f"error: {error}")
    print(f"\nrecipe {recipe.recipe}, {recipe.scaling.cpus_per_worker} CPUs per worker")
    print(markdown(rows))


if __name__ == "__main__":
    main()
