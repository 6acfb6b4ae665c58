"""What detection and segmentation share: mmengine's loop, started from the pretrained weights."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.data.files import sha256_file
from pipelines.data.weights import (
    DESCRIPTION,
    PRETRAINED,
    TENSORS,
    WeightsDescription,
    check_architecture,
    read_description,
    weights_file,
)
from pipelines.errors import PipelineError
from pipelines.params import Params, flatten
from pipelines.paths import ROOT
from pipelines.results.outputs import Result, dense_result, write_dense
from pipelines.tasks.task import Loop, Prediction, Task
from pipelines.train.job import Job

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pipelines.data.store import Dataset
    from pipelines.run.stage import StageRun
    from pipelines.train.reporter import Reporter


def dense_loop(package: str) -> Loop:
    """`pipelines.mm.train`, with what it imports of mmdet or mmseg."""
    ours = ("pipelines.mm.labels",) if package == "mmseg" else ()
    parts = ("models", "datasets", "engine", "evaluation", "visualization")
    return Loop("pipelines.mm.train", (*ours, *(f"{package}.{part}" for part in parts)))


class DenseTask(Task):
    """A task that mmengine trains, in `pipelines.mm.train`."""

    loop_metric: ClassVar[str] = "train/loss"
    weights: ClassVar[str] = "model.safetensors"
    model_config: ClassVar[tuple[str, str]] = ("inference.py", "config.py")

    def check(self, params: Params) -> Job:
        from pipelines.mm.checks import check_model, check_norms, synchronised
        from pipelines.mm.config import build_config

        weights, given = None, self.given_weights(params)
        if given == PRETRAINED:
            check_architecture(_pretrained(params), params.model.model_dump(mode="json"))
        if given:
            weights = str(weights_file(given).absolute())
        job = Job(self.stage, params, self.find_dataset(params), weights)
        config = build_config(job, ROOT)
        check_norms(config, job)
        require_a_share_of_each_worker(job)
        if self.has_changed_config(params):
            check_model(job)
        if given and given != PRETRAINED:
            _check_backbone(config.model.backbone, f"{self.stage}.weights={given}")
        if given and self.section(params).init_from == "model":
            from pipelines.mm.start import find_start

            start = find_start(job, config.model, config.default_scope)
            print(f"{self.stage}.weights={given}: {start}", flush=True)
        # What a step of an unknown model computes is not known.
        if params.scaling.use_gpu and self.section(params).method != "config":
            from pipelines.train.cost import model_flops

            flops = model_flops(*self.step_model(params))
            job = replace(job, flops=flops)
        elastic = not _unknown_parts(self.section(params)) and not synchronised(config)
        return replace(job, elastic=elastic)

    def given_weights(self, params: Params) -> str | None:
        """The weights to start from, as they are given; None starts from random ones.

        Raises:
            PipelineError: some are named, and would not be used.
        """
        section = self.section(params)
        if section.pretrained:
            return str(section.weights)
        if section.weights != PRETRAINED:
            raise PipelineError(
                f"{self.stage}.weights={section.weights} would not be used, as"
                f" {self.stage}.pretrained is false",
                f"Set {self.stage}.pretrained=true, or leave out the weights",
            )
        return None

    def require_known_method(self, params: Params) -> None:
        """Check that the method is one of the project's, whose steps are known.

        Raises:
            PipelineError: it is a config of the user's own.
        """
        section = self.section(params)
        if section.method == "config":
            raise PipelineError(
                f"what a step of {self.stage}.config={section.config} computes is not known, so"
                " that neither `elsa plan` nor a sweep can tell its cost",
                f"Choose a method with `elsa compose {self.stage}=...`",
            )

    def has_changed_config(self, params: Params) -> bool:
        """Whether the mm config is another than the project's."""
        section = self.section(params)
        return section.method == "config" or bool(section.cfg_options)

    def check_for_trials(self, params: Params) -> Job:
        # With pretrained weights, whether a trial uses them or not.
        section = self.section(params).model_copy(update={"pretrained": True})
        return self.check(params.model_copy(update={self.stage: section}))

    def trial(self, job: Job, params: Params) -> Job:
        section = self.section(params)
        weights = job.weights if section.pretrained else None
        return Job(self.stage, params, job.dataset, weights, job.flops)

    def for_probe(self, params: Params) -> Params:
        section = self.section(params)
        changes: dict[str, Any] = {"val_interval": 1}  # so that it sees an evaluation
        if section.pretrained and not Path(ROOT / section.weights).exists():
            changes |= {"pretrained": False, "weights": PRETRAINED}  # which takes as long
        return params.model_copy(update={self.stage: section.model_copy(update=changes)})

    def evaluated_images(self, params: Params, dataset: "Dataset") -> tuple[float, float]:
        from pipelines.mm.config import build_config

        section, each = self.section(params), dataset.counts["val"]
        evaluations = -(-section.epochs // section.val_interval)
        config = build_config(Job(self.stage, params, dataset), Path())
        return each, each * (evaluations + _augmented_area(config))

    def result(self, folder: Path) -> Result:
        return dense_result(folder)

    def write_results(self, run: "StageRun", folder: Path, job: Job) -> None:
        write_dense(folder, run.output(f"results/{self.stage}"), run.output(f"plots/{self.stage}"))

    def epoch_score(self, params: Params) -> str:
        return self.metric

    def write_model_config(self, folder: Path, what: Prediction) -> None:
        from pipelines.mm.config import build_config
        from pipelines.mm.inference import inference_config

        config = build_config(Job(self.stage, what.params, what.dataset), Path())
        inference_config(config).dump(folder / self.model_config[1])

    def model(self, params: Params) -> dict[str, Any]:
        section = self.section(params)
        found = {"method": section.method, "schedule": section.schedule}
        if section.cfg_options:
            found["cfg_options"] = section.cfg_options
        if section.method == "config":
            found["config"] = section.config
        return super().model(params) | found

    def upstream(self, job: Job) -> WeightsDescription | None:
        if not job.weights:
            return None
        file = Path(job.weights)
        if file.name == TENSORS and (file.parent / DESCRIPTION).is_file():
            return read_description(file.parent)
        digest = sha256_file(file)
        return WeightsDescription(
            super().model(job.params),
            identity=digest[:12],
            mlflow_run_id="",
            metrics={},
            sha256=digest,
        )

    def published_as(self, params: Params) -> dict[str, str]:
        section = self.section(params)
        # With other options it is nobody's but the user's.
        schedule = f"{section.schedule}, changed" if section.cfg_options else section.schedule
        return {"method": section.method, "schedule": schedule}

    def evaluation_model(self, what: Prediction) -> "nn.Module":
        from pipelines.mm.evaluation import build_model

        model: nn.Module = build_model(Job(self.stage, what.params, what.dataset))
        return model

    def predict(
        self,
        what: Prediction,
        state: "Mapping[str, Tensor]",
        device: "torch.device",
        reporter: "Reporter",
        folder: Path,
    ) -> None:
        from pipelines.mm.evaluation import predict

        predict(Job(self.stage, what.params, what.dataset), state, what.ms_flip, folder, reporter)

    def build(self, params: Params) -> "nn.Module":
        """The whole model that the parameters name, for a count of its cost."""
        from mmengine.registry import MODELS

        from pipelines.data.store import Dataset
        from pipelines.mm.config import build_config, use

        classes = tuple(str(i) for i in range(self.section(params).num_classes))
        job = Job(self.stage, params, Dataset(self.dataset, "", classes, {}, ""))
        config = build_config(job, Path("unused"))
        use(config)
        model: nn.Module = MODELS.build(config.model)
        return model


def require_a_share_of_each_worker(job: Job) -> None:
    """Check that the workers pass through a model of the user's own equally often.

    Raises:
        PipelineError: they do not, and would wait for each other where its losses are averaged over
            all of them, as DINO's are.
    """
    section, workers = job.section, job.params.scaling.num_workers
    unknown = _unknown_parts(section)
    if unknown and workers > 1 and section.shares != workers:
        raise PipelineError(
            f"{job.stage}.{unknown}: losses of such a model can be averaged over the workers, so"
            f" {job.stage}.shares={section.shares} and scaling.num_workers={workers} must be equal",
            f"Set {job.stage}.shares={workers}, or use one worker",
        )


def _unknown_parts(section: Any) -> str:
    """The key that gives the model parts which the project does not know; empty if none does."""
    if section.method == "config":
        return f"config={section.config}"
    for key in flatten(section.cfg_options):
        if key.startswith("model.") and key.endswith(".type"):
            return f"cfg_options.{key}"
    return ""


def _augmented_area(config: Any) -> float:
    """Pixels of an image that the evaluation with test-time augmentation after the last epoch
    looks at, as a multiple of those of the usual one; 0 where there is none. A size that a config
    of one's own does not tell counts as the usual one."""
    from pipelines.mm.config import test_time_augmentation

    if test_time_augmentation(config) is None:
        return 0.0
    steps = config.val_dataloader.dataset.get("pipeline", [])
    usual = next((step["scale"] for step in steps if isinstance(step.get("scale"), tuple)), None)

    def size(choice: Mapping[str, Any]) -> float:
        if usual and isinstance(choice.get("scale"), tuple):
            return float(math.prod(choice["scale"]) / math.prod(usual))
        return float(choice.get("scale_factor", 1.0)) ** 2

    area = 1.0
    for step in config.get("tta_pipeline", []):
        for choices in step.get("transforms", []):
            area *= sum(map(size, choices))
    return area


def _pretrained(params: Params) -> WeightsDescription:
    """The description of the pretrained weights.

    Raises:
        PipelineError: there are none, or they were changed.
    """
    if "classify" not in params.tasks and not params.pretrain.weights:
        raise PipelineError(
            "there are no pretrained weights: `tasks` leaves out classify, and pretrain.weights is"
            " null",
            "Set the stage's own `weights` to a checkpoint, or pretrained=false for random ones",
        )
    return read_description(ROOT / PRETRAINED)


def _check_backbone(backbone: Any, given: str) -> None:
    """Load the weights once, so that a fault is told before Ray starts.

    Raises:
        PipelineError: they are not of this backbone.
    """
    from mmengine.registry import MODELS

    import elsa.mm

    try:
        MODELS.build(backbone).init_weights()
    except (elsa.CheckpointError, RuntimeError, ValueError) as error:
        raise PipelineError(f"{given}: {error}", "Choose the model that they are of") from None


def tensors(value: Any) -> "list[Tensor]":
    """All tensors in nested lists and tuples."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors(item)]
