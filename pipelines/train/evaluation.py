"""Predictions of a classifier for every validation image, by one or several processes."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from pipelines.data.images import DataPlace
from pipelines.errors import PipelineError
from pipelines.params import Pretrain
from pipelines.run.reporter import Reporter
from pipelines.train.loading import evaluation_loader

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
def predict(
    p: Pretrain,
    model: nn.Module,
    data: DataPlace,
    device: torch.device,
    reporter: Reporter,
    planned: int | None = None,
) -> dict[str, np.ndarray] | None:
    """What the model says of each validation image, in the order of the data set.

    Args:
        planned: workers that the batch size is for, where others run.

    Returns:
        on rank 0, arrays of N images: `name` and `target` (N), `classes` and `probabilities` of the
        `TOP` likeliest classes (N, TOP), and the cross-entropy `loss` (N). None elsewhere.
    """
    rank, workers = reporter.rank, reporter.world_size
    images = data.images("val")
    if len(images) < workers:
        raise PipelineError(
            f"{len(images)} validation images are too few for scaling.num_workers={workers}"
        )
    own = list(range(rank, len(images), workers))
    loader = evaluation_loader(p, images, own, p.micro_batch(planned or workers), device)
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
    parts: list[Any] = [None] * workers
    if workers > 1:
        dist.all_gather_object(parts, mine)
    else:
        parts = [mine]
    if rank:
        return None
    whole: dict[str, np.ndarray] = {"name": np.array(images.filenames())}
    whole |= {name: np.empty((len(images), *v.shape[1:]), v.dtype) for name, v in mine.items()}
    for other, part in enumerate(parts):
        for name, values in part.items():
            whole[name][other::workers] = values
    return whole
