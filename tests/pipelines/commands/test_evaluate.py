"""What a checkpoint is recognised as, and what is said of one that does not fit."""

import pytest
import timm
import torch

import elsa  # noqa: F401  registers the models
from pipelines.commands import evaluate, recognise
from pipelines.data.layout import DATASETS
from pipelines.errors import PipelineError
from pipelines.tasks import TASKS

CLASSIFY = TASKS["classify"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file with a whole elsa_swin_tiny, as a training run of timm's leaves it."""
    path = tmp_path_factory.mktemp("published") / "checkpoint.pth"
    model = timm.create_model("elsa_swin_tiny")
    torch.save({"state_dict": model.state_dict(), "arch": "elsa_swin_tiny", "epoch": 1}, path)
    return path


def test_the_recipe_is_recognised_by_the_weights(published):
    assert recognise.choose_params(CLASSIFY, published, None, []).recipe == "elsa_swin_tiny"
    chosen = recognise.choose_params(
        CLASSIFY, published, None, ["pretrain.img_size=448", "scaling.num_workers=1"]
    )
    assert (chosen.recipe, chosen.pretrain.img_size) == ("elsa_swin_tiny", 448)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": "nowhere.pth"}, "no such file"),
        ({"changes": ["pretrain.epoch=3"]}, "Could not override 'pretrain.epoch'"),
        ({"ms_flip": True}, "only segment has"),
        ({"changes": ["detect=nix"]}, "Could not find 'detect/nix'"),
        ({"data": "nowhere"}, "--data nowhere: there is no folder val"),
        ({}, "data.imagenet is null"),
        ({"recipe": "elsa_swin_small", "data": "imagenet"}, "missing key"),
        ({"changes": ["model.depths=[1, 1, 1, 1]"]}, "fits the model of no recipe"),
        ({"task": "detect", "recipe": "elsa_swin_tiny", "data": "coco"}, "does not fit"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_before_anything_starts(
    given, message, published, tiny_data, monkeypatch
):
    monkeypatch.setattr(evaluate, "require_operator", lambda: None)
    given = {"weights": str(published)} | given
    if given.get("data") in DATASETS:
        given |= {
            "data": str(tiny_data / given["data"]),
            "changes": ["detect.num_classes=10", "pretrain.num_classes=10"],
        }
    changes = tuple(given.pop("changes", ()))
    options = evaluate.Options(**{"task": "classify", "changes": changes} | given)
    with pytest.raises(PipelineError, match=message.replace("(", r"\(")):
        evaluate.prepare(options)
