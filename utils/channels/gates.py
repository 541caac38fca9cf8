"""Squeeze-and-excitation: layers that make nothing but a gate for the channels of a map."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from utils.channels.follow import ADDITIONS, PRODUCTS, QUOTIENTS, RESHAPES, is_channelwise, is_size, module_refusal
from utils.channels.trace import NodeFacts
from utils.conv_type import is_depthwise


def gates_in(
    graph: fx.Graph, facts: Mapping[fx.Node, NodeFacts], modules: Mapping[fx.Node, nn.Module | None]
) -> dict[fx.Node, fx.Node]:
    """The layers that only make a gate of a map, each with the map: squeeze-and-excitation.

    Such a layer is followed by maps of single channels and then multiplies the map, and nothing else reads it. Its
    channels matter only where the map has them, so it needs no units of its own and makes the channels of the map.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    targets = [node.target for node in graph.nodes if node.op == "call_module"]
    found = {}
    for product in (node for node in graph.nodes if node.target in PRODUCTS and len(node.all_input_nodes) == 2):
        for carrier, gate in (product.all_input_nodes, product.all_input_nodes[::-1]):
            layer = _layer_of_gate(gate, facts, modules)
            shape = facts[carrier].shape
            if layer is None or shape is None or carrier.op == "get_attr" or order[carrier] > order[layer]:
                continue
            width = getattr(modules[layer], "out_channels", None) or modules[layer].out_features
            if len(shape) == 3 and shape[0] == width and targets.count(layer.target) == 1:
                found[layer] = carrier
                break
    return found


def _layer_of_gate(
    node: fx.Node, facts: Mapping[fx.Node, NodeFacts], modules: Mapping[fx.Node, nn.Module | None]
) -> fx.Node | None:
    """The convolution or linear layer behind which there are only maps of single channels, each read once."""
    while True:
        module = modules[node]
        if sum(not is_size(user) for user in node.users) != 1:
            return None
        if type(module) is nn.Linear or (isinstance(module, nn.Conv2d) and not is_depthwise(module)):
            return None if module_refusal(module) else node
        tensors = [n for n in node.all_input_nodes if facts[n].shape is not None and n.op != "get_attr"]
        if not tensors or not node.op.startswith("call_"):
            return None
        with_number = node.target in PRODUCTS | ADDITIONS | QUOTIENTS and len(tensors) == 1
        known = (
            is_channelwise(node, module, facts[tensors[0]].shape)
            or node.target in RESHAPES
            or isinstance(module, nn.BatchNorm2d | nn.Flatten | nn.Unflatten)
        )
        if not (known or with_number):
            return None
        node = tensors[0]
