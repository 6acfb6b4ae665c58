"""Classifiers and segmentors as files that run without this project: ONNX, AOTInductor's `.pt2`.

In ONNX the operator is a model-local function of standard operators, one for each window: what
reads the file needs to know nothing of it. In `.pt2` it is decomposed, and torch alone runs it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ops
from ops import library

from .predict import Classifier, Predictor, Segmentor

__all__ = ["ExportError", "example", "exportable", "write_graph", "write_onnx", "write_pt2"]

DOMAIN, OPSET = "elsa", 20


class ExportError(RuntimeError):
    """A model or a machine that can't export, with the reason."""


class _Normalised(nn.Module):
    """A model of images as they are: it takes RGB from 0 to 255.

    Shape: (B, 3, H, W) float32 to (B, classes) of a classifier, (B, classes, H, W) of a segmentor;
    both logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model((images - self.mean) / self.std)
        return logits


class _Segmentor(nn.Module):
    """mmseg's model from normalised images to logits of their size."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.corners: bool = model.align_corners

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model._forward(images)
        size = images.shape[2:]
        return nn.functional.interpolate(logits, size, None, "bilinear", self.corners)


def exportable(
    predictor: Predictor, size: tuple[int, int] | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The module to export, and what a reader of the file must know.

    Args:
        size: (H, W) of the images; None takes that of the model's evaluation.

    Returns:
        The module, in float32 on the CPU; and `task`, `classes`, `size` (H, W), `resize` (the side
        to scale to before a centre crop of `size`: the short one or, with `squash`, both; 0 scales
        to `size`), `interpolation`.

    Raises:
        ExportError: a detector, or a classifier of images that are no squares.
    """
    if isinstance(predictor, Classifier):
        config: Any = predictor.model.pretrained_cfg
        height, width = size or config["input_size"][1:]
        mode = config.get("crop_mode") or "center"
        if height != width or mode not in ("center", "squash"):
            raise ExportError(f"a classifier of {height} x {width} images by crop_mode={mode}")
        model = _Normalised(
            predictor.model, [255 * v for v in config["mean"]], [255 * v for v in config["std"]]
        )
        how: dict[str, Any] = {
            "resize": math.floor(height / config["crop_pct"]),
            "squash": mode == "squash",
            "interpolation": config["interpolation"],
        }
    elif isinstance(predictor, Segmentor):
        given = predictor.model.data_preprocessor
        model = _Normalised(_Segmentor(predictor.model), given.mean.flatten(), given.std.flatten())
        height, width = size or _evaluated_size(predictor)
        how = {"resize": 0, "squash": True, "interpolation": "bilinear"}
    else:
        raise ExportError(
            "a detector has several graphs, as how many boxes it finds is decided as it runs;"
            " see elsa.export_detector"
        )
    described = {"task": predictor.task, "classes": list(predictor.classes)}
    return model.eval(), {**described, "size": [int(height), int(width)], **how}


def _evaluated_size(predictor: Segmentor) -> tuple[int, int]:
    """Height and width of the evaluated images; their short side, where these have any shape."""
    steps = predictor.config.test_pipeline
    scale = next(step["scale"] for step in steps if str(step["type"]).endswith("Resize"))
    side = min(scale)
    return side, side


def example(size: Sequence[int], batch: int = 2) -> Tensor:
    """Images (batch, 3, H, W) float32, RGB from 0 to 255, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return 255 * torch.rand(batch, 3, *size, generator=generator)


def _traced(
    model: nn.Module, arguments: tuple[Any, ...], dynamic: tuple[Any, ...]
) -> torch.export.ExportedProgram:
    """The graph of the model.

    Raises:
        ExportError: torch can't trace it.
    """
    try:
        with torch.no_grad():
            return torch.export.export(model, arguments, dynamic_shapes=dynamic)
    except Exception as error:  # of whatever the model does that has no graph
        raise ExportError(f"torch can't trace the model: {error}") from error


def any_batch() -> tuple[dict[int, Any]]:
    """The first dimension of the only argument is free."""
    return ({0: torch.export.Dim("batch", min=1)},)


def write_onnx(model: nn.Module, described: Mapping[str, Any], file: Path) -> None:
    """Write an ONNX file from `images` (batch, 3, H, W) to `logits`, for any batch.

    Args:
        model, described: of `exportable`. The description is put into the file's metadata.

    Raises:
        ExportError: the model can't be exported, or the compiled operator or a package is missing.
    """
    arguments = (example(described["size"]),)
    write_graph(model, arguments, any_batch(), ("images", "logits"), described, file)


def write_graph(
    model: nn.Module,
    arguments: tuple[Any, ...],
    dynamic: tuple[Any, ...],
    names: tuple[str, ...],
    described: Mapping[str, Any],
    file: Path,
) -> None:
    """Write a module as an ONNX file.

    Args:
        arguments: examples of what it takes.
        dynamic: their free dimensions, as `torch.export` has them.
        names: of arguments and results, one after the other.
        described: for the file's metadata.

    Raises:
        ExportError: the model can't be exported, or the compiled operator or a package is missing.
    """
    try:
        import onnx
        from onnx import helper
        from onnxscript.values import Op, Opset
    except ImportError as error:
        raise ExportError(
            f"{error.name} is missing: install the extra `export` (pip install"
            " 'elsa-pipeline[export]')"
        ) from None
    if not library.use_compiled("cpu", "auto"):
        raise ExportError(
            f"an ONNX file is made from the compiled operator. {library.HOW_TO_BUILD}."
        )
    functions: dict[str, str] = {}

    def translate(
        v: Any,
        h_attn: Any,
        ghost_mul: Any = None,
        ghost_add: Any = None,
        kernel_size: int = 7,
        dilation: int = 1,
        stride: int = 1,
        border: str = "zeros",
    ) -> Any:
        """One node, which calls the function of its kind."""
        if border != "zeros":
            raise ExportError(f"a model with border={border!r} is not exported")
        given = {"mul": ghost_mul, "add": ghost_add}
        kinds = [name for name, value in given.items() if value is not None]
        name = "_".join([f"LocalAttention_k{kernel_size}_d{dilation}_s{stride}", *kinds])
        functions[name] = _function(name, kernel_size, dilation, stride, kinds)
        schema = onnx.defs.OpSchema
        parameters = [schema.FormalParameter(n, "T") for n in ("v", "attn", *kinds)]
        described = schema(
            name,
            DOMAIN,
            1,
            inputs=parameters,
            outputs=[schema.FormalParameter("out", "T")],
            type_constraints=[("T", ["tensor(float)"], "")],
            attributes=[schema.Attribute("channels", schema.AttrType.INT)],
        )
        arguments = [value for value in given.values() if value is not None]
        node = Op(Opset(DOMAIN, 1), name, described)
        return node(v, h_attn, *arguments, channels=int(v.shape[1]))

    with ops.use_backend("compiled"):
        traced = _traced(model, arguments, dynamic)
        count = len(torch.utils._pytree.tree_leaves(arguments))
        try:
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table={torch.ops.elsa.elsa_attention.default: translate},
                input_names=list(names[:count]),
                output_names=list(names[count:]),
                verbose=False,
            )
        except ExportError:
            raise
        except Exception as error:
            raise ExportError(f"torch can't write the model as ONNX: {error}") from error
    assert program is not None
    proto = program.model_proto
    proto.functions.extend(onnx.parser.parse_function(text) for text in functions.values())
    if functions and DOMAIN not in {one.domain for one in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    helper.set_model_props(proto, {"elsa": json.dumps(described)})
    onnx.checker.check_model(proto)
    onnx.save(proto, str(file))


def _function(name: str, k: int, dilation: int, stride: int, kinds: Sequence[str]) -> str:
    """The operator in ONNX's text form: `ops.elsa_attention` with the border "zeros".

    Args:
        kinds: which of the ghosts `mul` and `add` it takes.
    """
    pad = dilation * (k // 2)
    lines = [
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>',
        f"{name} <channels> ({', '.join(['v', 'attn', *kinds])}) => (out) {{",
        f"  pads = Constant <value = int64[4] {{{pad}, {pad}, {pad}, {pad}}}> ()",
        "  axes = Constant <value = int64[2] {2, 3}> ()",
        '  padded = Pad <mode = "constant"> (v, pads, , axes)',
        "  image = Shape <start = 2, end = 4> (v)",
        f"  step = Constant <value = int64[2] {{{stride}, {stride}}}> ()",
        "  size = Div (image, step)",
        "  extent = Mul (size, step)",
        "  batch = Shape <start = 0, end = 1> (attn)",
        "  heads = Shape <start = 1, end = 2> (attn)",
        "  rest = Constant <value = int64[1] {-1}> ()",
        "  one = Constant <value = int64[1] {1}> ()",
        "  two = Constant <value = int64[1] {2}> ()",
        "  ones = Constant <value = int64[2] {1, 1}> ()",
        "  by_head = Concat <axis = 0> (batch, heads, rest, size)",
        "  result = Concat <axis = 0> (batch, rest, size)",
        "  of_mul = Concat <axis = 0> (heads, rest, ones)",
    ]
    for i in range(k * k):
        row, column = i // k, i % k
        start = f"{{{row * dilation}, {column * dilation}}}"
        lines += [
            f"  start{i} = Constant <value = int64[2] {start}> ()",
            f"  end{i} = Add (start{i}, extent)",
            f"  window{i} = Slice (padded, start{i}, end{i}, axes, step)",
            f"  values{i} = Reshape (window{i}, by_head)",
            f"  index{i} = Constant <value = int64 {{{i}}}> ()",
            f"  one{i} = Gather <axis = 2> (attn, index{i})",
            f"  weight{i} = Unsqueeze (one{i}, two)",
        ]
        weight = f"weight{i}"
        if "mul" in kinds:
            lines += [
                f"  place{i} = Constant <value = int64[2] {{{row}, {column}}}> ()",
                f"  next{i} = Add (place{i}, ones)",
                f"  axes{i} = Constant <value = int64[2] {{1, 2}}> ()",
                f"  part{i} = Slice (mul, place{i}, next{i}, axes{i})",
                f"  mul{i} = Reshape (part{i}, of_mul)",
                f"  scaled{i} = Mul (weight{i}, mul{i})",
            ]
            weight = f"scaled{i}"
        lines.append(f"  term{i} = Mul ({weight}, values{i})")
        before = f"sum{i - 1}"
        lines.append(f"  sum{i} = {f'Add ({before}, term{i})' if i else 'Identity (term0)'}")
    lines.append(f"  dynamic = Reshape (sum{k * k - 1}, result)")
    if "add" in kinds:  # a depthwise convolution; with a stride it yields rows that are dropped
        lines += [
            "  filters = Unsqueeze (add, one)",
            f"  whole = Conv <group : int = @channels, kernel_shape = [{k}, {k}],"
            f" dilations = [{dilation}, {dilation}], strides = [{stride}, {stride}],"
            f" pads = [{pad}, {pad}, {pad}, {pad}]> (v, filters)",
            "  zeros = Constant <value = int64[2] {0, 0}> ()",
            "  static = Slice (whole, zeros, size, axes)",
            "  out = Add (dynamic, static)",
        ]
    else:
        lines.append("  out = Identity (dynamic)")
    return "\n".join([*lines, "}"])


def write_pt2(model: nn.Module, described: Mapping[str, Any], file: Path) -> None:
    """Compile the model by AOTInductor for this machine's CPU, for any batch.

    Args:
        model, described: of `exportable`. The description is put into the file's metadata.

    Raises:
        ExportError: the model can't be exported or compiled.
    """
    from torch._inductor import aoti_compile_and_package

    with ops.use_backend("reference"):
        traced = _traced(model, (example(described["size"]),), any_batch())
    try:
        aoti_compile_and_package(
            traced,
            package_path=str(file),
            inductor_configs={"aot_inductor.metadata": {"elsa": json.dumps(described)}},
        )
    except Exception as error:
        raise ExportError(f"torch can't compile the model: {error}") from error
