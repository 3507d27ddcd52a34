"""A small editable view of an ONNX graph: who makes a tensor, who reads it, what is constant."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper


MICROSOFT = "com.microsoft"
# Protobuf cannot hold 2 GiB; some is left for everything that is not weights.
EXTERNAL_DATA_BYTES = 1_900_000_000


class Graph:
    """The main graph of a model, indexed. Sub-graphs (`If`, `Loop`) are opaque: what they read counts as read.

    Args:
        model: The model; [`write`] stores the edited graph in it.
    """

    def __init__(self, model: ModelProto):
        self.model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = [value.name for value in model.graph.output]
        self.inputs = {value.name: value for value in model.graph.input if value.name not in self.initializers}
        self._names = {name for node in self.nodes for name in (*node.input, *node.output)} | set(self.initializers)
        self.reindex()

    def reindex(self) -> None:
        """Brings producers and consumers up to date after nodes were added, removed or rewired by hand."""
        self._producer: dict[str, NodeProto] = {}
        self._consumers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.output:
                self._producer[name] = node
            for name in {*node.input, *outer_names(node)}:
                self._consumers.setdefault(name, []).append(node)

    def producer(self, tensor: str, *op_types: str) -> NodeProto | None:
        """The node that makes `tensor`, if it is of one of `op_types` (of any, when none are given)."""
        node = self._producer.get(tensor)
        return node if node is not None and (not op_types or node.op_type in op_types) else None

    def consumers(self, tensor: str) -> list[NodeProto]:
        """The nodes that read `tensor`."""
        return self._consumers.get(tensor, [])

    def is_only_read_by(self, tensor: str, *nodes: NodeProto) -> bool:
        """Whether nothing but `nodes` needs `tensor`."""
        readers = self.consumers(tensor)
        return tensor not in self.outputs and all(any(reader is node for node in nodes) for reader in readers)

    def constant(self, tensor: str) -> np.ndarray | None:
        """The value of `tensor` where it is an initializer or a `Constant` node, else None."""
        if tensor in self.initializers:
            return to_array(self.initializers[tensor])
        node = self.producer(tensor, "Constant")
        if node is None:
            return None
        attribute = node.attribute[0]
        if attribute.name == "value":
            return to_array(attribute.t)
        return np.asarray(helper.get_attribute_value(attribute))

    def unique_name(self, base: str) -> str:
        """A tensor or node name that is not in use."""
        name, number = base, 1
        while name in self._names:
            name, number = f"{base}_{number}", number + 1
        self._names.add(name)
        return name

    def add_constant(self, base: str, value: np.ndarray) -> str:
        """Adds an initializer.

        Returns:
            Its name, made unique from `base`.
        """
        name = self.unique_name(base)
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def add_node(
        self,
        op_type: str,
        inputs: Iterable[str],
        base: str,
        outputs: Iterable[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Adds a node; call [`reindex`] when done.

        Args:
            op_type: The operator.
            inputs: Its inputs; an empty name leaves an optional one out.
            base: What its name and outputs are made from.
            outputs: The names of its outputs; by default one, new.
            domain: The operator set, such as `com.microsoft`.
            **attributes: Attributes of the operator.

        Returns:
            The name of the first output.
        """
        outputs = [self.unique_name(f"{base}_output")] if outputs is None else list(outputs)
        node = helper.make_node(
            op_type, list(inputs), outputs, name=self.unique_name(base), domain=domain, **attributes
        )
        self.nodes.append(node)
        return outputs[0]

    def replace_reads(self, old: str, new: str, keep: Iterable[NodeProto] = ()) -> None:
        """Makes every reader of the tensor `old`, but `keep`, read `new`; graph outputs keep their names."""
        keep = list(keep)
        for node in self.consumers(old):
            if not any(node is other for other in keep):
                for index, name in enumerate(node.input):
                    if name == old:
                        node.input[index] = new
        self.reindex()

    def remove(self, nodes: Iterable[NodeProto]) -> None:
        """Removes nodes."""
        gone = {id(node) for node in nodes}
        self.nodes = [node for node in self.nodes if id(node) not in gone]
        self.reindex()

    def drop_unused(self) -> None:
        """Removes nodes and initializers that no output depends on."""
        needed = set(self.outputs)
        kept = []
        for node in reversed(self._sorted()):
            if any(name in needed for name in node.output):
                kept.append(node)
                needed.update(node.input)
                needed.update(outer_names(node))
        self.nodes = kept[::-1]
        self.initializers = {name: tensor for name, tensor in self.initializers.items() if name in needed}
        self.reindex()

    def write(self) -> ModelProto:
        """Stores the edited graph, cleaned and in topological order, in the model, and returns that."""
        self.drop_unused()
        graph = self.model.graph
        nodes, initializers = list(self.nodes), list(self.initializers.values())
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(nodes)
        graph.initializer.extend(initializers)
        if any(node.domain == MICROSOFT for node in nodes):
            add_domain(self.model, MICROSOFT)
        self.nodes = list(graph.node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.reindex()
        return self.model

    def _sorted(self) -> list[NodeProto]:
        order: list[NodeProto] = []
        state: dict[int, bool] = {}
        for root in self.nodes:
            stack = [(root, False)]
            while stack:
                node, done = stack.pop()
                if done:
                    state[id(node)] = True
                    order.append(node)
                elif id(node) not in state:
                    state[id(node)] = False
                    stack.append((node, True))
                    for name in (*node.input, *outer_names(node)):
                        before = self._producer.get(name)
                        if before is not None and id(before) not in state:
                            stack.append((before, False))
        return order


def outer_names(node: NodeProto) -> set[str]:
    """The tensors of the surrounding graph that the sub-graphs of a node read."""
    found: set[str] = set()
    for graph in subgraphs(node):
        own = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
        read: set[str] = {value.name for value in graph.output}
        for inner in graph.node:
            own.update(inner.output)
            read.update(inner.input)
            read |= outer_names(inner)
        found |= read - own
    found.discard("")
    return found


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that a node holds as attributes."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def has_subgraphs(model: ModelProto) -> bool:
    """Whether any node holds a graph, as merged decoders do."""
    return any(True for node in model.graph.node for _ in subgraphs(node))


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute of a node."""
    for item in node.attribute:
        if item.name == name:
            return helper.get_attribute_value(item)
    return default


def to_array(tensor: onnx.TensorProto) -> np.ndarray:
    """The values of a tensor."""
    return numpy_helper.to_array(tensor)


def add_domain(model: ModelProto, domain: str, version: int = 1) -> None:
    """Declares that a model uses an operator set."""
    if all(item.domain != domain for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid(domain, version))


def load_model(path: str | os.PathLike) -> ModelProto:
    """Reads a model with all its weights."""
    return onnx.load(os.fspath(path))


def save_model(model: ModelProto, path: str | os.PathLike) -> None:
    """Writes a model, with the weights in a file beside it where one file cannot hold them."""
    path = Path(path)
    data = path.with_name(path.name + "_data")
    if model.ByteSize() > EXTERNAL_DATA_BYTES:
        onnx.save(model, os.fspath(path), save_as_external_data=True, location=data.name, convert_attribute=True)
    else:
        onnx.save(model, os.fspath(path))
