"""Sets of artifacts in lower precision: what is written, on what it was calibrated, and that answers stay."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edgekit
from edgekit.bundle import Bundle
from edgekit.calibration import collect, score
from edgekit.errors import BundleError, CalibrationError, InputError, LoweringError
from edgekit.exporters import quantize_onnx
from edgekit.exporters.quantize import quantize_bundle
from edgekit.exporters.quantize_work import FEWEST_ROWS
from edgekit.exporters.survivors import closest, everyone, given_to
from edgekit.policy import Policy
from edgekit.runtimes.ort import OrtRuntime
from edgekit.session import Session
from edgekit.zoo import digits

THRESHOLDS = (0.95, 0.95)
POLICY = Policy.fixed(THRESHOLDS)


@pytest.fixture(scope="module")
def data():
    return digits.training_set()


@pytest.fixture(scope="module")
def quantized(exported_digits, data, tmp_path_factory):
    """The digits bundle with an int8 set, and the report."""
    path = Path(shutil.copytree(exported_digits, tmp_path_factory.mktemp("quantized") / "digits.edgekit"))
    with Bundle.open(path) as bundle:
        return path, quantize_bundle(bundle, data, policy=POLICY)


@pytest.fixture(scope="module")
def exported_moe_digits(tmp_path_factory):
    """A network with gates. Read only."""
    from edgekit.zoo.registry import find, load

    path = tmp_path_factory.mktemp("moe") / "moe.edgekit"
    edgekit.export(load("moe-digits"), (find("moe-digits").example(),), path).close()
    return path


def artifacts(bundle, target="onnx"):
    return {stage.name: bundle.artifact(target, stage.name) for stage in bundle.plan.stages}


# What is written


def test_a_set_is_added_and_float_stays_as_it_was(quantized, exported_digits):
    path, report = quantized
    with Bundle.open(path) as bundle, Bundle.open(exported_digits) as before:
        bundle.verify()
        assert bundle.targets == ("onnx", "onnx-int8")
        assert bundle.artifact_digests("onnx") == before.artifact_digests("onnx")
        assert bundle.manifest.parity["onnx-int8"]["drop"] == report.drop
        assert report.size_bytes == bundle.artifact_bytes("onnx-int8")
        assert report.float_bytes == bundle.artifact_bytes("onnx")
    assert [each.precision for each in report.stages] == ["int8"] * 3


def test_weights_are_int8_with_a_scale_for_each_channel(quantized):
    """Against the eager network: its first convolution with its batch normalisation, folded by hand."""
    from edgekit.zoo.registry import load

    path, _ = quantized
    convolution, norm, _ = load("msdnet-digits").stem.scales[0]
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
    folded = convolution.weight.detach().numpy() * factor[:, None, None, None]
    with Bundle.open(path) as bundle:
        model = onnx.load(bundle.artifact("onnx-int8", bundle.plan.stages[0].name))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (weights,) = (each for each in constants.values() if each.dtype == np.int8 and each.shape == folded.shape)
    node = next(node for node in model.graph.node if node.input and constants.get(node.input[0]) is weights)
    scales = constants[node.input[1]]
    assert node.op_type == "DequantizeLinear"
    assert scales.shape == (len(folded),)
    np.testing.assert_allclose(scales, np.abs(folded).max(axis=(1, 2, 3)) / 127, rtol=1e-5)
    np.testing.assert_allclose(weights * scales[:, None, None, None], folded, atol=scales.max() * 0.51)


def test_every_convolution_of_the_trunk_runs_in_8_bits(quantized):
    path, _ = quantized
    with Bundle.open(path) as bundle:
        for stage in bundle.plan.stages:
            model = onnx.load(bundle.artifact("onnx-int8", stage.name))
            made = {name: node.op_type for node in model.graph.node for name in node.output}
            convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
            assert convolutions
            for node in convolutions:
                assert {made[name] for name in node.input} == {"DequantizeLinear"}


def test_scores_are_computed_in_float(quantized, data):
    path, _ = quantized
    with edgekit.load(path, precision="int8", policy=POLICY) as session:
        inputs = data.batch(slice(0, 32))
        for index in range(3):
            forced = session.run(inputs, exit=index)
            np.testing.assert_allclose(forced.score, score(forced.logits, name="max_prob"), atol=1e-6)


def test_a_row_is_the_same_bits_in_every_batch(quantized, data):
    path, _ = quantized
    with edgekit.load(path, precision="int8", policy=POLICY) as session:
        inputs = data.batch(slice(0, 50))
        single = [session.run(inputs[row : row + 1]) for row in range(len(inputs))]
        for size in (7, 50):
            parts = [session.run(inputs[at : at + size]) for at in range(0, len(inputs), size)]
            for field in ("logits", "exit", "score"):
                expected = np.concatenate([getattr(each, field) for each in single])
                np.testing.assert_array_equal(np.concatenate([getattr(each, field) for each in parts]), expected)


def test_answers_hardly_change(quantized):
    path, report = quantized
    test = digits.test_set()
    found = []
    for precision in ("float32", "int8"):
        with edgekit.load(path, precision=precision, policy=POLICY) as session:
            found.append(collect(session, test))
    for exact, rounded in zip(found[0].right, found[1].right, strict=True):
        assert abs(exact.mean() - rounded.mean()) <= 0.02
    assert abs(report.drop) <= 0.02
    assert report.largest_difference is not None
    assert 0 < report.largest_difference < 3


def test_the_report_says_what_sessions_say(quantized, data):
    """Drop, flips and exits of the whole set, found again from the two sessions' own answers."""
    path, report = quantized
    order = np.random.default_rng(0).permutation(len(data))
    held = data.take(order[len(data) // 2 :])
    results = []
    for precision in ("float32", "int8"):
        with edgekit.load(path, precision=precision, policy=POLICY) as session:
            results.append(session.run(held.batch(slice(None))))
    right = [(each.logits.argmax(1) == held.labels).mean() for each in results]
    assert report.samples == len(held)
    assert report.float_accuracy == pytest.approx(right[0])
    assert report.drop == pytest.approx(right[0] - right[1])
    assert report.flips == (results[0].exit != results[1].exit).sum()
    assert report.changed == (results[0].logits.argmax(1) != results[1].logits.argmax(1)).sum()
    np.testing.assert_allclose(report.exits, np.bincount(results[1].exit, minlength=3) / len(held))


# On what


def test_stages_are_given_the_samples_that_survive(exported_digits, data):
    some = data.take(slice(0, 200))
    with Bundle.open(exported_digits) as bundle:
        runtime, files = OrtRuntime(), artifacts(bundle)
        with Session(bundle.plan, runtime, files) as session:
            logits = collect(session, some).logits
        stay = np.ones(200, bool)
        expected = []
        for index in range(3):
            expected.append(np.flatnonzero(stay))
            if index < 2:
                stay &= score(logits[index], name="max_prob") < np.float32(THRESHOLDS[index])
        given = {
            stage.name: each
            for stage, each in given_to(
                bundle.plan.stages, bundle.plan, runtime, files, policy=POLICY, data=some, rows=150
            )
        }
        first = bundle.plan.stages[0]
    assert [each.reached for each in given.values()] == [len(rows) for rows in expected]
    assert 0 < len(expected[2]) < len(expected[1]) < 150
    assert [each.rows for each in given.values()] == [150, len(expected[1]), len(expected[2])]
    kept = np.concatenate([feed["x"] for feed in given[first.name].feeds])
    np.testing.assert_array_equal(kept, some.batch(slice(0, 150)))


def test_in_a_static_graph_everyone_survives(exported_digits, data):
    some = data.take(slice(0, 100))
    with Bundle.open(exported_digits) as bundle:
        plan, policy = everyone(bundle.plan, POLICY)
        found = given_to(plan.stages, plan, OrtRuntime(), artifacts(bundle), policy=policy, data=some, rows=100)
        assert [each.reached for _, each in found] == [100, 100, 100]


@pytest.mark.slow
def test_closed_gates_keep_samples_from_what_they_guard(exported_moe_digits, data):
    some = data.take(slice(0, 100))
    with Bundle.open(exported_moe_digits) as bundle:
        runtime, files, plan = OrtRuntime(), artifacts(bundle), bundle.plan
        never = Policy.never(len(plan.exits))
        with Session(plan, runtime, files, policy=never) as session:
            executed = session.run(some.batch(slice(None))).executed
        survivors = {
            s.name: g.reached for s, g in given_to(plan.stages, plan, runtime, files, policy=never, data=some, rows=8)
        }
        whole, never = everyone(plan, never)
        every = {
            s.name: g.reached for s, g in given_to(plan.stages, whole, runtime, files, policy=never, data=some, rows=8)
        }
    assert survivors == executed
    assert min(survivors.values()) < 100
    assert set(every.values()) == {100}


def test_what_few_survive_to_is_calibrated_on_those_that_come_closest(digits_bundle, data, monkeypatch):
    lenient = Policy.fixed((0.3, 0.3))
    written = {}
    whole = quantize_onnx.OnnxQuantizer.write

    def write(self, stage, *arguments, given, **options):
        written[stage.name] = given
        return whole(self, stage, *arguments, given=given, **options)

    monkeypatch.setattr(quantize_onnx.OnnxQuantizer, "write", write)
    with Bundle.open(digits_bundle) as bundle:
        report = quantize_bundle(bundle, data, policy=lenient)
        first, *_, last = (stage.name for stage in bundle.plan.stages)
    reached = {each.name: each.reached for each in report.stages}
    assert reached[first] == len(data) // 2
    assert reached[last] < FEWEST_ROWS
    assert report.stages[-1].precision == "int8"
    assert report.stages[-1].calibrated == FEWEST_ROWS
    assert f"fewer than {FEWEST_ROWS} samples survive to" in report.warnings[0]
    assert last in report.warnings[0]
    assert written[last].rows == FEWEST_ROWS


def test_the_closest_are_those_that_stay_longest_then_those_least_sure(exported_digits, data):
    some = data.take(slice(0, 200))
    with Bundle.open(exported_digits) as bundle:
        runtime, files = OrtRuntime(), artifacts(bundle)
        with Session(bundle.plan, runtime, files, policy=POLICY) as session:
            result = session.run(some.batch(slice(None)))
        few = closest(bundle.plan, runtime, files, policy=POLICY, data=some, rows=30)
    ranked = sorted(range(200), key=lambda row: (-result.exit[row], result.score[row]))
    np.testing.assert_array_equal(few.inputs, some.inputs[ranked[:30]])


def test_without_labels_float_is_what_answers_are_compared_with(digits_bundle, data):
    unlabelled = edgekit.Dataset(inputs=data.inputs, preprocess=data.preprocess)
    with Bundle.open(digits_bundle) as bundle:
        report = quantize_bundle(bundle, unlabelled, policy=POLICY)
    assert (report.measure, report.accuracy, report.float_accuracy) == ("agreement", None, None)
    assert report.drop == report.changed / report.samples


# What stays in float


def test_the_stage_that_does_the_harm_is_kept_in_float(digits_bundle, data, monkeypatch):
    """Its ranges are spoilt here; the others are as they should be."""
    spoilt = []
    whole = quantize_onnx.activation_ranges

    def ranges(run, feeds, **options):
        found = whole(run, feeds, **options)
        spoilt.append(len(spoilt) == 1)
        return {name: (low / 50, high / 50) for name, (low, high) in found.items()} if spoilt[-1] else found

    monkeypatch.setattr(quantize_onnx, "activation_ranges", ranges)
    with Bundle.open(digits_bundle) as bundle:
        report = quantize_bundle(bundle, data, policy=Policy.never(3), max_drop=0.02)
        second = bundle.plan.stages[1].name
        assert bundle.artifact("onnx-int8", second) == bundle.artifact("onnx", second)
    assert [each.precision for each in report.stages] == ["int8", "float32", "int8"]
    assert "with it in int8 the set lost" in report.stages[1].kept
    assert report.stages[1].drop > 0.02
    assert report.within_max_drop


def test_stages_are_kept_in_float_as_asked(digits_bundle, data):
    with Bundle.open(digits_bundle) as bundle:
        names = [stage.name for stage in bundle.plan.stages]
        report = quantize_bundle(bundle, data, policy=POLICY, keep_float=names[:1])
        assert [each.kept for each in report.stages] == ["asked for", None, None]
        with pytest.raises(LoweringError, match=r"no stage can be written in int8 \(.*: asked for"):
            quantize_bundle(bundle, data, policy=POLICY, keep_float=names)


# Other precisions


@pytest.mark.parametrize("precision", ["float16", "int8-dynamic"])
def test_other_precisions_answer_as_float_does(digits_bundle, data, precision):
    with Bundle.open(digits_bundle) as bundle:
        report = quantize_bundle(bundle, data, policy=POLICY, precision=precision)
        bundle.verify()
        assert report.artifacts == f"onnx-{precision}"
    assert abs(report.drop) <= 0.02
    assert report.calibrated_on is None
    if precision == "float16":
        assert report.largest_difference < 0.1


def test_what_tensorrt_takes(digits_bundle, data):
    """Activations in int8 with zero points of 0, biases in float, and no pair around what has weights left out."""
    with Bundle.open(digits_bundle) as bundle:
        report = quantize_bundle(bundle, data, policy=POLICY, precision="int8-symmetric")
        bundle.verify()
        assert report.calibrated_on == "survivors"
        assert abs(report.drop) <= 0.02
        for stage in bundle.plan.stages:
            model = onnx.load(bundle.artifact("onnx-int8-symmetric", stage.name))
            constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
            made = {name: node for node in model.graph.node for name in node.output}
            for node in model.graph.node:
                if node.op_type == "QuantizeLinear":
                    assert constants[node.input[2]].dtype == np.int8
                if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                    assert all(not constants[name].any() for name in node.input[2:])
                if node.op_type == "Conv":
                    assert all(made[name].op_type == "DequantizeLinear" for name in node.input[:2])
                    assert all(constants[name].dtype == np.float32 for name in node.input[2:])


def test_ranges_found_in_use_are_of_one_row_whatever_the_batch(digits_bundle, data):
    """A file of dynamic ranges says that its rows lean on each other, and is run row by row."""
    with Bundle.open(digits_bundle) as bundle:
        quantize_bundle(bundle, data, policy=POLICY, precision="int8-dynamic")
        file = bundle.artifact("onnx-int8-dynamic", bundle.plan.stages[0].name)
    assert {each.key: each.value for each in onnx.load(file).metadata_props} == {quantize_onnx.ROW_BY_ROW: "1"}
    with edgekit.load(digits_bundle, precision="int8-dynamic", policy=POLICY) as session:
        inputs = data.batch(slice(0, 20))
        single = np.concatenate([session.run(inputs[row : row + 1]).logits for row in range(20)])
        np.testing.assert_array_equal(session.run(inputs).logits, single)


def test_half_precision_leaves_what_decides_and_temperatures_in_float(digits_bundle, data):
    """A temperature that half precision cannot hold: scores are those of the logits divided by it, to float32."""
    with Bundle.open(digits_bundle) as bundle:
        quantize_bundle(bundle, data, policy=POLICY, precision="float16")
    temperature = 1.0 + 2**-12
    policy = Policy.fixed(THRESHOLDS, temperatures=(temperature,) * 3)
    with edgekit.load(digits_bundle, precision="float16", policy=policy) as session:
        found = session.run(data.batch(slice(0, 64)), exit=0)
    expected = score(found.logits, name="max_prob", temperature=temperature)
    np.testing.assert_allclose(found.score, expected, atol=3e-7)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "precision 'int4' is not one of int8, int8-symmetric, int8-dynamic, float16"),
        ({"precision": "float32"}, "precision 'float32' is not one of"),
        ({"target": "litert"}, "nothing can be quantised for target 'litert' \\(possible here: onnx\\)"),
        ({"keep_float": ["nowhere"]}, "stage 'nowhere' does not exist; the network has "),
        ({"max_drop": 3.0}, "max_drop 3.0: expected a share"),
    ],
)
def test_what_cannot_be_asked(exported_digits, data, options, message):
    with Bundle.open(exported_digits) as bundle, pytest.raises(InputError, match=message):
        quantize_bundle(bundle, data, **options)


