"""One ONNX graph that decides for itself: every later stage in the else branch of an ``If``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgekit.plan import Plan


def nested_if(plan: Plan, stages: Mapping[str, ModelProto]) -> ModelProto:
    """Stages and max-probability exits as one graph for batch 1.

    Args:
        plan: of a network with one input.
        stages: ONNX model of each stage.

    Returns:
        Inputs: the network's, and ``thresholds (exits,) float32``; output: ``logits (1, classes) float32``.
    """
    one = np.ones((), dtype=np.float32)
    initializers = [numpy_helper.from_array(one, step.temperature) for step in plan.exits]
    nodes = _branch(plan, stages, 0, initializers, output="logits")
    spec = plan.inputs[0]
    inputs = [
        helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, [1, *spec.shape[1:]]),
        helper.make_tensor_value_info("thresholds", TensorProto.FLOAT, [len(plan.exits)]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, plan.classes])]
    graph = helper.make_graph(nodes, "nested_if", inputs, outputs, initializers)
    opset = next(iter(stages.values())).opset_import
    model = helper.make_model(graph, opset_imports=opset, ir_version=next(iter(stages.values())).ir_version)
    onnx.checker.check_model(model)
    return model


def _branch(
    plan: Plan, stages: Mapping[str, ModelProto], index: int, initializers: list[TensorProto], *, output: str
) -> list[NodeProto]:
    """Stage ``index``, its decision, and all later stages in the branch taken when it does not accept."""
    stage, step = plan.stages[index], plan.exits[index]
    nodes = _inlined(stages[stage.name].graph, set(stage.inputs) | set(stage.outputs), f"s{index}_", initializers)
    logits, score = step.logits, step.scores["max_prob"]
    last = index == len(plan.exits) - 1
    if last:
        return [*nodes, helper.make_node("Identity", [logits], [output])]
    position = numpy_helper.from_array(np.array([index], dtype=np.int64), f"position{index}")
    initializers.append(position)
    nodes.append(helper.make_node("Gather", ["thresholds", position.name], [f"threshold{index}"]))
    nodes.append(helper.make_node("GreaterOrEqual", [score, f"threshold{index}"], [f"accept{index}"]))
    accept = _body([helper.make_node("Identity", [logits], [f"{output}_a{index}"])], f"{output}_a{index}", plan)
    inner = f"{output}_r{index}"
    refuse = _body(_branch(plan, stages, index + 1, initializers, output=inner), inner, plan)
    nodes.append(helper.make_node("If", [f"accept{index}"], [output], then_branch=accept, else_branch=refuse))
    return nodes


def _body(nodes: list[NodeProto], output: str, plan: Plan) -> GraphProto:
    value = helper.make_tensor_value_info(output, TensorProto.FLOAT, [1, plan.classes])
    return helper.make_graph(nodes, f"body_{output}", [], [value])


def _inlined(graph: GraphProto, kept: set[str], prefix: str, initializers: list[TensorProto]) -> list[NodeProto]:
    """A stage's nodes with inner names made unique; its weights go to the outer graph."""

    def renamed(name: str) -> str:
        return name if not name or name in kept else prefix + name

    for weight in graph.initializer:
        copy = TensorProto()
        copy.CopyFrom(weight)
        copy.name = renamed(weight.name)
        initializers.append(copy)
    nodes = []
    for node in graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = prefix + node.name
        copy.input[:] = [renamed(name) for name in node.input]
        copy.output[:] = [renamed(name) for name in node.output]
        nodes.append(copy)
    return nodes
