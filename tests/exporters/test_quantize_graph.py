"""Which nodes take lower precision, on graphs written by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.exporters.quantize_onnx import _graph

make = helper.make_node


def model_of(nodes, outputs, *, size=4):
    weights = {
        "w": np.ones((size, size, 1, 1), np.float32),
        "v": np.ones((size, 3), np.float32),
        "constant": np.ones((1, size, 1, 1), np.float32),
        "half": np.array(0.5, np.float32),
    }
    values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "stage",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", size, 8, 8])],
            values,
            [numpy_helper.from_array(array, name) for name, array in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    return onnx.shape_inference.infer_shapes(model)


def graph_of(nodes, outputs, *, float_outputs=()):
    return _graph(model_of(nodes, outputs), float_outputs)


IMAGE = (TensorProto.FLOAT, ["batch", 4, 8, 8])
LOGITS = (TensorProto.FLOAT, ["batch", 3])


@pytest.fixture
def residual():
    """Two convolutions with a residual sum, an exit on its mean, and what stage computes besides."""
    return graph_of(
        [
            make("Conv", ["x", "w"], ["a"], "first"),
            make("Relu", ["a"], ["b"], "relu"),
            make("Conv", ["b", "w"], ["c"], "second"),
            make("Add", ["c", "b"], ["h"], "sum"),
            make("Mul", ["h", "constant"], ["scaled"], "scale"),
            make("GlobalAveragePool", ["h"], ["p"], "pool"),
            make("Flatten", ["p"], ["q"], "flat"),
            make("MatMul", ["q", "v"], ["logits"], "classifier"),
            make("Softmax", ["logits"], ["max_prob"], "softmax"),
        ],
        {"h": IMAGE, "scaled": IMAGE, "logits": LOGITS, "max_prob": LOGITS},
        float_outputs=("logits", "max_prob"),
    )


def test_the_classifier_what_is_pooled_for_it_and_scores_stay_in_float(residual):
    assert residual.lowered() == {"first", "relu", "second", "sum"}
    assert residual.with_weights(residual.lowered()) == ["first", "second"]
    assert set(residual.activations(residual.lowered())) == {"x", "a", "b", "c", "h"}


def test_half_precision_takes_all_that_does_not_decide(residual):
    assert residual.lowered(every=True) == {"first", "relu", "second", "sum", "scale"}
    assert residual.others(residual.lowered(every=True)) == ["pool", "flat", "classifier", "softmax"]


def test_a_gates_value_is_made_in_float_from_its_last_product_on():
    graph = graph_of(
        [
            make("Conv", ["x", "w"], ["a"], "features"),
            make("Relu", ["a"], ["b"], "relu"),
            make("GlobalAveragePool", ["b"], ["p"], "pool"),
            make("Conv", ["p", "w"], ["l"], "gate"),
            make("Greater", ["l", "half"], ["open"], "compare"),
        ],
        {"open": (TensorProto.BOOL, ["batch", 4, 1, 1])},
    )
    assert graph.lowered() == {"features", "relu"}


def test_a_stage_of_a_classifier_alone_has_nothing_to_lower():
    graph = graph_of(
        [
            make("GlobalAveragePool", ["x"], ["p"]),
            make("Flatten", ["p"], ["q"]),
            make("MatMul", ["q", "v"], ["logits"]),
        ],
        {"logits": LOGITS},
        float_outputs=("logits",),
    )
    assert not graph.with_weights(graph.lowered())


def test_sums_of_vectors_and_with_constants_stay_in_float():
    graph = graph_of(
        [
            make("Conv", ["x", "w"], ["a"], "conv"),
            make("Add", ["a", "constant"], ["b"], "biased"),
            make("Neg", ["a"], ["m"], "negated"),
            make("Add", ["m", "m"], ["n"], "nothing in 8 bits"),
        ],
        {"b": IMAGE, "n": IMAGE},
    )
    assert graph.lowered() == {"conv"}


def test_what_is_concatenated_again_and_again_is_one_group():
    wide = (TensorProto.FLOAT, ["batch", 16, 8, 8])
    graph = graph_of(
        [
            make("Conv", ["x", "w"], ["a"], "one"),
            make("Concat", ["x", "a"], ["ab"], "first", axis=1),
            make("MaxPool", ["a"], ["pooled"], "pool", kernel_shape=[1, 1]),
            make("Conv", ["pooled", "w"], ["c"], "two"),
            make("Concat", ["ab", "c", "a"], ["abc"], "second", axis=1),
        ],
        {"abc": wide},
    )
    (group,) = graph.joined(graph.lowered())
    assert group == ["a", "ab", "abc", "c", "pooled", "x"]


def test_nodes_without_a_name_or_with_one_twice_get_their_own():
    graph = graph_of(
        [make("Relu", ["x"], ["a"]), make("Relu", ["a"], ["b"], "same"), make("Relu", ["b"], ["c"], "same")],
        {"c": IMAGE},
    )
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == 3
    assert all(names)
