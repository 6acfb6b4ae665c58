"""Classification on ImageNet's layout, which the stage `pretrain` trains."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pipelines.data.files import sha256_file
from pipelines.data.store import Dataset
from pipelines.data.weights import PRETRAINED, WeightsDescription, weights_file, write_weights
from pipelines.params import Params
from pipelines.results.outputs import (
    Result,
    classification_result,
    read_predictions,
    write_classification,
)
from pipelines.tasks.task import (
    Forward,
    Loop,
    Picture,
    Prediction,
    Scene,
    Task,
)
from pipelines.train.job import Job

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from pipelines.results.scores import Scores
    from pipelines.run.stage import StageRun
    from pipelines.train.reporter import Reporter


class Classify(Task):
    """timm's classifier, trained by `pipelines.train.classify`."""

    name: ClassVar[str] = "classify"
    stage: ClassVar[str] = "pretrain"
    dataset: ClassVar[str] = "imagenet"
    title: ClassVar[str] = "classification (ImageNet layout)"
    metric: ClassVar[str] = "top1"
    reported: ClassVar[tuple[str, ...]] = ("top1", "top5")
    headline: ClassVar[tuple[str, ...]] = ("top1", "top5", "loss")
    class_score: ClassVar[str] = "top1"
    loop: ClassVar[Loop] = Loop("pipelines.train.classify")
    loop_metric: ClassVar[str] = "step/loss"
    weights: ClassVar[str] = "best.safetensors"
    model_config: ClassVar[tuple[str, str]] = ("config.json", "config.json")
    sections: ClassVar[tuple[str, ...]] = ("model", "pretrain", "scaling")
    epochs_can_stop: ClassVar[bool] = True
    artifacts: ClassVar[tuple[str, ...]] = ("results/pretrain", "plots/pretrain")

    def check(self, params: Params) -> Job:
        weights = params.pretrain.weights
        if weights:
            from pipelines.train.models import build_model, load_weights

            # Here, so that a fault is told before Ray starts; each worker loads them for itself.
            load_weights(build_model(params.model, params.pretrain.num_classes), params.pretrain)
        dataset = self.find_dataset(params)
        if params.pretrain.teacher:
            from pipelines.train.distillation import load_teacher

            load_teacher(params.pretrain, dataset.classes)
        file = str(weights_file(weights)) if weights else None
        return Job(self.stage, params, dataset, file)

    def evaluated_images(self, params: Params, dataset: Dataset) -> tuple[float, float]:
        p, val = params.pretrain, dataset.counts["val"]
        each = dataset.counts["train"] * p.holdout or val
        return each, (p.epochs + p.cooldown_epochs) * each + val

    def result(self, folder: Path) -> Result:
        return classification_result(folder)

    def write_results(self, run: "StageRun", folder: Path, job: Job) -> None:
        results, plots = run.output("results/pretrain"), run.output("plots/pretrain")
        write_classification(folder, results, plots, job.dataset.classes)

    def hand_on(self, params: Params, root: Path) -> None:
        p = params.pretrain
        if not p.weights:
            return
        from pipelines.train.models import build_model, load_weights

        model = build_model(params.model, p.num_classes)
        load_weights(model, p)
        identity = sha256_file(weights_file(p.weights))[:12]
        described = WeightsDescription(self.model(params), identity, "", {})
        write_weights(root / PRETRAINED, model.state_dict(), described)
        nowhere = Dataset(self.dataset, "", (), {}, "")
        self.write_model_config(root / PRETRAINED, Prediction(params, nowhere))

    def write_model_config(self, folder: Path, what: Prediction) -> None:
        from pipelines.train.models import build_model, write_config

        p = what.params.pretrain
        model = build_model(what.params.model, p.num_classes)
        write_config(folder / self.model_config[1], model, p, what.classes)

    def epoch_score(self, params: Params) -> str:
        return "holdout_top1" if params.pretrain.holdout else "val_top1"

    def choice(self, params: Params) -> str:
        holdout = params.pretrain.holdout
        if holdout:
            share = f"{holdout:.0%} of the training images held out"
            return f"The classifier is the best epoch on {share}."
        return "The classifier is the best epoch on these images, as is usual with ImageNet."

    def step_model(self, params: Params) -> "tuple[nn.Module, Forward]":
        import torch

        from pipelines.train.models import build_model

        p = params.pretrain
        model = build_model(params.model, p.num_classes, p.drop_path_rate)
        if p.grad_checkpointing:
            cast("Any", model).set_grad_checkpointing(True)

        def forward(net: "nn.Module", count: int, device: "torch.device") -> "list[Tensor]":
            return [net(torch.empty(count, 3, p.img_size, p.img_size, device=device))]

        return model, forward

    def evaluation_model(self, what: Prediction) -> "nn.Module":
        from pipelines.train.models import build_model

        return build_model(what.params.model, what.params.pretrain.num_classes)

    def predict(
        self,
        what: Prediction,
        state: "Mapping[str, Tensor]",
        device: "torch.device",
        reporter: "Reporter",
        folder: Path,
    ) -> None:
        import numpy as np

        from pipelines.train.evaluation import predict

        model = self.evaluation_model(what)
        model.load_state_dict(state)
        job = Job(self.stage, what.params, what.dataset)
        found = predict(job, model, device, reporter)
        if found is not None:
            np.savez(folder / "predictions.npz", **cast("dict[str, Any]", found))

    def score(self, what: Prediction, folder: Path) -> "Scores":
        from pipelines.results import scores

        predictions = read_predictions(folder)
        (folder / "predictions.npz").unlink()
        scores.write_predictions(folder / "predictions.csv", predictions, what.classes)
        return scores.classification(predictions, what.classes)

    def draw_samples(self, what: Prediction, folder: Path) -> "Figure":
        from pipelines.data.images import images_of  # with timm, which takes seconds
        from pipelines.results import pictures

        images = images_of(what.dataset, "val")
        count = 2 * what.params.report.samples
        return pictures.mistakes(images, folder / "predictions.csv", count)


