"""Show the results of the last run, and where to look further."""

import os

from rich.console import Console
from rich.table import Table

from pipelines.params import load_params
from pipelines.paths import ROOT
from pipelines.results.tables import duration, load_metrics, result_rows
from pipelines.tasks import TASKS


def show_results() -> None:
    """Print the scores and times of the stages that ran.

    Raises:
        PipelineError: a stage has not run.
    """
    params = load_params()
    tasks = [task for task in TASKS.values() if task.name in params.tasks]
    metrics = load_metrics(ROOT, ["prepare", "build_op", *(task.stage for task in tasks)])
    rows = result_rows([task.facts(params) for task in tasks], metrics)
    console = Console()
    table = Table("task", "metric", title="Results (percent, validation images)")
    table.add_column("value", justify="right")
    compared = any(row.published for row in rows)
    if compared:
        table.add_column("published")
    for row in rows:
        shown = [row.published] if compared else []
        table.add_row(row.task, row.metric, row.value, *shown)
    console.print(table)
    times = "  ".join(f"{name} {duration(one['wall_time_s'])}" for name, one in metrics.items())
    console.print(f"Wall time: {times}", highlight=False)
    console.print("Report:    reports/index.html", highlight=False)
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    where = "your MLflow server" if uri else "`make ui`, then http://127.0.0.1:5000"
    console.print(f"MLflow UI: {where}", highlight=False)
