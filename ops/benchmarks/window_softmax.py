"""Times `window_softmax` beside torch's softmax: `python -m ops.benchmarks.window_softmax`.

The maps are those of the three stages of ELSA-Swin-T at 224 px, as a convolution with channels_last
leaves them (a pixel's k*k logits side by side) and as planes. torch's softmax then has a contiguous
result, too. The copy moves the bytes of one read and one write of the map, forward, and of two
reads and a write, backward. Device times with a cold cache, medians.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ops
from ops.benchmarks.bench import Bench, Times

STAGES = {f"stage {stage + 1}": (3 << stage, 49, 56 >> stage, 56 >> stage) for stage in range(3)}


def torch_softmax(logits: Tensor) -> Tensor:
    """What `window_softmax` replaces."""
    return logits.softmax(2, dtype=logits.dtype).contiguous()


def measure(bench: Bench, logits: Tensor) -> dict[str, Times]:
    """Milliseconds of ours, torch's and the copy."""
    copies = [bench.copy(planes * logits.nbytes) for planes in (2, 3, 5)]
    return {
        "ours": bench.measure(ops.window_softmax, [logits]),
        "torch": bench.measure(torch_softmax, [logits]),
        "copy": Times(*copies),
    }


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ops.benchmarks.window_softmax",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.2, help="spent on each figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    ops.set_backend("compiled")
    bench = Bench(args.device, args.seconds)
    if not bench.cuda:
        print("on a CPU both are torch's: a rehearsal")
    print("ms; in brackets that time over ours, so that more than 1x means that ours is faster")
    print("\n| map (B, G, k*k, H, W), layout | pass | ours | torch | copy |")
    print("|---|---|---:|---:|---:|")
    figures: dict[str, Any] = {}
    for stage, size in STAGES.items():
        dtype = getattr(torch, args.dtype)
        planes = torch.randn(args.batch, *size, device=args.device).to(dtype)
        together = planes.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
        for layout, logits in (("channels_last", together), ("planes", planes)):
            found = measure(bench, logits)
            figures[f"{stage}, {layout}"] = {who: t._asdict() for who, t in found.items()}
            for which in Times._fields:
                own, *others = (getattr(times, which) for times in found.values())
                name = f"{stage} {tuple(logits.shape)}, {layout}" if which == "forward" else ""
                cells = [f"{time:.3g} ({time / own:.2f}x)" for time in others]
                print(f"| {name} | {which} | {own:.3g} | {' | '.join(cells)} |", flush=True)
        if args.json:  # after each stage, so that a time limit loses one and not all
            args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
