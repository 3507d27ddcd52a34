"""Int8 for operators that ONNX Runtime's transformer optimizer has fused already.

That optimizer (`onnxruntime.transformers.optimizer`) packs attention with its projections, and embeddings with their
norm, into one operator each. ONNX Runtime's quantizer has int8 versions of both, but stops at such graphs with "Unable
to find data type for weight_name", because shape inference does not know the fused operators, unless it is told which
type tensors of unknown type have.
"""

from __future__ import annotations

import logging
from collections import Counter

from onnx import ModelProto, TensorProto
from onnxruntime.quantization import QuantizationMode, QuantType
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer

from ..export.graph import attribute, to_array


logger = logging.getLogger(__name__)

ATTENTION, EMBEDDING = "Attention", "EmbedLayerNormalization"


def quantize_fused_operators(
    model: ModelProto, per_channel: bool = True, reduce_range: bool = False, exclude: frozenset[str] = frozenset()
) -> tuple[ModelProto, dict[str, int]]:
    """Makes `Attention` and `EmbedLayerNormalization` int8; their activations are rounded at run time.

    Args:
        model: A model, fused or not.
        per_channel: One weight scale for each output feature.
        reduce_range: 7-bit weights.
        exclude: Names of nodes to leave in single precision.

    Returns:
        The model, and how many of each operator are int8 now.
    """
    found = [node for node in model.graph.node if node.op_type in (ATTENTION, EMBEDDING) and node.name not in exclude]
    wanted = [node for node in found if not _has_unequal_sizes(node)]
    for node in found:
        if node not in wanted:
            logger.warning(
                "%s stays in single precision: its heads have unequal sizes for keys and values.", node.name
            )
    if not wanted:
        return model, {}
    _name_nodes(model)
    quantizer = ONNXQuantizer(
        model,
        per_channel=per_channel,
        reduce_range=reduce_range,
        mode=QuantizationMode.IntegerOps,
        static=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=None,
        nodes_to_quantize=[node.name for node in wanted],
        nodes_to_exclude=[],
        op_types_to_quantize=[ATTENTION, EMBEDDING],
        extra_options={"DefaultTensorType": TensorProto.FLOAT, "WeightSymmetric": True},
    )
    quantizer.quantize_model()
    return quantizer.model.model, dict(Counter(node.op_type for node in wanted))


def _has_unequal_sizes(node) -> bool:
    sizes = attribute(node, "qkv_hidden_sizes")
    # The int8 operator assumes three equal parts; the quantizer leaves it alone as soon as the attribute is there.
    return sizes is not None


def _name_nodes(model: ModelProto) -> None:
    """The optimizer leaves some nodes without a name, and the quantizer selects by name."""
    taken = {node.name for node in model.graph.node}
    for index, node in enumerate(model.graph.node):
        if not node.name:
            name = f"{node.op_type}_{index}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)


def weight_types(model: ModelProto) -> Counter[str]:
    """How many bytes of constants a model holds, by type name."""
    sizes: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        sizes[TensorProto.DataType.Name(tensor.data_type)] += to_array(tensor).nbytes
    return sizes
