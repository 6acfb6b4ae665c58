"""What a sweep can vary: each training stage, with its data, its loop and what it is judged by."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.params import Params


@dataclass(frozen=True)
class Subject:
    """A training stage as trials of a sweep run it.

    Attributes:
        stage: name of the stage and of its section of the parameters.
        dataset: the data set it trains on.
        metric: what its runs are compared by, in percent.
        weights: file of the final weights in the last checkpoint.
    """

    stage: str
    dataset: str
    metric: str
    weights: str

    @property
    def sections(self) -> tuple[str, ...]:
        """The parameters that a trial can vary. Detection and segmentation start from the weights
        of `pretrain`, so the model is theirs."""
        model = ("model",) if self.stage == "pretrain" else ()
        return (*model, self.stage, "scaling")

    def score(self, params: Params) -> str:
        """The metric of an epoch that points are chosen by."""
        if self.stage != "pretrain":
            return self.metric
        return "holdout_top1" if params.pretrain.holdout else "val_top1"

    def check(self, params: Params) -> dict[str, Any]:
        """What the loop needs beside the parameters, and `data`: the data set.

        Raises:
            PipelineError, DataError: what does not fit.
        """
        if self.stage == "pretrain":
            from pipelines import pretrain

            return {"data": pretrain.check(params)}
        from pipelines.tasks import dense as stage

        # With pretrained weights, whether a trial uses them or not.
        section = getattr(params, self.stage).model_copy(update={"pretrained": True})
        return stage.check(
            self.stage, self.dataset, params.model_copy(update={self.stage: section})
        )

    def loop(self) -> Callable[[dict[str, Any]], None]:
        """What each Ray Train worker runs."""
        if self.stage == "pretrain":
            from pipelines.pretrain import train_loop_per_worker
        else:
            from pipelines.mm.train import train_loop_per_worker
        return train_loop_per_worker

    def config(self, params: Params, checked: dict[str, Any]) -> dict[str, Any]:
        """The loop's configuration for a trial."""
        if self.stage == "pretrain":
            from pipelines.data.images import DataPlace

            data = checked["data"]
            return {"params": params, "data": DataPlace(data["place"], data["skipped"])}
        job, pretrained = checked["job"], getattr(params, self.stage).pretrained
        return {"job": replace(job, params=params, weights=job.weights if pretrained else None)}

    def result(self, folder: Path) -> dict[str, Any]:
        """Final metrics, and `history`, from the last checkpoint of a run."""
        if self.stage == "pretrain":
            return json.loads((folder / "result.json").read_text())
        history = json.loads((folder / "history.json").read_text())
        return history[-1] | {"history": history}


SUBJECTS = {
    one.stage: one
    for one in (
        Subject("pretrain", "imagenet", "top1", "best.safetensors"),
        Subject("detect", "coco", "bbox_mAP", "model.safetensors"),
        Subject("segment", "ade20k", "mIoU", "model.safetensors"),
    )
}