def _mistakes(scene: Scene) -> "Figure":
    from pipelines.data.images import images_of
    from pipelines.results import pictures

    predictions = scene.root / "results/pretrain/predictions.csv"
    images = images_of(scene.datasets["imagenet"], "val")
    return pictures.mistakes(images, predictions, 2 * scene.samples)


def _confusion(scene: Scene) -> "Figure | None":
    from pipelines.results import pictures

    file = scene.root / "plots/pretrain/confusion.csv"
    return pictures.confusion(file) if file.exists() else None


def _reliability(scene: Scene) -> "Figure":
    from pipelines.results import pictures

    return pictures.reliability(scene.root / "results/pretrain/predictions.csv")


def _attention(scene: Scene) -> "Figure | None":
    from pipelines.results import pictures

    weights, scenes = scene.root / "weights/pretrain", scene.datasets.get("coco")
    # The scenes of the detection data show more than one object.
    return pictures.attention(weights, Path(scenes.place)) if scenes else None


Classify.pictures = (
    Picture(
        "mistakes",
        "Failures: classification",
        "The wrong answers that the classifier is surest of.",
        _mistakes,
    ),
    Picture(
        "confusion",
        "Confusion matrix",
        "Counts on the validation images; shade is percent of a row.",
        _confusion,
    ),
    Picture(
        "reliability",
        "Calibration",
        "How often the classifier is right when it is so sure, and how many images it is so sure"
        " of. Label smoothing, mixup and cutmix make a classifier less sure than it is right.",
        _reliability,
    ),
    Picture(
        "attention",
        "Hadamard attention",
        "Attention of the pretrained model's first ELSA layer around three query points,"
        " averaged over heads.",
        _attention,
    ),
)
