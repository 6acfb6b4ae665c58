"""Comparing the loaded operator with the float64 reference: `python -m ops.check --device cuda`."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops import library
from ops.reference import elsa_attention_reference
from ops.softmax import window_softmax

# float32 sums of up to k*k or B*H*W terms; halves are compared on their own rounded inputs.
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
GHOSTS = ("mul add", "add", "mul", "")


@dataclass(frozen=True)
class Case:
    """One call: the sizes of the operator's inputs, and how they lie in memory."""

    B: int
    C: int
    G: int
    H: int
    W: int
    kernel_size: int
    dilation: int = 1
    stride: int = 1
    ghosts: str = "mul add"
    border: str = "zeros"
    wide_ghosts: bool = False
    """The ghost heads are float32 beside halves."""
    channels_last: bool = False
    """The channels of v lie side by side, among others."""
    not_finite: bool = False
    """Some values are NaN or infinite."""

    def __str__(self) -> str:
        sizes = ", ".join(map(str, astuple(self)[:8]))
        notes = [f"ghosts {self.ghosts or 'none'}", f"border {self.border}"]
        notes += ["float32 ghosts"] * self.wide_ghosts
        notes += ["channels_last"] * self.channels_last
        notes += ["NaN and infinity"] * self.not_finite
        return f"B, C, G, H, W, k, dilation, stride = {sizes}; {', '.join(notes)}"


# On a GPU those with halves and without `ghost_mul` run on tensor cores, the others do not.
QUICK = (
    Case(2, 96, 3, 19, 23, 7),
    Case(2, 24, 2, 14, 14, 5, dilation=2),
    Case(1, 12, 3, 17, 9, 3, stride=2),
    Case(2, 6, 6, 5, 4, 9),
    Case(2, 96, 3, 19, 28, 7, ghosts="add"),
    Case(1, 64, 2, 30, 26, 7, ghosts="add", wide_ghosts=True),
    Case(1, 24, 1, 9, 21, 5, ghosts=""),
    Case(2, 24, 2, 14, 15, 5, dilation=2, border="shift"),
)
"""What every build is checked with."""

_SIZES = (
    Case(2, 96, 3, 56, 56, 7),
    Case(2, 192, 6, 28, 28, 7),
    Case(2, 384, 12, 14, 14, 7),
    Case(1, 32, 1, 20, 24, 7),
    Case(1, 64, 2, 9, 70, 5),
    Case(2, 16, 2, 13, 17, 3),
    Case(1, 64, 1, 33, 31, 9),
    Case(1, 48, 1, 40, 70, 9),
    Case(1, 24, 3, 5, 7, 7),
    Case(1, 32, 1, 1, 1, 7),
    Case(1, 20, 2, 18, 27, 7, dilation=2),
    Case(1, 16, 2, 17, 19, 5, dilation=2, stride=3),
    Case(1, 8, 2, 15, 18, 13),
)
_SHIFTED = (
    Case(2, 96, 3, 56, 56, 7),
    Case(1, 64, 2, 28, 30, 17),
    Case(1, 20, 2, 18, 27, 7, dilation=2),
    Case(1, 16, 2, 17, 19, 5, dilation=2, stride=3),
)
THOROUGH = (
    *QUICK,
    *(replace(case, ghosts=ghosts) for case, ghosts in itertools.product(_SIZES, GHOSTS)),
    *(replace(case, ghosts="add", wide_ghosts=True) for case in _SIZES),
    *(replace(case, ghosts="add", channels_last=True) for case in _SIZES),
    *(replace(case, ghosts=ghosts, border="shift") for case in _SHIFTED for ghosts in GHOSTS),
    *(replace(case, ghosts=g, not_finite=True) for case in _SIZES[:6] for g in ("add", "mul add")),
)
"""What `--thorough` adds to them: the shapes of ELSA-Swin, odd sizes, layouts, NaN."""


def devices() -> list[str]:
    """The device types that the loaded library has kernels for and this machine has."""
    return ["cpu", "cuda"] if library.state.cuda and torch.cuda.is_available() else ["cpu"]


