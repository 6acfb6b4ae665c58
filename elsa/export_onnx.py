"""A graph as an ONNX file.

The operator is a model-local function of standard operators, one for each kind of window: what
reads the file needs to know nothing of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import ops
from ops import library

from .export import ExportError, Graph

__all__ = ["write_onnx"]

DOMAIN, OPSET = "elsa", 20


def write_onnx(graph: Graph, described: Mapping[str, Any], file: Path) -> None:
    """Write an ONNX file.

    Args:
        described: what a reader of the file must know; put into its metadata.

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
        traced = graph.trace()
        try:
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table={torch.ops.elsa.elsa_attention.default: translate},
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
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
