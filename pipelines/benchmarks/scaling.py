"""How much faster several workers are: images/s of each training stage, each with its own images.

    python -m pipelines.benchmarks.scaling --workers 2

One worker, and then several with as many images each per step, train two epochs on a local Ray, on
the prepared data; the second epoch counts. `efficiency` is the images/s of several workers over
those of one times their number. `all-reduce` is the time of a step from the first gradients' to
the last's (DDP's log), `exposed` the part of it that the backward pass does not hide.
`pipelines.commands.plan` estimates the same for GPUs and their links.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipelines.benchmarks.recovery import STAGES, loop_of, markdown
from pipelines.errors import PipelineError
from pipelines.params import Params, load_params, parse_change


def noted(config: dict[str, Any]) -> None:
    """A stage's training loop that also writes the metrics of each epoch to a file."""
    from pipelines.run.reporter import RayReporter

    save = RayReporter.save

    def saved(self: Any, metrics: Any, epoch: int, folder: Path | None) -> None:
        save(self, metrics, epoch, folder)
        if self.rank == 0:
            with Path(config["notes"]).open("a") as file:
                file.write(json.dumps(dict(metrics)) + "\n")

    RayReporter.save = saved  # type: ignore[method-assign]
    config["loop"](config)


def measure(stage: str, params: Params, scratch: Path) -> dict[str, float]:
    """Metrics of the last epoch of a stage."""
    from pipelines.run import fit as launch
    from pipelines.run import tracking

    name = f"{stage}-{params.scaling.num_workers}"
    config, data = loop_of(stage, params)
    tracker = tracking.start_run(stage, "benchmark", {})
    launch.fit(
        noted,
        config | {"notes": str(scratch / name)},
        params,
        name=f"{name}-scaling",
        mlflow_run_id=tracker.run_id,
        data=data,
    )
    return json.loads((scratch / name).read_text().splitlines()[-1])


def compare(stage: str, recipe: Params, workers: int, scratch: Path) -> dict[str, str]:
    """One row of the table."""
    from pipelines.commands.plan import model_of

    model, _ = model_of(recipe, stage)
    gradients = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    each = getattr(recipe, stage).batch_size // recipe.scaling.num_workers
    found = []
    for count in (1, workers):
        values = recipe.model_dump()
        values["scaling"]["num_workers"] = count
        short = {"epochs": 2, "warmup_epochs": 0, "val_interval": 2, "milestones": []}
        values[stage] |= {key: value for key, value in short.items() if key in values[stage]}
        values[stage]["batch_size"] = each * count
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
        "all-reduce ms": f"{several['all_reduce_ms']:.1f}",
        "exposed ms": f"{several['communication_ms']:.1f}",
    }


def main() -> None:
    from pipelines.run import fit as launch

    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.benchmarks.scaling", description=description
    )
    parser.add_argument("--workers", type=int, default=2, help="default %(default)s")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("-S", dest="set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{scratch / 'mlflow.db'}"
        changes = dict(parse_change(text) for text in arguments.set)
        try:
            if arguments.workers < 2:
                raise PipelineError("--workers must be 2 or more")
            recipe = load_params(changes=changes | {"storage.path": folder})
            with launch.ray_session():
                rows = [
                    compare(stage, recipe, arguments.workers, scratch) for stage in arguments.stages
                ]
        except PipelineError as error:
            sys.exit(f"error: {error}")
    print(f"\nrecipe {recipe.recipe}, {recipe.scaling.cpus_per_worker} CPUs per worker")
    print(markdown(rows))


if __name__ == "__main__":
    main()
