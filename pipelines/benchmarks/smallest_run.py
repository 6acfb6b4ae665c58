"""The least that a training step by Ray Train takes with the libraries of a stage.

For `pipelines.benchmarks.startup`, as the limit of what a stage's start can take: no data, no
checks, no operator, a model of one layer, the process group and the MLflow run of any stage.
"""

import sys
import tempfile

import mlflow
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model

from pipelines.run.trace import mark

LIBRARIES = {"pretrain": ["timm"], "detect": ["mmdet.apis"], "segment": ["mmseg.apis"]}


def step(config: dict) -> None:
    """Import what a stage's loop imports, and make one step."""
    import importlib

    import torch

    for name in config["libraries"]:
        importlib.import_module(name)
    model = prepare_model(torch.nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.zeros(2, 8)).sum().backward()
    optimizer.step()
    if torch.distributed.get_rank() == 0:
        mark("first step")


def main() -> None:
    """Run it with the libraries of the stage that the command names, on two workers."""
    with tempfile.TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        with mlflow.start_run():
            ray.init("local", include_dashboard=False, log_to_driver=False)
            TorchTrainer(
                step,
                train_loop_config={"libraries": LIBRARIES[sys.argv[1]]},
                scaling_config=ScalingConfig(num_workers=2),
                run_config=RunConfig(storage_path=folder),
                torch_config=TorchConfig(backend="gloo"),
            ).fit()


if __name__ == "__main__":
    main()