def _inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The case's tensors, in their own dtypes; the same on every device."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    k, taps = case.kernel_size, case.kernel_size**2
    out = case.H // case.stride, case.W // case.stride
    tensors = {
        "v": draw(case.B, case.C, case.H, case.W).to(dtype),
        "h_attn": draw(case.B, case.G, taps, *out).softmax(2).to(dtype),
        "ghost_mul": draw(case.C, k, k),
        "ghost_add": draw(case.C, k, k),
    }
    halves = dtype in (torch.bfloat16, torch.float16)
    for kind in ("mul", "add"):
        ghost = tensors.pop(f"ghost_{kind}")
        if kind in case.ghosts.split():
            tensors[f"ghost_{kind}"] = ghost.to(
                torch.float32 if halves and case.wide_ghosts else dtype
            )
    if case.not_finite:
        flat = tensors["v"].view(-1)
        flat[flat.numel() // 3] = float("nan")
        flat[flat.numel() // 2] = float("inf")
    tensors = {name: t.to(device) for name, t in tensors.items()}
    if case.channels_last:  # as of a layer that makes v beside other channels
        wide = torch.zeros(case.B, case.H, case.W, case.C + 16, dtype=dtype, device=device)
        tensors["v"] = wide[..., 8 : 8 + case.C].permute(0, 3, 1, 2).copy_(tensors["v"])
    return tensors


def _results(
    case: Case, tensors: dict[str, Tensor], upstream: Tensor, compiled: bool
) -> dict[str, Tensor]:
    """Output and gradients, of the compiled operator or the reference."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    arguments = [leaves.get(n) for n in ("v", "h_attn", "ghost_mul", "ghost_add")]
    if compiled:
        window = case.kernel_size, case.dilation, case.stride, case.border
        out = torch.ops.elsa.elsa_attention(*arguments, *window)
    else:
        out = elsa_attention_reference(
            *arguments,  # type: ignore[arg-type]
            kernel_size=case.kernel_size,
            dilation=case.dilation,
            stride=case.stride,
            border=case.border,
        )
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream)
    named = zip((f"grad_{name}" for name in leaves), gradients, strict=True)
    return {"out": out.detach(), **dict(named)}


def errors_of(case: Case, dtype: torch.dtype, device: str) -> dict[str, float]:
    """The largest error of the output and of each gradient, relative to the tensor's largest value.

    The reference runs on the CPU. With NaN and infinity among the values the output counts alone,
    as infinity where other elements than the reference's are not finite. Where a second call gives
    other bits, "<tensor> of a second call" is there too, as infinity.
    """
    tensors = _inputs(case, dtype, device)
    generator = torch.Generator().manual_seed(1)
    size = case.B, case.C, case.H // case.stride, case.W // case.stride
    upstream = torch.randn(size, generator=generator).to(device, dtype)
    ours, again = (
        {name: t.cpu() for name, t in _results(case, tensors, upstream, compiled=True).items()}
        for _ in range(2)
    )
    wide = {name: t.to("cpu", torch.float64) for name, t in tensors.items()}
    theirs = _results(case, wide, upstream.to("cpu", torch.float64), compiled=False)
    found = {}
    for name, exact in theirs.items():
        if not torch.equal(ours[name].nan_to_num(), again[name].nan_to_num()):
            found[f"{name} of a second call"] = float("inf")
        mine = ours[name].double()
        if case.not_finite:
            if name != "out":
                continue
            finite = exact.isfinite()
            if not torch.equal(finite, mine.isfinite()):
                found[name] = float("inf")
                continue
            mine, exact = mine[finite], exact[finite]
        largest = exact.abs().max().clamp_min(1e-30) if exact.numel() else 1.0
        found[name] = float((mine - exact).abs().max() / largest) if exact.numel() else 0.0
    return found


# (B, G, k*k, H, W) of the maps that `window_softmax` is checked with.
SOFTMAX_SIZES = ((2, 3, 49, 56, 56), (1, 12, 49, 14, 14), (2, 1, 9, 5, 7), (1, 2, 289, 19, 3))


def softmax_errors(
    size: tuple[int, ...], side_by_side: bool, dtype: torch.dtype, device: str
) -> dict[str, float]:
    """The largest errors of `window_softmax` and its gradient, as shares of the largest value.

    With `side_by_side` the map is what a convolution with channels_last leaves.
    """
    generator = torch.Generator().manual_seed(0)
    logits, upstream = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)
        for _ in range(2)
    )
    if side_by_side:
        logits = logits.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    exact = logits.double().requires_grad_()
    ours = logits.requires_grad_()
    weights, expected = window_softmax(ours), exact.softmax(2)
    (grad,) = torch.autograd.grad(weights, ours, upstream)
    (exact_grad,) = torch.autograd.grad(expected, exact, upstream.double())
    pairs = {"weights": (weights, expected), "grad_logits": (grad, exact_grad)}
    return {
        name: float(((mine.double() - theirs).abs().max() / theirs.abs().max()).detach())
        for name, (mine, theirs) in pairs.items()
    }


@dataclass
class Findings:
    """What cases gave."""

    count: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    """The largest error by "dtype tensor"."""
    off: list[str] = field(default_factory=list)
    """A line per tensor beyond the tolerance of its dtype."""

    def add(self, case: Any, dtype: torch.dtype, errors: dict[str, float]) -> None:
        """Count a case."""
        self.count += 1
        tolerance = TOLERANCES[dtype]
        for tensor, error in errors.items():
            key = f"{str(dtype).removeprefix('torch.')} {tensor}"
            self.worst[key] = max(self.worst.get(key, 0.0), error)
            if not error <= tolerance:
                what = (
                    f"differs from the float64 reference by {error:.3g} (allowed {tolerance:.3g})"
                )
                if tensor.endswith("second call"):
                    what = "has other bits than the first"
                self.off.append(f"{key} {what} at {case}")


def compare(device: str, cases: Iterable[Case]) -> Iterator[Findings]:
    """The findings so far, after each case and dtype."""
    found = Findings()
    for case, dtype in itertools.product(cases, TOLERANCES):
        found.add(case, dtype, errors_of(case, dtype, device))
        yield found
    if device == "cpu":  # there it is torch's softmax
        return
    for size, together, dtype in itertools.product(SOFTMAX_SIZES, (False, True), TOLERANCES):
        what = f"the softmax of {size}" + ", a pixel's taps side by side" * together
        found.add(what, dtype, softmax_errors(size, together, dtype, device))
        yield found


def check(device: str = "cpu", cases: Iterable[Case] = QUICK) -> dict[str, float]:
    """Compare the loaded library's kernels for `device` with the float64 reference.

    Returns:
        For each dtype and tensor the largest error, relative to the tensor's largest value.

    Raises:
        RuntimeError: an error beyond the tolerance of its dtype, or no library loaded.
    """
    if library.loaded_library() is None:
        raise RuntimeError(f"no compiled operator is loaded. {library.HOW_TO_BUILD}.")
    found = Findings()
    for found in compare(device, cases):
        if found.off:
            raise RuntimeError(f"the compiled operator is wrong on {device}: {found.off[0]}")
    return found.worst


def main(argv: list[str] | None = None) -> int:
    """Print each case that is off and the largest errors; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ops.check",
        description="Compare the built operator with the float64 reference, in values, gradients "
        "and repeatability.",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--thorough", action="store_true", help="many more cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    try:
        library.use_compiled(args.device, "compiled")
        if args.device not in devices():
            raise RuntimeError("torch sees no GPU")
    except (RuntimeError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    told, found = 0, Findings()
    for found in compare(args.device, THOROUGH if args.thorough else QUICK):
        for line in found.off[told:]:
            print(line, flush=True)
        told = len(found.off)
        if args.json:  # after each case, so that a time limit loses what is left and no more
            args.json.write_text(json.dumps(asdict(found), indent=2) + "\n")
    print(f"{found.count} cases on {args.device}, {told} tensors off")
    for key, largest in sorted(found.worst.items()):
        print(f"  {key}: {largest:.2g}")
    return 1 if told else 0


if __name__ == "__main__":
    raise SystemExit(main())
