"""Training that starts from a whole detector or segmentor, not from its backbone alone."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from mmengine.registry import DefaultScope
from safetensors.torch import load_file, save_file

from pipelines.errors import PipelineError
from pipelines.mm.hooks import WEIGHTS
from pipelines.mm.start import find_start
from pipelines.mm.train import train
from pipelines.tasks import TASKS
from pipelines.train.reporter import LocalReporter

from .full_size import CPU, MICRO, SHORT, SMALL, build_model, small_config

GROUPS = {"detect": "mask-rcnn_1x", "segment": "upernet_160k"}
CLASS_LAYERS = {
    "detect": {
        "roi_head.bbox_head.fc_cls",
        "roi_head.bbox_head.fc_reg",
        "roi_head.mask_head.conv_logits",
    },
    "segment": {"decode_head.conv_seg", "auxiliary_head.conv_seg"},
}


@pytest.fixture(params=["detect", "segment"])
def given(request, make_job, tmp_path):
    """A job that starts from a whole model, and that model's weights."""
    stage = request.param
    options = SMALL[stage] | SHORT | {"init_from": "model", "lr": 1e-12, "amp": "none"}
    job = make_job(stage, group=GROUPS[stage], **options)
    torch.manual_seed(1)
    state = build_model(job, tmp_path).state_dict()
    state = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in state.items()}
    state = {k: v.abs() if k.endswith("running_var") else v / 10 for k, v in state.items()}
    file = tmp_path / "given.safetensors"
    save_file(state, file, {"classes": json.dumps(job.dataset.classes)})
    return replace(job, weights=str(file)), state


def of_heads(state):
    return {k: v for k, v in state.items() if not k.startswith("backbone.")}


def start_of(job, tmp_path):
    config = small_config(job, tmp_path)
    return find_start(job, config.model, config.default_scope)


def test_training_begins_with_all_of_it(given, small_heads, tmp_path):
    """At a learning rate of nearly nothing it ends with it too."""
    job, state = given
    DefaultScope._instance_dict.clear()
    train(job, CPU, LocalReporter(tmp_path / "run", quiet=True))
    trained = load_file(tmp_path / "run" / WEIGHTS)
    learned = [k for k in of_heads(state) if "running_" not in k and "num_batches" not in k]
    for name in learned:
        torch.testing.assert_close(trained[name], state[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("other", ["names", "number"])
def test_layers_of_other_classes_begin_anew(given, other, make_job, tmp_path):
    job, state = given
    if other == "names":
        classes = tuple(f"kind {i}" for i in range(len(job.dataset.classes)))
        job = replace(job, dataset=replace(job.dataset, classes=classes))
    else:
        options = SMALL[job.stage] | SHORT | {"init_from": "model", "num_classes": 3}
        fewer = make_job(job.stage, group=GROUPS[job.stage], **options)
        job = replace(fewer, weights=job.weights)
    start = start_of(job, tmp_path)
    assert {name.rpartition(".")[0] for name in start.new} == CLASS_LAYERS[job.stage]
    rest = [k for k in of_heads(state) if k.rpartition(".")[0] not in CLASS_LAYERS[job.stage]]
    assert sorted(start.tensors) == sorted(rest)
    assert all(torch.equal(start.tensors[name], state[name]) for name in rest)


def test_a_classifier_has_no_heads_to_start_from(given, tmp_path, monkeypatch):
    """Told before Ray starts, as is what is taken."""
    job, _ = given
    classifier = timm.create_model(MICRO["name"], depths=MICRO["depths"], num_classes=7)
    save_file(classifier.state_dict(), job.weights)
    task = TASKS["detect" if job.stage == "detect" else "segment"]
    monkeypatch.setattr(type(task), "find_dataset", lambda *_: job.dataset)
    section = task.section(job.params).model_copy(update={"weights": job.weights})
    params = job.params.model_copy(update={job.stage: section})
    with pytest.raises(PipelineError, match=rf"nothing that fits .*{job.stage}\.init_from=model"):
        task.check(params)
