"""The report of a pipeline of any of the tasks."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.params import compose
from pipelines.results.page import Drawn, Page, StageRow, write_html, write_markdown
from pipelines.results.tables import load_metrics, result_rows
from pipelines.tasks import TASKS


def page_of(task_name: str, quoted: str = "", cost: str = "") -> Page:
    """What `report` makes of a pipeline of one task."""
    params = compose([f"tasks=[{task_name}]"])
    task = TASKS[task_name]
    metrics = {task.stage: dict.fromkeys(task.reported, 12.3)}
    row = StageRow(task.stage, "1:02", quoted, cost, "99", "", "", "abc123", "run1", "sha", "")
    return Page(
        pipeline="test",
        recipe="demo",
        commit="c0ffee",
        dirty=True,
        public=False,
        results=result_rows([task.facts(params)], metrics),
        choice=task.choice(params),
        stages=[row],
        total="1:02",
        changed={"tasks": (["classify", "detect", "segment"], [task_name])},
        ablation=None,
        commands=[f"elsa evaluate --task {task.name}"],
        pictures=[Drawn("one", "One picture", "What it shows.")],
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_pipeline_of_one_task_has_a_page_that_names_no_other(name: str, tmp_path: Path) -> None:
    pictures, cards = tmp_path / "pictures", tmp_path / "cards"
    for folder, file in ((pictures, "one.png"), (cards, "coco.png")):
        folder.mkdir()
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / file)
    (cards / "coco.md").write_text("# a card <script>alert(1)</script>")
    page = page_of(name)
    write_html(tmp_path / "index.html", page, pictures, cards)
    write_markdown(tmp_path / "report.md", page)
    html, text = (tmp_path / "index.html").read_text(), (tmp_path / "report.md").read_text()
    for task in TASKS.values():
        there = task.name == name
        assert (task.title in html) == there
        assert (task.title in text) == there
    assert html.count("data:image/png;base64,") == 2
    assert "12.3" in html
    assert "with uncommitted changes" in html
    assert "<script>alert" not in html  # what a card holds is shown, not run
    assert "![One picture](pictures/one.png)" in text


def test_what_was_quoted_and_what_it_cost_are_beside_what_was_taken(tmp_path: Path) -> None:
    html, text = tmp_path / "index.html", tmp_path / "report.md"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "one.png")
    for quoted, cost in (("", ""), ("1:00 (0:50 to 1:10)", "0.25, quoted 0.24")):
        page = page_of("classify", quoted, cost)
        write_html(html, page, tmp_path, tmp_path / "cards")
        write_markdown(text, page)
        for file in (html, text):
            assert ("quoted (95% within)" in file.read_text()) == bool(quoted)
            assert quoted in file.read_text()
            assert cost in file.read_text()


def test_metrics_of_a_stage_that_was_left_out_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/detect.json").write_text('{"left_out": true}')
    (tmp_path / "metrics/segment.json").write_text('{"mIoU": 1.0}')
    assert load_metrics(tmp_path, ["detect", "segment"]) == {"segment": {"mIoU": 1.0}}