def test_too_few_samples(exported_digits, data):
    with (
        Bundle.open(exported_digits) as bundle,
        pytest.raises(CalibrationError, match="127 samples are too few for int8: at least 128 are needed, half to"),
    ):
        quantize_bundle(bundle, data.take(slice(0, 127)))


# The bundle


@pytest.fixture(params=["folder", "packed"])
def either(request, digits_bundle, tmp_path):
    if request.param == "folder":
        return digits_bundle
    with Bundle.open(digits_bundle) as bundle:
        return bundle.pack(tmp_path / "packed.edgekit")


def add(bundle, content: bytes, tmp_path):
    """A set of which one stage is written and the others are shared."""
    folder = tmp_path / content.decode()
    folder.mkdir()
    (folder / "a.onnx").write_bytes(content)
    (folder / "a-weights.bin").write_bytes(content * 2)
    first, *others = (stage.name for stage in bundle.plan.stages)
    bundle.add_artifacts("onnx-int8", folder, {first: "a.onnx"}, shared=dict.fromkeys(others, "onnx"), parity={"is": 1})


def test_a_set_is_replaced_and_nothing_is_left_of_the_old_one(either, tmp_path):
    for content in (b"one", b"two", b"two-again"):
        with Bundle.open(either) as bundle:
            add(bundle, content, tmp_path)
    with Bundle.open(either) as bundle:
        bundle.verify()
        first = bundle.plan.stages[0].name
        assert bundle.artifact("onnx-int8", first).read_bytes() == b"two-again"
        assert bundle.artifact_bytes("onnx-int8", first) == 3 * len(b"two-again")
        written = [name for name in bundle.manifest.files if name.startswith("stages/onnx-int8-")]
        assert len(written) == 2
        assert len(list(bundle._folder.glob("stages/*"))) == 2
        assert set(bundle.artifact_digests("onnx-int8")) > set(written)


