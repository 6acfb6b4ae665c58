"""What every task has: its data, its training loop, its outputs, scores and pictures.

A task is one file of this folder and one line of the registry. Stages, sweeps and commands know
tasks through this class only.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.data.dataset import find_dataset
from pipelines.data.layout import LAYOUTS
from pipelines.data.store import Dataset
from pipelines.data.weights import WeightsDescription, write_weights
from pipelines.errors import PipelineError
from pipelines.params import Params, Scaling
from pipelines.paths import ROOT
from pipelines.results.outputs import Result
from pipelines.results.published import OTHER_RECIPES
from pipelines.results.tables import TaskFacts
from pipelines.train.job import Job

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from pipelines.results.scores import Scores
    from pipelines.run.stage import StageRun
    from pipelines.train.reporter import Reporter

Forward = Callable[["nn.Module", int, "torch.device"], "list[Tensor]"]
"""Outputs of a model for a number of empty images on a device, as a training step has them."""


@dataclass(frozen=True)
class Loop:
    """A task's training loop, which is imported where it runs: on the workers."""

    module: str
    """Whose function `train` it is."""
    imports: tuple[str, ...] = ()
    """What it imports only as it runs, as mmengine does what a config names."""

    def preload(self, scaling: Scaling) -> tuple[str, ...]:
        """What local workers have imported when they start. Nothing where they use a GPU: that
        those can be forked was never seen."""
        return () if scaling.use_gpu else (self.module, *self.imports)

    def __call__(self, job: Job, device: "torch.device", reporter: "Reporter") -> None:
        import_module(self.module).train(job, device, reporter)


@dataclass(frozen=True)
class Scene:
    """What a picture of the report is drawn from."""

    root: Path
    """The checkout, with all outputs of the stages."""
    datasets: Mapping[str, Dataset]
    samples: int
    """Validation images to draw."""


@dataclass(frozen=True)
class Picture:
    """A picture of the report."""

    name: str
    title: str
    caption: str
    draw: Callable[[Scene], "Figure | None"]
    """None where there is nothing to draw."""


@dataclass(frozen=True)
class Prediction:
    """What is predicted by a trained model, in an evaluation without training."""

    params: Params
    dataset: Dataset
    ms_flip: bool = False
    """With test-time augmentation: several scales, and mirrored."""

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.classes


def require_operator() -> None:
    """Check that the compiled operator fits this machine's torch and processor.

    Raises:
        PipelineError: it is not built, or built for something else; says what differs.
    """
    from ops import StaleLibraryError
    from ops.library import verify

    try:
        verify(ROOT / "build/op")
    except (FileNotFoundError, StaleLibraryError) as error:
        raise PipelineError(str(error)) from None


