"""One training step by kernel: `python -m elsa.benchmarks.profile --device cuda`."""

from __future__ import annotations

import argparse
import sys

import timm
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import elsa  # noqa: F401  registers the models
import ops


def main(argv: list[str] | None = None) -> int:
    """Print the kernels that take the most time; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m elsa.benchmarks.profile", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--model", help="default: elsa_swin_tiny, elsa_swin_micro on a CPU")
    parser.add_argument("--batch", type=int, help="images; default 128, 2 on a CPU")
    parser.add_argument("--rows", type=int, default=30, help="kernels to show; default %(default)s")
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    ops.set_backend("compiled")
    name = args.model or ("elsa_swin_tiny" if cuda else "elsa_swin_micro")
    model = timm.create_model(name).to(args.device).train()
    config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    assert config
    side = config.input_size[-1]
    batch = args.batch or (128 if cuda else 2)
    images = torch.randn(batch, 3, side, side, device=args.device)
    labels = torch.zeros(batch, dtype=torch.long, device=args.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()

    for _ in range(5 if cuda else 1):
        step()
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        step()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(f"{name}, {side} px, batch {batch}, bfloat16")
    averages = found.key_averages()
    print(averages.table(sort_by=order, row_limit=args.rows, max_name_column_width=80))
    return 0


if __name__ == "__main__":
    sys.exit(main())
