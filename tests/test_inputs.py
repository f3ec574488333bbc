"""A network with several inputs, tokens and a mask, through every verb; and data sets of several inputs."""

from __future__ import annotations

import json

import numpy as np
import pytest

import edgekit
from edgekit.data import as_dataset, load_dataset
from edgekit.errors import CalibrationError, DataError, InputError, MeasurementError
from edgekit.parity import compare_runtimes
from edgekit.tensors import TensorSpec, check_inputs, finite_rows

torch = pytest.importorskip("torch", reason="exporting needs the export extra")
SAMPLES, LENGTH, CLASSES = 300, 6, 3


class Reader(torch.nn.Module):
    """Two exits over a mean of token embeddings, of those that the mask lets through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(20, 16)
        self.deep = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
        self.early, self.late = torch.nn.Linear(16, CLASSES), torch.nn.Linear(16, CLASSES)

    def forward(self, ids, mask):
        read = (self.embed(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.early(read), self.late(read + self.deep(read))


def sentences(seed=0):
    rng = np.random.default_rng(seed)
    mask = (np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (SAMPLES, 1))).astype(np.float32)
    return {"ids": rng.integers(0, 20, (SAMPLES, LENGTH)), "mask": mask}


@pytest.fixture(scope="module")
def eager():
    with torch.no_grad():
        return [logits.numpy() for logits in Reader().eval()(*map(torch.from_numpy, sentences().values()))]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    example = tuple(torch.from_numpy(each[:2]) for each in sentences().values())
    made = tmp_path_factory.mktemp("reader") / "reader.edgekit"
    edgekit.export(Reader().eval(), example, made).close()
    return made


@pytest.fixture(scope="module")
def archive(tmp_path_factory, eager):
    file = tmp_path_factory.mktemp("data") / "sentences.npz"
    np.savez(file, labels=eager[1].argmax(1), **{f"input:{name}": each for name, each in sentences().items()})
    return file


def test_every_verb_takes_them(path, archive, eager):
    data = (sentences(), eager[1].argmax(1))
    with edgekit.load(path) as session:
        policy = edgekit.calibrate(session, data, max_drop=0.2, confidence=0.8)
        assert len(policy.thresholds) == 1
        profile = edgekit.profile(session, str(archive), protocol="quick")
        assert profile.exits[1].accuracy == 1.0
        for index, expected in enumerate(eager):
            given = load_dataset(archive).batch(slice(5, 12))
            np.testing.assert_allclose(session.run(given, exit=index).logits, expected[5:12], atol=1e-5)
    with edgekit.Bundle.open(path) as bundle:
        report = edgekit.quantize(bundle, str(archive), precision="int8-dynamic")
        assert report.samples == SAMPLES // 2


def test_the_command_line_takes_them(path, archive, capsys):
    from typer.testing import CliRunner

    from edgekit.cli import app

    run = CliRunner()
    done = run.invoke(app, ["run", str(path), "--data", str(archive), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["samples"] == SAMPLES
    done = run.invoke(app, ["quantize", str(path), "--data", str(archive), "--precision", "float16", "--json"])
    assert done.exit_code == 0, done.output


def test_runtimes_are_compared_on_them(path, archive):
    with edgekit.load(path) as one, edgekit.load(path, threads=2) as other:
        found = compare_runtimes({"one": one, "other": other}, load_dataset(archive))
    assert found.samples == SAMPLES


def test_samples_are_taken_and_told_apart_with_all_their_inputs():
    data = as_dataset((sentences(), np.arange(SAMPLES) % 3))
    few = data.take(np.array([7, 3]))
    assert len(few) == 2
    np.testing.assert_array_equal(few.batch(slice(0, 2))["ids"], sentences()["ids"][[7, 3]])
    assert few.batch(slice(0, 1))["mask"].dtype == np.float32
    other = sentences()
    other["mask"][0] = 1 - other["mask"][0]
    assert as_dataset((other, np.arange(SAMPLES) % 3)).sha256 != data.sha256
    assert as_dataset((sentences(), np.arange(SAMPLES) % 3)).sha256 == data.sha256


def test_a_run_takes_fields_as_it_takes_a_mapping():
    specs = (TensorSpec("ids", "int64", ("batch", LENGTH)), TensorSpec("mask", "float32", ("batch", LENGTH)))
    arrays, rows = check_inputs(specs, as_dataset(sentences()).batch(slice(4, 9)))
    assert rows == 5
    for spec, array in zip(specs, arrays, strict=True):
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, sentences()[spec.name][4:9])
    with pytest.raises(InputError, match=r"missing: \['mask'\], unknown: \['length'\]"):
        check_inputs(specs, as_dataset({"ids": sentences()["ids"], "length": np.ones(SAMPLES)}).batch(slice(0, 2)))
    with pytest.raises(InputError, match=r"takes 2 inputs \['ids', 'mask'\], got 1"):
        check_inputs(specs, sentences()["ids"])


def test_finite_rows():
    data = as_dataset({"a": np.array([[1.0, np.nan], [1, 2], [3, 4]]), "b": np.array([1.0, 2, np.inf]), "c": [1, 2, 3]})
    np.testing.assert_array_equal(finite_rows(data.inputs), [False, True, False])
    np.testing.assert_array_equal(finite_rows(data.inputs["c"]), [True] * 3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"a": np.ones((3, 2)), "b": np.ones(4)}, r"memory: not as many samples of every input: \{'a': 3, 'b': 4\}"),
        ({}, r"memory: not as many samples of every input: there is none"),
        ({"a": [[1], [2, 3]]}, r"memory: input 'a' must be numbers of one shape"),
        ({"a": 5}, r"memory: input 'a' must be samples, not one number"),
        ({"a": np.array(["x", "y"])}, r"memory: input 'a' must be numbers"),
        ({"a": np.ones((0, 2))}, r"memory: no samples"),
    ],
)
def test_inputs_that_are_none(inputs, message):
    with pytest.raises(DataError, match=message):
        as_dataset(inputs)


def test_what_is_not_finite_is_named_by_its_sample(path):
    bad = sentences()
    bad["mask"][41] = np.nan
    labels = np.arange(SAMPLES) % CLASSES
    with edgekit.load(path) as session:
        with pytest.raises(CalibrationError, match="sample 41 is NaN or infinite"):
            edgekit.calibrate(session, (bad, labels), max_drop=0.2)
        with pytest.raises(MeasurementError, match="sample 41 holds NaN or infinity"):
            edgekit.profile(session, (bad, labels), protocol="quick")


def test_an_archive_without_inputs_says_how_they_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", tokens=np.ones((3, 2)))
    with pytest.raises(DataError, match=r"no array named 'inputs' or 'x', and none 'input:NAME' \(found: tokens\)"):
        load_dataset(tmp_path / "x.npz")


def test_a_field_for_each_input_in_one_array_with_its_labels():
    several = as_dataset(sentences())
    labels = np.arange(SAMPLES) % CLASSES
    found = as_dataset((several.inputs, labels))
    assert found.inputs.dtype.names == ("ids", "mask")
    assert (found.labels == labels).all()


def test_a_field_that_holds_no_numbers():
    words = np.zeros(4, dtype=[("ids", np.int64), ("words", object)])
    with pytest.raises(DataError, match="must be numbers of one shape"):
        as_dataset(words)
