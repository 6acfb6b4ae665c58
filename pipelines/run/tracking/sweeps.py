"""Sweeps in MLflow: their trials, charts of them, and the registered champion."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from pipelines.run.tracking.runs import RunRecord, Tracker, record_of
from pipelines.run.tracking.store import TrackingError, experiment_of
from pipelines.run.tracking_uri import tracking_uri


def find_sweep(name: str | None = None) -> RunRecord | None:
    """The last started sweep, of space `name` if that is given; None if there is none."""
    client = MlflowClient(tracking_uri())
    query = f"tags.stage = 'sweep' AND tags.space {f"= '{name}'" if name else "!= 'none'"}"
    order = ["attributes.start_time DESC"]
    found = client.search_runs([experiment_of(client)], query, max_results=1, order_by=order)
    return record_of(found[0]) if found else None


def sweep_trials(sweep_id: str) -> list[RunRecord]:
    """The runs that a sweep compares: its own, and those that it took over."""
    client = MlflowClient(tracking_uri())
    found, token = [], None
    while token is None or token:
        query = f"tags.sweeps LIKE '%{sweep_id}%'"
        page = client.search_runs([experiment_of(client)], query, page_token=token)
        found += [record_of(run) for run in page]
        token = page.token or ""
    return sorted(found, key=lambda run: run.tags.get("trial", ""))


def comparison_path(sweep_id: str, metric: str, loss: str) -> str:
    """Address of charts of a sweep's trials, below that of MLflow's user interface.

    They show the mean of `final/<metric>` of each point, the same by the number of parameters, and
    the metric `loss` by step. The view is kept where the interface keeps one that a user shares:
    in a tag of the experiment.
    """
    client = MlflowClient(tracking_uri())
    experiment, score = experiment_of(client), f"final/{metric}"
    chart = {"runsCountToCompare": 100, "metricSectionId": "sweep", "isGenerated": False}
    by_parameters = {"xaxis": "final/parameters", "yaxis": score}
    axes = {axis: {"type": "METRIC", "key": key} for axis, key in by_parameters.items()}
    view = {
        "searchFilter": f"tags.sweeps LIKE '%{sweep_id}%'",
        "orderByKey": f"metrics.`{score}`",
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "tag", "groupByData": "label"}],
        },
        "runsHiddenMode": "SHOW_ALL",
        "runListHidden": True,
        "isAccordionReordered": True,  # else our section comes last
        "compareRunSections": [{"uuid": "sweep", "name": "sweep", "display": True}],
        "compareRunCharts": [
            {"uuid": "score", "type": "BAR", "metricKey": score, **chart},
            {"uuid": "parameters", "type": "SCATTER", **axes, **chart},
            {
                "uuid": loss,
                "type": "LINE",
                "metricKey": loss,
                "selectedMetricKeys": [loss],
                **chart,
            },
        ],
    }
    key = f"sweep-{sweep_id[:8]}"
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{key}", json.dumps(view))
    return f"/#/experiments/{experiment}/runs?viewStateShareKey={key}&compareRunsMode=CHART"


def register(
    name: str, alias: str, tracker: Tracker, folder: Path, card: str, tags: Mapping[str, Any]
) -> str:
    """Register a weights folder as a version of model `name` with an alias; the version.

    A version with the same `sha256` tag gets the alias instead of a second one.
    """
    client = tracker.client
    with suppress(TrackingError):  # it is there already
        client.create_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}'")
    same = [v for v in versions if v.tags.get("sha256") == tags["sha256"]]
    if same:
        version = same[0].version
    else:
        model_id = tracker.log_model(name, folder, {})
        version = client.create_model_version(
            name,
            source=f"models:/{model_id}",
            run_id=tracker.run_id,
            tags={k: str(v) for k, v in tags.items()},
            description=card,
            model_id=model_id,
        ).version
    client.set_registered_model_alias(name, alias, version)
    return str(version)