class Task(ABC):
    """A task of the pipeline."""

    name: ClassVar[str]
    """`classify`: what `tasks` in the parameters and `elsa evaluate --task` call it."""
    stage: ClassVar[str]
    """The stage that trains it, and its section of the parameters."""
    dataset: ClassVar[str]
    """Name of its data set."""
    title: ClassVar[str]
    """What tables call it."""
    metric: ClassVar[str]
    """What its runs are compared by, in percent."""
    reported: ClassVar[tuple[str, ...]]
    """Metrics of the results table, in order."""
    headline: ClassVar[tuple[str, ...]]
    """Metrics that the description of the weights has."""
    class_score: ClassVar[str]
    """The score of each class in `per_class.csv`."""
    loop: ClassVar[Loop]
    """What each worker runs to train."""
    loop_metric: ClassVar[str]
    """Name of the loss by step in MLflow."""
    weights: ClassVar[str]
    """File of the final weights in a run's last checkpoint."""
    model_config: ClassVar[tuple[str, str]]
    """File there from which timm, mmdet or mmseg rebuild the model, and its name in the folder of
    the weights."""
    sections: ClassVar[tuple[str, ...]]
    """Sections of the parameters that a trial of a sweep can vary."""
    epochs_can_stop: ClassVar[bool] = False
    """Whether a sweep can stop its trials after an epoch (ASHA)."""
    has_ms_flip: ClassVar[bool] = False
    """Whether it can be evaluated with test-time augmentation."""
    artifacts: ClassVar[tuple[str, ...]]
    """Outputs, files or folders, that MLflow keeps beside the weights."""
    pictures: ClassVar[tuple[Picture, ...]]

    def section(self, params: Params) -> Any:
        """The task's own parameters."""
        return getattr(params, self.stage)

    def find_dataset(self, params: Params) -> Dataset:
        """The data set that `prepare` verified.

        Raises:
            DataError: it is not there, or has other classes than the parameters say.
        """
        return find_dataset(params, self.dataset, self.section(params).num_classes)

    @property
    def public_classes(self) -> int:
        """Classes of the public data set: results on others are compared with nothing."""
        return LAYOUTS[self.dataset].classes

    def facts(self, params: Params) -> TaskFacts:
        """What tables of results need to know."""
        public = not params.model.overrides() and params.recipe not in OTHER_RECIPES
        public = public and self.section(params).num_classes == self.public_classes
        return TaskFacts(
            self.name,
            self.stage,
            self.title,
            self.reported,
            params.model.name if public else "",
            self.published_as(params),
            self.section(params).epochs == 0,
        )

    @abstractmethod
    def check(self, params: Params) -> Job:
        """Look at everything that a training needs, before anything starts.

        Raises:
            PipelineError: what is missing or does not fit.
        """

    def trial(self, job: Job, params: Params) -> Job:
        """The job of a trial with other parameters; `job` is `check`'s of the sweep."""
        return Job(self.stage, params, job.dataset, job.weights, job.flops)

    def check_for_trials(self, params: Params) -> Job:
        """Like `check`, with all that any trial of a sweep may need."""
        return self.check(params)

    def for_probe(self, params: Params) -> Params:
        """The parameters of a training that only shows how long it takes."""
        return params

    @abstractmethod
    def evaluated_images(self, params: Params, dataset: Dataset) -> tuple[float, float]:
        """How many images are evaluated where an epoch is, and in the whole training."""

    @abstractmethod
    def result(self, folder: Path) -> Result:
        """What a run ended with, from its last checkpoint."""

    @abstractmethod
    def write_results(self, run: "StageRun", folder: Path, job: Job) -> None:
        """Write `results/<stage>` and `plots/<stage>` from the last checkpoint in `folder`."""

    def write_weights(
        self, checkpoint: Path, folder: Path, description: WeightsDescription
    ) -> WeightsDescription:
        """Write the folder of the final weights in a run's last checkpoint; its description."""
        from safetensors.torch import load_file

        written = write_weights(folder, load_file(str(checkpoint / self.weights)), description)
        source, name = self.model_config
        shutil.copy(checkpoint / source, folder / name)
        return written

    @abstractmethod
    def write_model_config(self, folder: Path, what: Prediction) -> None:
        """Write what timm, mmdet or mmseg rebuild the model from into the folder of its weights."""

    def hand_on(self, params: Params, root: Path) -> None:  # noqa: B027  most have nothing
        """Where `tasks` leaves this task out: write below `root` what other tasks start from."""

    @abstractmethod
    def epoch_score(self, params: Params) -> str:
        """The metric of an epoch that epochs and points of a sweep are chosen by."""

    def model(self, params: Params) -> dict[str, Any]:
        """What rebuilds the model, for the description of its weights."""
        return params.model.model_dump(mode="json")

    def upstream(self, job: Job) -> WeightsDescription | None:
        """The description of the weights that a training starts from, if a stage made them."""
        return None

    def choice(self, params: Params) -> str:
        """A sentence on how the reported weights were chosen; empty if they are the last ones."""
        return ""

    def published_as(self, params: Params) -> dict[str, str]:
        """Which published rows of the model belong to these parameters, beside the task."""
        return {}

    @abstractmethod
    def step_model(self, params: Params) -> "tuple[nn.Module, Forward]":
        """The model, and how a training step calls it."""

    @abstractmethod
    def evaluation_model(self, what: Prediction) -> "nn.Module":
        """The whole model, without weights."""

    @abstractmethod
    def predict(
        self,
        what: Prediction,
        state: "Mapping[str, Tensor]",
        device: "torch.device",
        reporter: "Reporter",
        folder: Path,
    ) -> None:
        """Predict the validation images into `folder`, on each worker; rank 0 writes."""

    @abstractmethod
    def score(self, what: Prediction, folder: Path) -> "Scores":
        """Scores of the predictions in `folder`, which then holds them in the public format."""

    @abstractmethod
    def draw_samples(self, what: Prediction, folder: Path) -> "Figure":
        """Some validation images with the predictions in `folder`."""
