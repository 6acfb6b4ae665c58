"""Predictions of a classifier for every validation image, by one or several processes."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import accuracy
from torch import nn

from pipelines.errors import PipelineError
from pipelines.params import Pretrain
from pipelines.train.job import Job
from pipelines.train.loading import evaluation_loader
from pipelines.train.schedule import micro_batch

if TYPE_CHECKING:
    from pipelines.train.reporter import Reporter

TOP = 5


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """What `pretrain.amp` means on `device`: autocast's type, or None for no autocast."""
    if amp == "auto":
        if device.type != "cuda":
            return None
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    return None if amp == "none" else getattr(torch, amp)


@torch.inference_mode()
def sums_of_scores(
    p: Pretrain, model: nn.Module, loader: Any, device: torch.device
) -> torch.Tensor:
    """Of the images of `loader`: top-1 and top-5 in percent and the loss, each added up, and their
    number; float64 of shape (4)."""
    amp = amp_dtype(p.amp, device)
    memory_format = torch.channels_last if p.channels_last else torch.contiguous_format
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for input, target in loader:
        input, target = input.to(device, memory_format=memory_format), target.to(device)
        with torch.autocast(device.type, amp) if amp else nullcontext():
            output = model(input).float()
        top1, top5 = accuracy(output, target, topk=(1, min(5, p.num_classes)))
        loss = nn.functional.cross_entropy(output, target)
        sums += torch.stack([top1, top5, loss, torch.ones_like(loss)]).double() * len(target)
    return sums


@torch.inference_mode()
def predict(
    job: Job,
    model: nn.Module,
    device: torch.device,
    reporter: "Reporter",
    planned: int | None = None,
) -> dict[str, np.ndarray] | None:
    """What the model says of each validation image, in the order of the data set.

    Args:
        planned: workers that the batch size is for, where others run.

    Returns:
        on rank 0, arrays of N images: `name` and `target` (N), `classes` and `probabilities` of the
        `TOP` likeliest classes (N, TOP), and the cross-entropy `loss` (N). None elsewhere.
    """
    p, rank, workers = job.params.pretrain, reporter.rank, reporter.world_size
    images = job.dataset.images("val")
    if len(images) < workers:
        raise PipelineError(
            f"{len(images)} validation images are too few for scaling.num_workers={workers}",
            "Lower scaling.num_workers",
        )
    own = list(range(rank, len(images), workers))
    loader = evaluation_loader(job, images, own, micro_batch(p, planned or workers), device)
    memory_format = torch.channels_last if p.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=memory_format).eval()  # type: ignore[call-overload]
    amp = amp_dtype(p.amp, device)
    done, found = 0, []
    for input, target in loader:
        input = input.to(device, memory_format=memory_format)
        with torch.autocast(device.type, amp) if amp else nullcontext():
            output = model(input).float().cpu()
        target = target.cpu()
        top = output.softmax(1).topk(min(TOP, output.shape[1]))
        loss = nn.functional.cross_entropy(output, target, reduction="none")
        found.append((target, top.indices, top.values, loss))
        done += len(target)
        reporter.progress(min(done * workers, len(images)), len(images), "img")
    mine: dict[str, np.ndarray] = {
        name: torch.cat(values).numpy()
        for name, values in zip(
            ("target", "classes", "probabilities", "loss"), zip(*found, strict=True), strict=True
        )
    }
    return _merged(mine, images.filenames(), rank, workers)


def _merged(
    mine: dict[str, np.ndarray], names: list[str], rank: int, workers: int
) -> dict[str, np.ndarray] | None:
    """The arrays of all workers, in the order of the images; on rank 0 alone."""
    parts: list[Any] = [mine]
    if workers > 1:
        parts = [None] * workers
        dist.all_gather_object(parts, mine)
    if rank:
        return None
    whole: dict[str, np.ndarray] = {"name": np.array(names)}
    whole |= {name: np.empty((len(names), *v.shape[1:]), v.dtype) for name, v in mine.items()}
    for other, part in enumerate(parts):
        for name, values in part.items():
            whole[name][other::workers] = values
    return whole
