"""The least that a stage's first step takes: its Ray, MLflow run, workers and libraries.

For `pipelines.benchmarks.startup`, as the limit of a start: no data, no checks of them, no
identity, a model of one layer. On loopback, as each local run.
"""

import importlib
import os
import sys
import tempfile
from pathlib import Path

from pipelines.params import compose
from pipelines.run import tracking
from pipelines.run.fit import RunSpec, fit
from pipelines.run.session import ray_session, storage_path
from pipelines.run.trace import mark
from pipelines.train.reporter import Reporter

LIBRARIES = {"pretrain": ["timm"], "detect": ["mmdet.apis"], "segment": ["mmseg.apis"]}


def loop(stage: str, device: object, reporter: Reporter) -> None:
    """Import what the stage's loop imports, and make one step."""
    import torch

    for name in LIBRARIES[stage]:
        importlib.import_module(name)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.zeros(2, 8)).sum().backward()
    torch.distributed.all_reduce(model.weight.grad)
    optimizer.step()
    mark("first step")
    with tempfile.TemporaryDirectory() as folder:  # a run without a checkpoint has failed
        (Path(folder) / "state").touch()
        reporter.keep(Path(folder))


def main() -> None:
    """Run it with the libraries of the stage that the command names, on the recipe's workers."""
    stage = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        params = compose(["recipe=smoke", f"storage.path={folder}/storage"])
        with ray_session(preload=("torch", *LIBRARIES[stage])) as session:
            spec = RunSpec(
                stage=stage,
                name=f"{stage}-smallest",
                mlflow_run_id=tracking.start_run(stage, "smallest", {}).run_id,
                scaling=params.scaling,
                storage=storage_path(params),
                data={},
                local=session.local,
            )
            fit(loop, stage, spec)


if __name__ == "__main__":
    main()
