"""`elsa`: every command for people. Stages are started by DVC, as `python -m pipelines.<stage>`.

Each command imports what it needs when it is called, so that `elsa --help` is quick.
"""

import sys
from pathlib import Path
from typing import Any

import click

from pipelines.errors import PipelineError
from pipelines.paths import ROOT


class _Commands(click.Group):
    """Shows a user's error as one message, with exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PipelineError as error:
            sys.exit(f"error: {ctx.invoked_subcommand}: {error}")

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """ELSA vision transformers as an experiment pipeline. `dvc repro` runs it."""


@main.command()
@click.argument("overrides", nargs=-1)
def compose(overrides: tuple[str, ...]) -> None:
    """Write params.yaml from recipes.

    As in: elsa compose recipe=smoke detect=mask-rcnn_1x pretrain.lr=1e-3
    """
    from pipelines.commands.compose import write_params

    write_params(overrides)


@main.command()
@click.argument("overrides", nargs=-1)
def params(overrides: tuple[str, ...]) -> None:
    """Show parameters as JSON.

    Those of params.yaml, or of overrides as `elsa compose` takes them.
    """
    from pipelines.commands.compose import show_params

    print(show_params(overrides))


@main.command("import")
@click.argument("kind", type=click.Choice(["voc", "yolo", "labelme", "palette", "folders"]))
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--val", default="0.2", show_default=True, help="A share, or a folder as SOURCE.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--tile", type=click.IntRange(0), default=0, help="Cut images into such squares.")
def import_(kind: str, source: Path, target: Path, val: str, seed: int, tile: int) -> None:
    """Bring data of other formats into ours.

    SOURCE is a folder of images with their VOC or labelme files; YOLO's data.yaml; for `palette` a
    folder with images/ and, in labels/, label images whose palette or colours are the classes; or
    a folder with a folder of images for each class. TARGET is what `elsa finetune` takes.
    """
    from pipelines.commands.import_data import Options, import_data

    import_data(kind, source, target, Options(val, seed, tile))


@main.command()
@click.option("--classify", type=click.Path(path_type=Path), help="Folder in ImageNet's layout.")
@click.option("--detect", type=click.Path(path_type=Path), help="In COCO's; masks or boxes alone.")
@click.option("--segment", type=click.Path(path_type=Path), help="In ADE20K's, with classes.txt.")
@click.option("--weights", help="A checkpoint to start from: published, timm's or ours.")
@click.option("--model", help="timm's name; default: elsa_swin_micro, on GPUs elsa_swin_tiny.")
@click.option("--balance", is_flag=True, help="Weigh segmentation's classes by how rare they are.")
@click.option("-S", "changes", multiple=True, metavar="KEY=VALUE", help="Beats what is derived.")
def finetune(weights: str | None, model: str | None, balance: bool, **given: Any) -> None:
    """Write params.yaml for data of your own.

    Classes, sizes, batches, epochs and rates come from the data and the device, and are shown.
    """
    from pipelines.commands.finetune import finetune as write

    changes = given.pop("changes")
    places = {task: place for task, place in given.items() if place}
    write(places, weights, model, balance, changes)


@main.command()
def doctor() -> None:
    """Check what training needs, and how to fix it.

    On this machine, or on every node of the cluster of RAY_ADDRESS. The exit code is 1 if something
    must be fixed.
    """
    from pipelines.commands.doctor import show_diagnosis

    if not show_diagnosis():
        sys.exit(1)


@main.command()
@click.argument("overrides", nargs=-1, required=True)
@click.option(
    "--probe",
    type=click.FloatRange(10),
    metavar="SECONDS",
    help="Train each stage for so long, on the workers of the recipe, and quote the whole by that.",
)
@click.option("--sweep", is_flag=True, help="With the sweep of the recipe.")
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True, help="Of all nodes.")
@click.option("--gpu", default="", help="Kind: h100 (if none is given), h200, a100, ...")
@click.option(
    "--utilisation",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the peak; else by the memory's bandwidth. `pretrain` reports it as mfu.",
)
@click.option(
    "--measured",
    multiple=True,
    metavar="STAGE=RATE",
    help="Images/s of one GPU in pretrain, detect or segment (repeatable).",
)
@click.option("--instance", metavar="NAME", help="Kind of GPU and price of a machine of the file.")
@click.option("--spot", is_flag=True, help="Its spot price; without it on demand.")
@click.option("--region", metavar="NAME", help="Whose electricity counts; the price's region.")
@click.option(
    "--prices",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prices and carbon intensities; pipelines/cluster/prices.yaml.",
)
@click.option("--price", type=click.FloatRange(0), default=0.0, help="Of a GPU per hour.")
@click.option("--watts", type=click.FloatRange(0), default=0.0, help="Of a worker; for --probe.")
@click.option("--carbon", type=click.FloatRange(0), default=0.0, help="Grams of CO2 per kWh.")
def plan(overrides: tuple[str, ...], **given: Any) -> None:
    """Quote hours, energy, CO2 and price of a recipe or a sweep.

    As in: elsa plan recipe=elsa_swin_tiny --gpus 8 --instance p5.48xlarge

    Here, by a minute of each stage: elsa plan recipe=demo --probe 60 --price 0.1
    """
    from pipelines.commands.prices import apply_prices

    context, seconds = click.get_current_context(), given.pop("probe")
    for name in ("gpus", "gpu", "utilisation", "measured") if seconds else ("watts",):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            why = "it measures the workers of the recipe" if seconds else "a GPU's are known"
            raise click.UsageError(f"--{name} is {'not' if seconds else 'only'} of --probe: {why}")
    rates = apply_prices(given)
    if seconds:
        from pipelines.commands.quote import show_quote

        show_quote(overrides, seconds, given["sweep"], rates)
        return
    from pipelines.commands.plan import Machine, parse_measured, show_plan, usual_utilisation
    from pipelines.train.cost import PEAK_FLOPS

    gpu = rates.gpu or "h100"
    if gpu not in PEAK_FLOPS:
        raise click.BadParameter(f"choose one of {', '.join(PEAK_FLOPS)}", param_hint="--gpu")
    machine = Machine(
        gpus=given["gpus"],
        gpu=gpu,
        utilisation=given["utilisation"] or usual_utilisation(gpu),
        measured=parse_measured(given["measured"]),
        price=rates.price,
        carbon=rates.carbon,
    )
    show_plan(overrides, machine, given["sweep"], rates.notes)


@main.command()
@click.option("--task", required=True, type=click.Choice(["classify", "detect", "segment"]))
@click.option(
    "--weights",
    required=True,
    help="A published checkpoint, safetensors, weights/<stage>, or an export (.onnx, .pt2).",
)
@click.option("--recipe", help="Whose model to use; default: params.yaml, or what fits.")
@click.option("--ms-flip", is_flag=True, help="Several scales, and mirrored (segment).")
@click.option("--no-ema", is_flag=True, help="Not the averaged weights of a file that has both.")
@click.option("--data", help="A data set in its public layout; default: the prepared one.")
@click.option(
    "-S", "changes", multiple=True, metavar="KEY=VALUE", help="As for `dvc exp run` (repeatable)."
)
@click.option("--out", help="Folder to write; default: evaluations/<task>-<weights>.")
def evaluate(**options: Any) -> None:
    """Evaluate a checkpoint without training."""
    from pipelines.commands.evaluate import Options
    from pipelines.commands.evaluate import evaluate as run

    run(Options(**options))


@main.command()
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--weights",
    required=True,
    help="weights/<stage>, models:/NAME@champion, hf-hub:USER/NAME, a file, or an export.",
)
@click.option(
    "--task", type=click.Choice(["classify", "detect", "segment"]), help="Of a published file."
)
@click.option("--recipe", help="Whose model a published file is of; default: what fits.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("predictions"))
@click.option("--device", help="Such as cuda:1; default: a GPU if there is one.")
@click.option("--min-score", type=click.FloatRange(0, 1), default=0.3, show_default=True)
def predict(
    pictures: tuple[Path, ...], out: Path, device: str | None, min_score: float, **weights: Any
) -> None:
    """Show what a model says of pictures.

    PICTURES are files and folders. Classes, objects or labels, as the weights have it, are drawn
    (objects from --min-score on) and written in the public formats to --out.
    """
    from pipelines.commands.predict import Weights, default_device
    from pipelines.commands.predict import predict as run

    place = weights.pop("weights")
    run(pictures, Weights(place, **weights), out, device or default_device(), min_score)


@main.command()
@click.option(
    "--weights",
    required=True,
    help="weights/<stage>, models:/NAME@champion, hf-hub:USER/NAME, or a file.",
)
@click.option(
    "--task", type=click.Choice(["classify", "detect", "segment"]), help="Of a published file."
)
@click.option("--recipe", help="Whose model a published file is of; default: what fits.")
@click.option(
    "--format",
    "formats",
    type=click.Choice(["onnx", "pt2", "pt2-decomposed"]),
    multiple=True,
    default=["onnx"],
    show_default=True,
    help="May be given several times. pt2 uses the compiled operator, pt2-decomposed torch alone.",
)
@click.option("--size", type=click.IntRange(16), nargs=2, help="Height and width of the images.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("export"), show_default=True)
def export(
    formats: tuple[str, ...], size: tuple[int, int] | None, out: Path, **weights: Any
) -> None:
    """Write a model as an ONNX or a pt2 file.

    Other runtimes execute these files without this project; run.py beside them shows how. They are
    compared with the model before the folder --out appears. Of a detector they are several.
    """
    from pipelines.commands.export import export as run
    from pipelines.commands.predict import Weights

    place = weights.pop("weights")
    run(Weights(place, **weights), formats, size, out)


@main.command()
@click.option(
    "--weights",
    required=True,
    help="weights/<stage>, models:/NAME@champion, hf-hub:USER/NAME, or a file.",
)
@click.option("--to", required=True, metavar="hf-hub:USER/NAME|FOLDER", help="Where it appears.")
@click.option(
    "--task", type=click.Choice(["classify", "detect", "segment"]), help="Of a published file."
)
@click.option("--recipe", help="Whose model a published file is of; default: what fits.")
@click.option("--private", is_flag=True, help="On the hub: for you alone, if it is new there.")
def publish(to: str, private: bool, **weights: Any) -> None:
    """Put weights on a hub, with a card.

    timm, mmdet and mmseg load them from there, `elsa predict --weights hf-hub:USER/NAME` too. A
    folder gets the same files.
    """
    from pipelines.commands.predict import Weights
    from pipelines.commands.publish import publish as run

    place = weights.pop("weights")
    run(Weights(place, **weights), to, private)


@main.command()
@click.argument("runs", nargs=-1)
@click.option("--sweep", metavar="SPACE", help="All trials of its last sweep.")
@click.option("--metric", help="Default: that of the runs' task.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "comparison")
@click.option("--url", is_flag=True, help="Only print what to open in `make ui`.")
def compare(
    runs: tuple[str, ...], sweep: str | None, metric: str | None, out: Path, url: bool
) -> None:
    """Compare runs, or a sweep's trials.

    RUNS are ids of MLflow runs. Runs that differ in their seed only are one row: mean, 95%
    interval, and difference to the first.
    """
    if not url and bool(runs) == bool(sweep):
        raise click.UsageError("give ids of MLflow runs, or --sweep SPACE")
    from pipelines.commands.compare import compare_runs, pages

    if url:
        print(pages())
    else:
        compare_runs(runs, sweep, metric, out)


@main.command()
@click.argument(
    "weights", type=click.Choice(["weights/pretrain", "weights/detect", "weights/segment"])
)
@click.option("--segments", type=click.IntRange(0), default=1, show_default=True, help="0: all.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the choice.")
def verify(weights: str, segments: int, seed: int) -> None:
    """Replay parts of the training of weights.

    Segments between the run's kept checkpoints (storage.keep_checkpoints=0 keeps all), chosen at
    random, are trained again and must come to the same bits; if one does not, the code is 1.
    """
    from pipelines.commands.verify import verify as check

    if not check(weights.removeprefix("weights/"), segments, seed):
        sys.exit(1)


@main.command()
@click.option("--model", help="Only rows of models whose name begins so, as elsa_swin_tiny.")
def published(model: str | None) -> None:
    """List published results and the command for each.

    With what metrics/ holds of the same model, method and schedule beside them.
    """
    from pipelines.commands.published import show_published

    show_published(model or "")


@main.command()
def results() -> None:
    """Show scores and times of the last run."""
    from pipelines.commands.results import show_results

    show_results()


@main.command()
@click.argument("target")
@click.option("--shard-mb", type=click.IntRange(1), default=256, show_default=True)
@click.option("--resize", type=click.IntRange(0), default=0, help="Shorter side; 0: as it is.")
def pack(target: str, shard_mb: int, resize: int) -> None:
    """Pack verified ImageNet into tar shards.

    TARGET is a folder, or an fsspec URL such as s3://bucket/imagenet. Keys of an object store come
    from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY).
    """
    from pipelines.commands.pack import pack_imagenet

    pack_imagenet(target, shard_mb, resize)


@main.command(context_settings={"ignore_unknown_options": True})
@click.option("--address", help="The head's dashboard; default: RAY_API_SERVER_ADDRESS.")
@click.option("--logs", metavar="JOB", help="Follow a job from its start.")
@click.option("--stop", metavar="JOB", help="End a job.")
@click.option("--list", "list_", is_flag=True, help="List jobs.")
@click.option("--detach", is_flag=True, help="Submit and return at once.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def submit(
    address: str | None,
    logs: str | None,
    stop: str | None,
    list_: bool,
    detach: bool,
    command: tuple[str, ...],
) -> None:
    """Run a command on a cluster's head.

    As in: elsa submit -- dvc exp run -S recipe=elsa_swin_tiny. The job outlives this terminal. To
    resume what was stopped or failed, submit the same command again.
    """
    from pipelines.commands.submit import Request, handle

    if [bool(command), bool(logs), bool(stop), list_].count(True) != 1:
        raise click.UsageError("give a command after --, or one of --logs, --stop, --list")
    sys.exit(handle(Request(address, command, logs, stop, list_, detach)))


if __name__ == "__main__":
    main(prog_name="elsa")