@pytest.mark.parametrize("failing", ["folder", "manifest.json", "packed.edgekit"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_crash_leaves_the_older_set(either, tmp_path, monkeypatch, failing, error):
    with Bundle.open(either) as bundle:
        add(bundle, b"old", tmp_path)
    if failing == "packed.edgekit" and either.is_dir():
        pytest.skip("a folder is not packed")
    replace = os.replace

    def broken(source, target):
        name = Path(target).name
        if name == failing or (failing == "folder" and name.startswith("onnx-int8-")):
            raise error
        replace(source, target)

    with Bundle.open(either) as bundle:
        before = bundle.manifest
        monkeypatch.setattr(os, "replace", broken)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else BundleError):
            add(bundle, b"new", tmp_path)
        monkeypatch.undo()
        assert bundle.manifest == before
        assert len(list(bundle._folder.glob("stages/*"))) == 2
    with Bundle.open(either) as bundle:
        bundle.verify()
        assert bundle.artifact("onnx-int8", bundle.plan.stages[0].name).read_bytes() == b"old"


def test_a_set_needs_every_stage(digits_bundle, tmp_path):
    with Bundle.open(digits_bundle) as bundle:
        last = bundle.plan.stages[-1].name
        shared = {stage.name: "onnx" for stage in bundle.plan.stages[:-1]}
        with pytest.raises(BundleError, match=f"the set 'onnx-int8' has no artifact of stage '{last}'"):
            bundle.add_artifacts("onnx-int8", tmp_path, {}, shared=shared)


def test_a_precision_that_was_not_written_says_how_to_write_it(exported_digits):
    with pytest.raises(BundleError, match=r"holds no 'onnx-int8' artifact .*; run edgekit quantize --precision int8"):
        edgekit.load(exported_digits, precision="int8")


def test_a_certified_drop_holds_on_int8_once_calibrated_there(digits_bundle, data):
    with Bundle.open(digits_bundle) as bundle:
        quantize_bundle(bundle, data, policy=POLICY)
    with edgekit.load(digits_bundle, precision="int8", policy=Policy.never(3)) as session:
        policy = edgekit.calibrate(session, digits.calibration_set(), max_drop=0.05, confidence=0.9)
        certificate = policy.provenance.certificate
        assert certificate.valid
        assert any(threshold < 1 for threshold in policy.thresholds)
        assert all("onnx-int8-" in name for name in policy.provenance.artifacts)
    test = digits.test_set()
    with edgekit.load(digits_bundle, precision="int8") as session:
        inputs = test.batch(slice(None))
        right = (session.run(inputs).logits.argmax(1) == test.labels).mean()
        right_at_the_end = (session.run(inputs, exit=2).logits.argmax(1) == test.labels).mean()
    assert right_at_the_end - right <= 0.05


def test_a_policy_certified_in_float_is_not_taken_for_int8(digits_bundle, data):
    with edgekit.load(digits_bundle, policy=Policy.never(3)) as session:
        edgekit.calibrate(session, digits.training_set(), max_drop=0.05, confidence=0.9, temperature=False)
    with Bundle.open(digits_bundle) as bundle:
        quantize_bundle(bundle, data)
    with pytest.raises(edgekit.EdgekitError, match="is certified for other artifacts"):
        edgekit.load(digits_bundle, precision="int8")
