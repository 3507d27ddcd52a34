"""Replaces matrix products and embedding tables of an ONNX graph by int8 ones, for ONNX Runtime's CPU kernels.

Weights are int8, one scale for each output feature. Activations are uint8: their range is taken from the tensor itself
at run time (dynamic), or from calibration (static). Sums are 32-bit integers, and what leaves an operator is single
precision again, bias included, so that everything between the products stays as exact as it was.

Writing these operators directly, where ONNX Runtime's quantizer writes four to six standard ones, keeps the bias inside
the product and shares the rounding of an activation between the products that read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..export.graph import MICROSOFT, add_domain, attribute, outer_names, subgraphs, to_array
from .weights import quantize_symmetric, unsigned_range


Range = tuple[float, float]
# Smaller tables save nothing. T5 keeps its position biases, which are scores and no vectors, in one of 32 rows.
MIN_TABLE_ROWS = 48
MIN_TABLE_COLUMNS = 8


@dataclass(frozen=True)
class IntegerOptions:
    """How [`quantize_integer`] rounds.

    Attributes:
        per_channel: One weight scale for each output feature instead of one for the matrix.
        reduce_range: 7-bit weights, for processors without VNNI.
        embeddings: Whether embedding tables become int8, with one scale for each row.
        pairs: Whether products stay standard operators, with a QuantizeLinear and a DequantizeLinear on their inputs
            (symmetric int8) and int8 weights behind a DequantizeLinear, for runtimes such as TensorRT that make int8
            kernels of that themselves. Products whose range is not known stay in single precision.
        exclude: Names of nodes to leave in single precision.
    """

    per_channel: bool = True
    reduce_range: bool = False
    embeddings: bool = True
    pairs: bool = False
    exclude: frozenset[str] = frozenset()


DEFAULT_OPTIONS = IntegerOptions()


@dataclass
class _Product:
    """A matrix product with a constant right factor, and the sum with its bias."""

    nodes: list[NodeProto]
    source: str
    weight: str
    transposed: bool
    bias: str | None
    output: str
    # Whether it is computed with the opposite sign.
    negative: bool = False


def products_of(model: ModelProto, options: IntegerOptions = DEFAULT_OPTIONS) -> dict[str, str]:
    """The products of the main graph that can be computed in int8.

    Returns:
        Their left factors, by the name of the node: the tensors to calibrate.
    """
    scope = _Scope(model.graph, {}, options)
    return {product.nodes[0].name: product.source for product in scope.products}


def quantize_integer(
    model: ModelProto, options: IntegerOptions = DEFAULT_OPTIONS, ranges: Mapping[str, Range] | None = None
) -> dict[str, int]:
    """Makes a model int8, in place; sub-graphs (merged decoders) too.

    Args:
        model: A model in single precision.
        options: How to round.
        ranges: `(low, high)` of activations, by tensor name: these are rounded with constant scales. The range of all
            others is taken at run time.

    Returns:
        How many of each were made int8: `static`, `dynamic` (products) and `tables`.
    """
    counts = {"static": 0, "dynamic": 0, "tables": 0}
    rounded: dict[tuple[str, bool, bool], tuple[str, str]] = {}
    _quantize_graph(model.graph, {}, options, dict(ranges or {}), counts, model.graph, rounded)
    _drop_unused_initializers(model.graph)
    if (counts["static"] or counts["dynamic"]) and not options.pairs:
        add_domain(model, MICROSOFT)
    return counts


class _Scope:
    """What a graph can see: its constants and those of the graphs around it."""

    def __init__(self, graph: GraphProto, outer: Mapping[str, TensorProto], options: IntegerOptions):
        self.graph = graph
        self.constants: dict[str, TensorProto] = dict(outer)
        self.constants.update({tensor.name: tensor for tensor in graph.initializer})
        self._read_constants_directly()
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in {*node.input, *outer_names(node)}:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}
        self.products = [
            product
            for node in graph.node
            if node.name not in options.exclude and (product := self._product(node)) is not None
        ]

    def _read_constants_directly(self) -> None:
        """Takes away what passes constants on: exporters store equal ones once, with an `Identity` for each other."""
        sources: dict[str, str] = {}
        outputs = {value.name for value in self.graph.output}
        kept = []
        for node in self.graph.node:
            source = sources.get(node.input[0], node.input[0]) if node.op_type == "Identity" else ""
            if source in self.constants and node.output[0] not in outputs:
                sources[node.output[0]] = source
            else:
                kept.append(node)
        if sources:
            del self.graph.node[:]
            self.graph.node.extend(kept)
            _rename_inputs(self.graph, sources)

    def matrix(self, name: str) -> TensorProto | None:
        tensor = self.constants.get(name)
        is_matrix = tensor is not None and tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2
        return tensor if is_matrix else None

    def _product(self, node: NodeProto) -> _Product | None:
        if node.op_type == "MatMul" and self.matrix(node.input[1]) is not None:
            product = _Product([node], node.input[0], node.input[1], False, None, node.output[0])
            readers = self.readers.get(node.output[0], [])
            if len(readers) == 1 and readers[0].op_type == "Add" and node.output[0] not in self.outputs:
                other = [name for name in readers[0].input if name != node.output[0]]
                columns = self.matrix(node.input[1]).dims[1]
                if len(other) == 1 and self._is_vector(other[0], columns):
                    product.nodes.append(readers[0])
                    product.bias, product.output = other[0], readers[0].output[0]
            return product
        if node.op_type == "Gemm" and self.matrix(node.input[1]) is not None:
            transposed = bool(attribute(node, "transB", 0))
            columns = self.matrix(node.input[1]).dims[0 if transposed else 1]
            bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
            plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
            if plain and not attribute(node, "transA", 0) and (bias is None or self._is_vector(bias, columns)):
                return _Product([node], node.input[0], node.input[1], transposed, bias, node.output[0])
        return None

    def _is_vector(self, name: str, size: int) -> bool:
        tensor = self.constants.get(name)
        return tensor is not None and list(tensor.dims) == [size]

    def negate_summands(self) -> None:
        """Writes the sum of a residual stream and a product as a difference, the product with the opposite sign.

        ONNX Runtime computes `Sum` on one thread, `Sub` on all of them; it fuses `Add` with the norm behind it into an
        operator that is slower than both. The sign costs nothing: it goes into the scale of the weights.
        """
        for product in self.products:
            readers = self.readers.get(product.output, [])
            if len(readers) != 1 or product.output in self.outputs:
                continue
            node = readers[0]
            if node.op_type == "Sum" and len(node.input) == 2 and node.input[0] != node.input[1]:
                other = node.input[1 if node.input[0] == product.output else 0]
                node.op_type = "Sub"
                node.input[:] = [other, product.output]
                product.negative = True


def _quantize_graph(
    graph: GraphProto,
    outer: Mapping[str, TensorProto],
    options: IntegerOptions,
    ranges: Mapping[str, Range],
    counts: dict[str, int],
    home: GraphProto,
    rounded: dict[tuple[str, bool, bool], tuple[str, str]],
) -> None:
    scope = _Scope(graph, outer, options)
    if not options.pairs:
        scope.negate_summands()
    for node in graph.node:
        for inner in subgraphs(node):
            # Calibration measures tensors of the main graph only.
            _quantize_graph(inner, scope.constants, options, {}, counts, home, rounded)
    writer = _Writer(scope, options, ranges, counts, home, rounded)
    by_node = {id(product.nodes[-1]): product for product in scope.products}
    replaced = {id(node) for product in scope.products for node in product.nodes}
    for node in graph.node:
        if id(node) in by_node:
            writer.product(by_node[id(node)])
        elif id(node) not in replaced and not writer.table(node):
            writer.nodes.append(node)
    nodes = list(writer.nodes)
    del graph.node[:]
    graph.node.extend(nodes)


class _Writer:
    """Writes the nodes of one graph anew; new constants go to the main graph, where every graph sees them."""

    def __init__(self, scope, options, ranges, counts, home, rounded):
        self.scope, self.options, self.ranges, self.counts = scope, options, ranges, counts
        self.home, self.rounded = home, rounded
        self.nodes: list[NodeProto] = []
        self.sources: dict[str, tuple[str, str, str]] = {}
        self.uses: dict[str, int] = {}
        for product in scope.products:
            self.uses[product.source] = self.uses.get(product.source, 0) + 1

    def _constant(self, name: str, value: np.ndarray) -> str:
        # np.ascontiguousarray would turn a scalar into a vector.
        self.home.initializer.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def _add(self, op_type: str, inputs: list[str], outputs: list[str], name: str, domain: str = "", **kwargs) -> None:
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=name, domain=domain, **kwargs))

    def _weight(self, product: _Product) -> tuple[str, str]:
        """The rounded weight, and its scale, which has the sign of the product."""
        key = (product.weight, product.transposed, product.negative)
        if key not in self.rounded:
            weight = to_array(self.scope.constants[product.weight])
            weight = weight.T if product.transposed else weight
            values, scale = quantize_symmetric(
                weight, 1 if self.options.per_channel else None, self.options.reduce_range
            )
            base = f"{product.weight}{'.T' if product.transposed else ''}"
            other = self.rounded.get((product.weight, product.transposed, not product.negative))
            name = other[0] if other else self._constant(f"{base}_quantized", values)
            if product.negative:
                self.rounded[key] = (name, self._constant(f"{base}_scale_negative", -scale))
            else:
                self.rounded[key] = (name, self._constant(f"{base}_scale", scale))
        return self.rounded[key]

    def _bias(self, product: _Product) -> list[str]:
        """The name of the bias, with the sign of the product, if there is one."""
        if product.bias is None or not product.negative:
            return [product.bias] if product.bias else []
        key = (product.bias, False, True)
        if key not in self.rounded:
            bias = to_array(self.scope.constants[product.bias])
            self.rounded[key] = (self._constant(f"{product.bias}_negative", -bias), "")
        return [self.rounded[key][0]]

    def _source(self, tensor: str) -> tuple[str, str, str]:
        """The rounded activation, its scale and its zero point; made once for all that read it."""
        if tensor not in self.sources:
            names = (f"{tensor}_quantized", f"{tensor}_scale", f"{tensor}_zero_point")
            if tensor in self.ranges:
                scale, zero = unsigned_range(*self.ranges[tensor])
                self._constant(names[1], np.asarray(scale))
                self._constant(names[2], np.asarray(zero))
                self._add("QuantizeLinear", [tensor, *names[1:]], [names[0]], f"{tensor}_QuantizeLinear")
            else:
                self._add("DynamicQuantizeLinear", [tensor], list(names), f"{tensor}_DynamicQuantizeLinear")
            self.sources[tensor] = names
        return self.sources[tensor]

    def product(self, product: _Product) -> None:
        if self.options.pairs:
            self._product_with_pairs(product)
            return
        weight, scale = self._weight(product)
        static = product.source in self.ranges
        self.counts["static" if static else "dynamic"] += 1
        name = f"{product.nodes[0].name}_quantized"
        bias = self._bias(product)
        if static or self.uses[product.source] > 1:
            values, source_scale, zero = self._source(product.source)
            inputs = [values, weight, source_scale, scale, zero, *(["", *bias] if bias else [])]
            self._add("MatMulIntegerToFloat", inputs, [product.output], name, MICROSOFT)
        else:
            inputs = [product.source, weight, scale, *(["", *bias] if bias else [])]
            self._add("DynamicQuantizeMatMul", inputs, [product.output], name, MICROSOFT)

    def _product_with_pairs(self, product: _Product) -> None:
        if product.source not in self.ranges:
            self.nodes.extend(product.nodes)
            return
        self.counts["static"] += 1
        copy = NodeProto()
        copy.CopyFrom(product.nodes[0])
        copy.input[0], copy.input[1] = self._pair(product.source), self._stored(product)
        # The bias stays a sum in floating point: TensorRT takes it into the product, and has no int32 biases.
        self.nodes.extend([copy, *product.nodes[1:]])

    def _pair(self, tensor: str) -> str:
        """An activation, rounded and back; one pair for all products that read it, so that it is rounded once."""
        if tensor not in self.sources:
            scale = np.float32(max(map(abs, self.ranges[tensor])) / 127 or 1.0)
            names = [tensor, self._constant(f"{tensor}_scale", np.asarray(scale))]
            names.append(self._constant(f"{tensor}_zero_point", np.zeros((), np.int8)))
            outputs = (f"{tensor}_quantized", f"{tensor}_dequantized")
            self._add("QuantizeLinear", names, [outputs[0]], f"{tensor}_QuantizeLinear")
            names[0] = outputs[0]
            self._add("DequantizeLinear", names, [outputs[1]], f"{tensor}_DequantizeLinear")
            self.sources[tensor] = (outputs[1], *names[1:])
        return self.sources[tensor][0]

    def _stored(self, product: _Product) -> str:
        """A weight stored in int8, and what makes numbers of it; in the orientation of the original."""
        key = (product.weight, product.transposed, False)
        if key not in self.rounded:
            # Along the output features, wherever those are.
            axis = (0 if product.transposed else 1) if self.options.per_channel else None
            weight = to_array(self.scope.constants[product.weight])
            values, scale = quantize_symmetric(weight, axis, self.options.reduce_range)
            base = f"{product.weight}{'.T' if product.transposed else ''}"
            names = [self._constant(f"{base}_quantized", values), self._constant(f"{base}_scale", np.asarray(scale))]
            names.append(self._constant(f"{base}_zero_point", np.zeros(np.shape(scale), np.int8)))
            output = f"{base}_dequantized"
            kwargs = {} if axis is None else {"axis": axis}
            self._add("DequantizeLinear", names, [output], f"{base}_DequantizeLinear", **kwargs)
            self.rounded[key] = (output, names[1])
        return self.rounded[key][0]

    def table(self, node: NodeProto) -> bool:
        """Writes a lookup in an embedding table; False where `node` is something else."""
        if node.op_type != "Gather" or not self.options.embeddings or node.name in self.options.exclude:
            return False
        table = self.scope.matrix(node.input[0])
        if table is None or attribute(node, "axis", 0) != 0:
            return False
        if table.dims[0] < MIN_TABLE_ROWS or table.dims[1] < MIN_TABLE_COLUMNS:
            return False
        key = (node.input[0], False, False)
        if key not in self.rounded:
            values, scale = quantize_symmetric(to_array(table), 0)
            self.rounded[key] = (
                self._constant(f"{node.input[0]}_quantized", values),
                self._constant(f"{node.input[0]}_scale", scale[:, None]),
            )
            self.counts["tables"] += 1
        values, scale = self.rounded[key]
        output = node.output[0]
        parts = [f"{output}_quantized", f"{output}_values", f"{output}_scale"]
        self._add("Gather", [values, node.input[1]], parts[:1], f"{node.name}_quantized", axis=0)
        self._add("Cast", parts[:1], parts[1:2], f"{node.name}_Cast", to=TensorProto.FLOAT)
        self._add("Gather", [scale, node.input[1]], parts[2:], f"{node.name}_scale", axis=0)
        self._add("Mul", parts[1:], [output], f"{node.name}_Mul")
        return True


def products_left(graph: GraphProto, outer: Mapping[str, TensorProto] | None = None) -> int:
    """How many products with constant weights are in single precision, those of sub-graphs too.

    Args:
        graph: The graph.
        outer: The constants of the graphs around it.
    """
    scope = _Scope(graph, outer or {}, DEFAULT_OPTIONS)
    own = sum(
        node.op_type in ("MatMul", "Gemm") and any(scope.matrix(name) is not None for name in node.input[:2])
        for node in graph.node
    )
    return own + sum(products_left(inner, scope.constants) for node in graph.node for inner in subgraphs(node))


def _rename_inputs(graph: GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = names[name]
        for inner in subgraphs(node):
            _rename_inputs(inner, names)


def _drop_unused_initializers(graph: GraphProto) -> None:
    needed = {value.name for value in graph.output}
    for node in graph.node:
        needed.update(node.input)
        needed |= outer_names(node)
    kept = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in graph.node:
        for inner in subgraphs(node):
            _drop_unused_initializers(inner)
