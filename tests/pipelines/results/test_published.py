"""The published table, held to the models and recipes that it is about."""

import shlex

import pytest
import timm
import torch

import elsa  # noqa: F401  registers the models
from pipelines.commands.published import command_for, grouped
from pipelines.params import compose, read_yaml, recipe_names
from pipelines.paths import RECIPES, ROOT
from pipelines.results.published import OTHER_RECIPES, compare, load_published, sources
from pipelines.results.tables import result_rows
from pipelines.tasks import TASKS


def test_ours_beside_published() -> None:
    box, mask = compare(
        {"bbox_mAP": 47.3, "segm_mAP": 42.4, "bbox_mAP_50": 70.0},
        model="elsa_swin_tiny",
        task="detect",
        method="mask-rcnn",
        schedule="3x",
    )
    assert (round(box.difference, 6), box.reached) == (-0.2, True)  # just within
    assert (round(mask.difference, 6), mask.reached) == (-0.3, False)
    [better] = compare({"top1": 90.0}, model="elsa_swin_tiny", task="classify")
    assert better.reached  # better than published counts as reached
    assert compare({"top1": 96.0}, model="elsa_swin_micro", task="classify") == []


def test_no_result_is_listed_twice() -> None:
    rows = load_published()
    keys = {(r.model, r.task, r.method, r.schedule, r.metric, r.source) for r in rows}
    assert len(keys) == len(rows)


@pytest.mark.parametrize(
    "name", sorted({row.model for row in load_published() if row.task == "classify"})
)
def test_classifiers_have_the_published_size(name: str) -> None:
    """And each has a recipe whose model it is."""
    published, *_ = (r for r in load_published() if (r.model, r.task) == (name, "classify"))
    with torch.device("meta"):
        model = timm.create_model(name)
    if published.parameters:
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == published.parameters
    assert name in [compose([f"recipe={recipe}"]).model.name for recipe in recipe_names()]


def test_each_published_group_of_detection_and_segmentation_has_a_recipe_and_rows() -> None:
    groups = {f"{row.method}_{row.schedule}" for row in load_published() if row.task != "classify"}
    there = {
        path.stem
        for stage in ("detect", "segment")
        for path in (RECIPES / stage).glob("*.yaml")
        if not path.stem.endswith(("_demo", "_smoke", "_finetune"))
        # Boxes alone, and the user's own, are not published.
        and not path.stem.startswith(("faster-rcnn", "cascade-rcnn", "config"))
    }
    assert groups == there


def test_results_table_shows_the_published_number_where_there_is_one() -> None:
    def shown(*words: str) -> dict[str, str]:
        params = compose(words)
        facts = [task.facts(params) for task in TASKS.values()]
        metrics = {task.stage: dict.fromkeys(task.reported, 47.9) for task in TASKS.values()}
        return {row.metric: row.published for row in result_rows(facts, metrics)}

    full = shown("recipe=elsa_swin_tiny")
    assert full["bbox_mAP"] == "45.7 (+2.2, reached)"
    assert full["mIoU_ms_flip"] == "47.9 (+0.0, reached)"
    assert full["top1"].endswith("not within 0.2)")
    assert full["mIoU"] == full["top5"] == ""
    # Another model, other classes: nothing to compare with.
    assert not any(shown("recipe=demo").values())
    assert not any(shown("recipe=elsa_swin_tiny", "model.kernel_size=5").values())
    assert shown("recipe=elsa_swin_tiny", "detect.num_classes=20")["bbox_mAP"] == ""


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize(
    ("stage", "group"),
    [("detect", "mask-rcnn_1x"), ("detect", "cascade-mask-rcnn_3x"), ("segment", "upernet_160k")],
)
def test_detectors_and_segmentors_have_the_published_size(
    size: str, stage: str, group: str
) -> None:
    params = compose([f"recipe=elsa_swin_{size}", f"{stage}={group}"])
    with torch.device("meta"):
        model, _ = TASKS[stage].step_model(params)
    method, schedule = group.split("_")
    [published] = {
        row.parameters
        for row in load_published()
        if (row.model, row.method, row.schedule) == (f"elsa_swin_{size}", method, schedule)
    }
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == published


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_baselines_are_swins_own_runs(size: str) -> None:
    """Against timm's card of the published weights for the size, and Swin's published settings."""
    params = compose([f"recipe=swin_{size}"])
    assert params.model.name == f"swin_{size}_patch4_window7_224"
    own = {"tiny": 0.2, "small": 0.3, "base": 0.5}[size]
    assert (params.pretrain.drop_path_rate, params.pretrain.cooldown_epochs) == (own, 0)
    assert not params.pretrain.model_ema
    assert params.pretrain.train_interpolation == "bicubic"


def test_what_is_quoted_of_a_baseline_is_listed_and_compared_with_nothing() -> None:
    model = "swin_tiny_patch4_window7_224"
    rows = [r for r in load_published() if (r.model, r.task) == (model, "classify")]
    assert {(r.source, r.value) for r in rows} == {("quoted", 81.3), ("swin", 81.2)}
    [own] = compare({"top1": 81.0}, model=model, task="classify")
    assert (own.published.source, own.reached) == ("swin", True)
    assert {row.source for row in load_published()} == sources().keys()


def test_another_recipe_for_a_published_model_is_compared_with_nothing() -> None:
    for name in OTHER_RECIPES:
        params = compose([f"recipe={name}"])
        assert params.model.name in {row.model for row in load_published()}
        assert {task.facts(params).model for task in TASKS.values()} == {""}


def test_an_evaluated_checkpoint_may_differ_less_than_a_training() -> None:
    for evaluated, reached in ((False, True), (True, False)):
        [found] = compare(
            {"top1": 82.55}, model="elsa_swin_tiny", task="classify", evaluated=evaluated
        )
        assert found.reached is reached


def test_the_command_of_each_row_trains_what_the_row_is_about() -> None:
    rows = grouped(load_published())
    elsas = [row for row in rows if row[0].startswith("elsa")]
    assert [sum(row[1] == task for row in elsas) for task in ("classify", "detect", "segment")] == [
        3,
        8,
        2,
    ]
    for model, task, method, schedule in rows:
        command = shlex.split(command_for((model, task, method, schedule)))
        assert command[:4] == ["dvc", "exp", "run", "report"]
        params = compose(command[5::2])
        assert params.model.name == model
        assert TASKS[task].facts(params).model == model
        assert params.tasks == (("classify",) if task == "classify" else ("classify", task))
        if method:
            section = TASKS[task].section(params)
            assert (section.method, section.schedule) == (method, schedule)


def test_the_index_of_models_holds_the_papers_numbers_and_configs_that_exist() -> None:
    """`model-index.yml`, which OpenMMLab's tools read."""
    metrics = {"Top 1 Accuracy": "top1", "box AP": "bbox_mAP", "mask AP": "segm_mAP"}
    metrics["mIoU(ms+flip)"] = "mIoU_ms_flip"
    found = {}
    for model in read_yaml(ROOT / "model-index.yml")["Models"]:
        name, method, schedule = [*model["Name"].rsplit("_", 2), "", ""][:3]
        if "Config" in model:
            assert (ROOT / model["Config"]).is_file()
        else:
            name, method, schedule = model["Name"], "", ""
        for result in model["Results"]:
            ((metric, value),) = result["Metrics"].items()
            found[name, method, schedule, metrics[metric]] = value
    assert found == {
        (row.model, row.method or "", row.schedule or "", row.metric): row.value
        for row in load_published()
        if row.model.startswith("elsa") and row.source == "paper"
    }
