"""Graphs in ONNX made int8: weights and activations as whole numbers of 8 bits, by onnxruntime.

Encoders are quantized statically: the scales of their activations, how much a step of the 255 is,
are measured once, on some photographs. Those of what the decoder's step multiplies are measured at
each word.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process


class Squares(CalibrationDataReader):
    """Photographs as the encoder is given them, one after the other.

    Args:
        squares: arrays (3, S, S) uint8.
    """

    def __init__(self, squares):
        self.inputs = ({"images": square[np.newaxis]} for square in squares)

    def get_next(self):
        return next(self.inputs, None)


def quantize_encoder(source, path, squares):
    """Writes the graph of `source` to `path`, in int8 as far as onnxruntime has operations.

    Args:
        squares: an iterable of arrays (3, S, S) uint8, on which the scales are measured.
    """
    with TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")  # its shapes inferred, its convolutions fused
        quant_pre_process(source, prepared)
        quantize_static(
            prepared,
            path,
            Squares(squares),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def quantize_step(source, path):
    """Writes the graph of `source` to `path`, its matrices in int8."""
    graph = onnx.load(source).graph
    vectors = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 1}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    # what multiplies a vector, as the attention's w, has no columns to give scales to
    left = [node.name for node in products if node.input[1] in vectors]
    quantize_dynamic(
        source, path, per_channel=True, weight_type=QuantType.QInt8, nodes_to_exclude=left
    )
