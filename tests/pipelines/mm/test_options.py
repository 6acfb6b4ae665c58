"""`cfg_options`: changes to the configs of mmdet and mmseg from the parameters."""

from pathlib import Path
from typing import Any

import pytest

from pipelines import prepare
from pipelines.commands import recognise
from pipelines.data.store import Dataset
from pipelines.data.weights import WeightsDescription, write_weights
from pipelines.errors import PipelineError
from pipelines.mm.checks import check_model
from pipelines.mm.config import build_config
from pipelines.params import compose, flatten, override
from pipelines.tasks import TASKS, Prediction

ANCHORS = "model.rpn_head.anchor_generator.scales"


@pytest.mark.parametrize(
    ("stage", "group", "options", "place", "expected"),
    [
        ("detect", "mask-rcnn_1x", {ANCHORS: [4]}, "rpn_head.anchor_generator.scales", [4]),
        (
            *("detect", "cascade-rcnn_3x"),
            {"model.roi_head.bbox_head.2.reg_class_agnostic": True},
            *("roi_head.bbox_head.2.reg_class_agnostic", True),
        ),
        # A new key, and a dict as its value.
        (
            *("segment", "upernet_160k"),
            {"model.decode_head.sampler": {"type": "OHEMPixelSampler", "thresh": 0.7}},
            *("decode_head.sampler.thresh", 0.7),
        ),
        # Nested, as a sweep or an edit by dotted keys leaves it.
        (
            *("detect", "mask-rcnn_1x"),
            {"model": {"test_cfg": {"rcnn": {"max_per_img": 300}}}},
            *("test_cfg.rcnn.max_per_img", 300),
        ),
    ],
)
def test_an_option_reaches_the_model(
    make_job: Any, stage: str, group: str, options: Any, place: str, expected: Any
) -> None:
    job = make_job(stage, group=group, cfg_options=options)
    check_model(job)
    found: Any = build_config(job, Path("unused")).model
    for name in place.split("."):
        found = found[int(name)] if isinstance(found, list) else found[name]
    assert found == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.rpn_hed.anchor_generator.scales": [4]}, r"model has no rpn_hed, but \['type'"),
        ({"model.roi_head.bbox_head.7.x": 1}, r"bbox_head has no 7, but"),
        ({ANCHORS: [8]}, "changes nothing: it has that value already"),
        ({"model.backbone.drop_path_rate": 0.7}, "changes nothing: .* the parameters decide it"),
        ({ANCHORS: [4], "model.roi_head.bbox_head.num_classes": 3}, "num_classes changes nothing"),
        ({"model.rpn_head.anchor_generator.sclaes": [4]}, "no model can be built.*sclaes"),
    ],
)
def test_an_option_that_can_not_be_is_told(make_job: Any, options: Any, message: str) -> None:
    job = make_job("detect", group="mask-rcnn_1x", cfg_options=options)
    with pytest.raises(PipelineError, match=rf"detect.cfg_options: .*{message}"):
        check_model(job)


def test_the_first_stage_tells_of_a_wrong_option() -> None:
    options = {"detect.cfg_options": {"model.rpn_hed.x": 1}}
    params = override(compose(["recipe=smoke"]), options, "test")
    with pytest.raises(PipelineError, match="model has no rpn_hed"):
        prepare.STAGE.check(params)


def test_weights_name_their_options_and_evaluation_takes_them(tmp_path: Path) -> None:
    params = override(
        compose(["recipe=demo"]),
        {"detect.cfg_options": {ANCHORS: [4]}, "detect.num_classes": 10},
        "",
    )
    task = TASKS["detect"]
    model = task.build(params)
    description = WeightsDescription(task.model(params), "0" * 12, "0" * 32, {})
    write_weights(tmp_path / "weights", model.state_dict(), description)
    chosen = recognise.choose_params(task, tmp_path / "weights/model.safetensors", "demo", [])
    assert chosen.detect.cfg_options == {ANCHORS: [4]}
    other = override(chosen, {"detect.cfg_options": {ANCHORS: [3]}}, "test")
    fault = recognise._misfit(task, tmp_path / "weights/model.safetensors", other, True)
    assert fault == "model.json has another cfg_options"
    assert "changed" in task.published_as(chosen)["schedule"]  # no published result is of it


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    state = (
        TASKS["classify"]
        .evaluation_model(
            Prediction(compose(["recipe=smoke"]), Dataset("imagenet", "", (), {}, ""))
        )
        .state_dict()
    )
    about = WeightsDescription({}, "0" * 12, "", {}, classes=("a", "b"))
    digests = {write_weights(tmp_path / str(i), state, about).sha256 for i in range(8)}
    assert len(digests) == 1


def test_options_survive_dotted_names() -> None:
    params = override(compose(["recipe=smoke"]), {"detect.cfg_options": {ANCHORS: [4]}}, "test")
    flat = flatten(params.model_dump(mode="json"))
    assert flat["detect.cfg_options"] == {ANCHORS: [4]}
    assert override(compose(["recipe=smoke"]), flat, "test") == params
