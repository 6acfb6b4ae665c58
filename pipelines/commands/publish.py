"""Trained weights as a model repository: on a Hugging Face hub, or as a folder with its files."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import elsa
from elsa.predict import Predictor, load_predictor
from pipelines.commands.predict import HUB, Weights, weights_folder
from pipelines.data.files import sha256_file
from pipelines.data.weights import DESCRIPTION, TENSORS, read_description
from pipelines.errors import PipelineError

CARD = "README.md"
CONFIGS = ("config.json", "config.py")
TAGS = {
    "classify": ("timm", "image-classification"),
    "detect": ("mmdet", "object-detection"),
    "segment": ("mmseg", "image-segmentation"),
}
"""The library that loads the model and what it does, in the hub's words."""
PERCENT = ("top1", "top5", "mAP", "mIoU", "mAcc", "aAcc")


def publish(given: Weights, to: str, private: bool) -> None:
    """Publish weights to `hf-hub:USER/NAME`, or write the same files to a folder.

    Raises:
        PipelineError: the weights don't load, the folder holds something else, or the hub refuses.
    """
    with weights_folder(given) as weights, tempfile.TemporaryDirectory() as scratch:
        try:
            predictor = load_predictor(weights, "cpu")
        except (FileNotFoundError, elsa.CheckpointError) as error:
            raise PipelineError(f"--weights {given.place}: {error}") from None
        staged = Path(scratch) / "model"
        staged.mkdir()
        for name in (TENSORS, DESCRIPTION, *CONFIGS):
            if (weights / name).is_file():
                shutil.copy(weights / name, staged / name)
        name = to.removeprefix(HUB) if to.startswith(HUB) else Path(to).name
        (staged / CARD).write_text(card(name, to, predictor, staged))
        if to.startswith(HUB):
            _upload(staged, name, private)
        else:
            _write(staged, Path(to).expanduser())
    print(f"{to}: {predictor.task}, {len(predictor.classes)} classes, {CARD} says how to load it")


def card(name: str, place: str, predictor: Predictor, folder: Path) -> str:
    """The model card of a folder of weights: scores, lineage, how to load it."""
    from huggingface_hub import ModelCardData

    library, does = TAGS[predictor.task]
    about = ModelCardData(library_name=library, pipeline_tag=does, tags=[library, "elsa"])
    facts: dict[str, Any] = {"model": {}, "metrics": {}, "identity": "", "mlflow_run_id": ""}
    if (folder / DESCRIPTION).is_file():
        found = read_description(folder)
        facts = {key: getattr(found, key) for key in facts}
    model = facts["model"].get("name", "ELSA")
    parts = [
        f"---\n{about.to_yaml()}\n---",
        f"# {name}",
        f"{model} for {does.replace('-', ' ')}, {len(predictor.classes)} classes."
        " Its layers are ELSA's ([arXiv 2112.12786](https://arxiv.org/abs/2112.12786)).",
        *_scores(facts["metrics"]),
        "## Use",
        _use(predictor.task, name if place.startswith(HUB) else None),
        "## Lineage",
        _lineage(facts, folder),
    ]
    return "\n\n".join(parts) + "\n"


def _scores(metrics: Mapping[str, float]) -> list[str]:
    rows = [f"| {key} | {value:.2f} |" for key, value in metrics.items() if _is_percent(key)]
    table = "\n".join(["| metric | percent |", "|---|---:|", *rows])
    told = "On the validation images of the data that it was trained on."
    return ["## Scores", told, table] if rows else []


def _is_percent(metric: str) -> bool:
    return any(word in metric for word in PERCENT)


def _use(task: str, repository: str | None) -> str:
    first = "from huggingface_hub import snapshot_download\n" if repository else ""
    folder = f'snapshot_download("{repository}")' if repository else '"."'
    if task == "classify":
        source = f"hf-hub:{repository}" if repository else "local-dir:."
        code = (
            "import timm\n"
            "import elsa  # registers the models\n\n"
            f'model = timm.create_model("{source}", pretrained=True)'
        )
    else:
        package, kind = {
            "detect": ("mmdet", "DetInferencer"),
            "segment": ("mmseg", "MMSegInferencer"),
        }[task]
        code = (
            f"{first}from {package}.apis import {kind}\n"
            "import elsa.mm  # registers the backbone, and loads safetensors\n\n"
            f"folder = {folder}\n"
            f'inferencer = {kind}(f"{{folder}}/config.py", f"{{folder}}/{TENSORS}")'
        )
    weights = f"{HUB}{repository}" if repository else "."
    return (
        f"```python\n{code}\n```\n\nOr `elsa predict photo.jpg --weights {weights}`, which executes"
        " and unpickles nothing in these files."
    )


def _lineage(facts: Mapping[str, Any], folder: Path) -> str:
    lines = [f"- SHA-256 of `{TENSORS}`: `{sha256_file(folder / TENSORS)}`"]
    if facts["identity"]:
        lines.append(f"- identity of the run (code, data and parameters): `{facts['identity']}`")
    if facts["mlflow_run_id"]:
        lines.append(f"- MLflow run: `{facts['mlflow_run_id']}`")
    if (folder / DESCRIPTION).is_file():
        lines.append(f"- the rest, and that of the weights it started from: `{DESCRIPTION}`")
    return "\n".join(lines)


def _write(staged: Path, target: Path) -> None:
    if target.exists() and not (target / CARD).is_file():
        raise PipelineError(f"--to {target} exists and holds no model", "Name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    shutil.copytree(staged, aside, dirs_exist_ok=True)
    aside.chmod(0o755)
    shutil.rmtree(target, ignore_errors=True)
    aside.replace(target)


def _upload(staged: Path, repository: str, private: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=staged, commit_message="Publish by elsa publish"
        )
    except Exception as error:  # of whichever HTTP library the hub's client has
        raise PipelineError(
            f"--to {HUB}{repository}: {error}",
            "Log in by `hf auth login`, or set HF_TOKEN; HF_ENDPOINT names another hub",
        ) from error
