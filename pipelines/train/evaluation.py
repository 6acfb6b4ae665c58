"""Predictions of a classifier for every validation image, by one or several processes."""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.utils import accuracy
from torch import nn

from pipelines.data.images import images_of
from pipelines.params import Pretrain
from pipelines.train.agreement import gather
from pipelines.train.job import Job
from pipelines.train.loading import evaluation_loader

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
    p: Pretrain, model: nn.Module, loader: Any, device: torch.device, world_size: int
) -> torch.Tensor:
    """Of all ranks' images: top-1 and top-5 in percent and the loss, each added up in the order of
    the batches, and their number; float64 of shape (4).

    Args:
        loader: of this rank, from `evaluation_loader`.
    """
    amp = amp_dtype(p.amp, device)
    memory_format = torch.channels_last if p.channels_last else torch.contiguous_format
    model.eval()
    sums = []
    for input, target in loader:
        input, target = input.to(device, memory_format=memory_format), target.to(device)
        with torch.autocast(device.type, amp) if amp else nullcontext():
            output = model(input).float()
        top1, top5 = accuracy(output, target, topk=(1, min(5, p.num_classes)))
        loss = nn.functional.cross_entropy(output, target)
        sums.append(torch.stack([top1, top5, loss, torch.ones_like(loss)]).double() * len(target))
    own = torch.stack(sums).tolist() if sums else []
    return torch.tensor(_in_order(gather(own, world_size)), dtype=torch.float64).sum(0)


@torch.inference_mode()
def predict(
    job: Job, model: nn.Module, device: torch.device, reporter: "Reporter"
) -> dict[str, np.ndarray] | None:
    """What the model says of each validation image, in the order of the data set.

    Returns:
        on rank 0, arrays of N images: `name` and `target` (N), `classes` and `probabilities` of the
        `TOP` likeliest classes (N, TOP), and the cross-entropy `loss` (N). None elsewhere.
    """
    p, rank, workers = job.params.pretrain, reporter.rank, reporter.world_size
    images = images_of(job.dataset, "val")
    loader = evaluation_loader(job, images, list(range(len(images))), device, rank, workers)
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
    batches = _in_order(gather(found, workers))
    if rank:
        return None
    names = ("target", "classes", "probabilities", "loss")
    columns = zip(names, zip(*batches, strict=True), strict=True)
    arrays = {name: torch.cat(parts).numpy() for name, parts in columns}
    return {"name": np.array(images.filenames()), **arrays}


def _in_order(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """What the ranks found for each batch, in the order of the batches."""
    rounds = zip_longest(*parts)
    return [found for batches in rounds for found in batches if found is not None]
