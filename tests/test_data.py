from __future__ import annotations

import io
import os
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgekit.data import Dataset, Preprocess, as_dataset, load_dataset
from edgekit.errors import DataError

CIFAR = Path(__file__).resolve().parents[2] / "shared/data/cifar10/test.tar.gz"
RGB = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))


def picture(seed: int, *, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> tuple[bytes, np.ndarray]:
    """A lossless image of ``(width, height)``, and its pixels."""
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue(), pixels


FILES = {"set/dog/1.png": picture(1), "set/cat/2.png": picture(2), "set/dog/0.PNG": picture(3)}
ORDER = ("set/cat/2.png", "set/dog/0.PNG", "set/dog/1.png")
HIDDEN = {"set/cat/._2.png": b"resource fork", "set/.DS_Store": b"folder view"}


def lay_out(kind: str, root: Path, files: dict[str, bytes]) -> Path:
    path = root / {"folder": "images", "tar": "i.tar", "tar.gz": "i.tar.gz", "zip": "i.zip"}[kind]
    if kind == "folder":
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.mkdir("set") if sys.version_info >= (3, 11) else None
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(params=["folder", "tar", "tar.gz", "zip"])
def kind(request):
    return request.param


# Images


def test_images_are_read_in_name_order_with_their_folders_as_classes(kind, tmp_path):
    told = []
    path = lay_out(kind, tmp_path, {name: content for name, (content, _) in FILES.items()} | HIDDEN)
    data = load_dataset(path, preprocess=RGB, progress=lambda *step: told.append(step))
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 1, 1]
    assert data.source == str(path)
    np.testing.assert_array_equal(data.inputs, np.stack([FILES[name][1] for name in ORDER]))
    assert told == [("read images", done, 3) for done in (1, 2, 3)]


def test_the_same_images_have_the_same_digest_however_packed(tmp_path):
    files = {name: content for name, (content, _) in FILES.items()}
    digests = {load_dataset(lay_out(kind, tmp_path, files), preprocess=RGB).sha256 for kind in ("folder", "tar", "zip")}
    assert len(digests) == 1


def test_preprocessing_by_hand():
    pixels = np.array([[[[0, 51, 255]]], [[[255, 102, 128]]]], dtype=np.uint8)
    found = RGB(pixels)
    assert found.shape == (2, 3, 1, 1)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    expected = [(0 - 0.5) / 0.2, (0.2 - 0.4) / 0.25, (1 - 0.3) / 0.5]
    np.testing.assert_allclose(found[0, :, 0, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(found[1, :, 0, 0], [2.5, 0.0, (128 / 255 - 0.3) / 0.5], rtol=1e-5, atol=1e-6)


@given(st.integers(0, 255), st.floats(0, 1), st.floats(0.01, 2))
def test_preprocessing_is_the_formula(pixel, mean, std):
    found = Preprocess(mean=(mean,), std=(std,), channels=1)(np.full((1, 1, 1, 1), pixel, np.uint8))
    assert float(found[0, 0, 0, 0]) == pytest.approx((pixel / 255 - mean) / std, rel=1e-5, abs=1e-4)


def test_sizes_and_channels_are_made_alike(tmp_path):
    files = {"a/0.png": picture(0)[0], "b/1.png": picture(1, size=(9, 4))[0], "b/2.png": picture(2, mode="L")[0]}
    path = lay_out("folder", tmp_path, files)
    grey = load_dataset(path, preprocess=Preprocess(mean=(0.5,), std=(1.0,), channels=1, size=(4, 3)))
    assert grey.inputs.shape == (3, 4, 3, 1)
    assert grey.batch(slice(0, 2)).shape == (2, 1, 4, 3)
    with pytest.raises(DataError, match=r"images differ in size .* give preprocessing a size"):
        load_dataset(path, preprocess=RGB)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("set/cat/notes.txt", b"text", "set/cat/notes.txt is not an image inside a class folder"),
    ("loose.png", picture(0)[0], "loose.png is not an image inside a class folder"),
    ("set/cat/bad.png", b"\x89PNG not really", "set/cat/bad.png: not a readable image"),
    ("set/cat/cut.png", picture(0)[0][:60], "set/cat/cut.png: not a readable image"),
    ("set/cat/none.png", b"", "set/cat/none.png: not a readable image"),
])  # fmt: skip
def test_a_file_that_is_no_image_is_named(kind, tmp_path, name, content, message):
    files = {each: image for each, (image, _) in FILES.items()} | {name: content}
    with pytest.raises(DataError, match=message):
        load_dataset(lay_out(kind, tmp_path, files), preprocess=RGB)


def test_no_images_or_no_preprocessing(kind, tmp_path):
    with pytest.raises(DataError, match="images need preprocessing"):
        load_dataset(lay_out(kind, tmp_path, {"a/0.png": picture(0)[0]}))
    empty = tmp_path / "empty"
    empty.mkdir()
    if kind == "folder":
        with pytest.raises(DataError, match="holds no image files"):
            load_dataset(empty, preprocess=RGB)
    else:
        with pytest.raises(DataError, match="holds no image files"):
            load_dataset(lay_out(kind, empty, HIDDEN), preprocess=RGB)


def test_a_damaged_archive(tmp_path):
    files = {f"a/{seed}.png": picture(seed, size=(40, 40))[0] for seed in range(5)}
    for kind in ("tar", "tar.gz", "zip"):
        path = lay_out(kind, tmp_path, files)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(DataError, match=r"cannot be read|not an .npz file|not a readable image"):
            load_dataset(path, preprocess=RGB)


@pytest.mark.parametrize(("options", "message"), [
    ({"mean": (0.5,), "std": (0.2, 0.2, 0.2)}, "1 means and 3 standard deviations for 3 channels"),
    ({"mean": (0.5,) * 3, "std": (0.2, 0.0, 0.2)}, "standard deviations must be positive"),
    ({"mean": (0.5,) * 3, "std": (0.2, float("nan"), 0.2)}, "standard deviations must be positive"),
])  # fmt: skip
def test_preprocessing_that_means_nothing(options, message):
    with pytest.raises(DataError, match=message):
        Preprocess(**options)


def test_preprocessing_takes_images_only():
    with pytest.raises(DataError, match=r"takes images \(samples, height, width, 3\) uint8, not \(2, 4\) float32"):
        Dataset(inputs=np.zeros((2, 4), np.float32), preprocess=RGB)


# .npz


@pytest.mark.parametrize(("inputs", "labels"), [("inputs", "labels"), ("x", "y"), ("images", None)])
def test_npz(tmp_path, inputs, labels):
    arrays = {inputs: np.arange(6, dtype=np.float32).reshape(3, 2)}
    if labels:
        arrays[labels] = np.array([2, 0, 1], dtype=np.uint8)
    path = tmp_path / "d.npz"
    np.savez_compressed(path, **arrays)
    data = load_dataset(path, preprocess=RGB)
    np.testing.assert_array_equal(data.inputs, arrays[inputs])
    assert data.preprocess is None
    if labels:
        assert data.labels.dtype == np.int64
        assert data.labels.tolist() == [2, 0, 1]
    else:
        assert data.labels is None


def test_npz_of_8_bit_images_is_preprocessed(tmp_path):
    pixels = picture(0)[1][None]
    np.savez(tmp_path / "d.npz", images=pixels)
    np.testing.assert_array_equal(load_dataset(tmp_path / "d.npz", preprocess=RGB).batch(slice(0, 1)), RGB(pixels))
    assert load_dataset(tmp_path / "d.npz").preprocess is None


@pytest.mark.parametrize(("arrays", "message"), [
    ({"z": np.zeros(3)}, r"no array named 'inputs' or 'x', and none 'input:NAME' \(found: z\)"),
    ({"x": np.zeros((3, 2)), "y": np.zeros(2, int)}, r"3 samples but labels of shape \(2,\)"),
    ({"x": np.zeros((3, 2)), "y": np.zeros(3)}, "labels must be one integer per sample, not float64"),
    ({"x": np.zeros((3, 2)), "y": np.zeros((3, 1), int)}, r"labels must be one integer per sample, not int64 \(3, 1\)"),
    ({"x": np.zeros((0, 2))}, "no samples"),
    ({"x": np.zeros(())}, "no samples"),
    ({"x": np.array(["a", "b"])}, "inputs must be numbers of one shape, not <U1"),
    ({"x": np.array([{}, []], dtype=object)}, "cannot be read .*Object arrays cannot be loaded"),
])  # fmt: skip
def test_npz_that_cannot_be_used(tmp_path, arrays, message):
    path = tmp_path / "d.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=f"d.npz: {message}"):
        load_dataset(path)


class Trap:
    """Makes a folder if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["pickle", "npy of objects", "npy of numbers", "text", "nothing", "cut"])
def test_npz_that_is_none_is_never_unpickled(tmp_path, content):
    path, sprung = tmp_path / "d.npz", tmp_path / "sprung"
    objects, numbers, archive = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(objects, np.array([Trap(sprung)]), allow_pickle=True)
    np.save(numbers, np.zeros(3))
    np.savez(archive, x=np.zeros(1000))
    contents = {
        "pickle": pickle.dumps(Trap(sprung)),
        "npy of objects": objects.getvalue(),
        "npy of numbers": numbers.getvalue(),
        "text": b"a,b\n1,2",
        "nothing": b"",
        "cut": archive.getvalue()[:500],
    }
    path.write_bytes(contents[content])
    with pytest.raises(DataError, match=r"d.npz: is damaged or no .npz archive; write it with numpy.savez"):
        load_dataset(path)
    assert not sprung.exists()


# Other sources


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module on the path."""
    (tmp_path / "user_source.py").write_text(
        "import numpy as np\n"
        "from edgekit.data import Dataset\n"
        "def pair(): return np.zeros((2, 3), 'f4'), [0, 1]\n"
        "def array(): return np.zeros((2, 3), 'f4')\n"
        "def dataset(): return Dataset(inputs=np.zeros((2, 3), 'f4'), classes=('a', 'b'))\n"
        "def nothing(): return None\n"
        "def broken(): raise KeyError('disk')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "user_source"
    sys.modules.pop("user_source", None)


@pytest.mark.parametrize(("name", "labels"), [("pair", [0, 1]), ("array", None), ("dataset", None)])
def test_a_python_source(module, name, labels):
    data = load_dataset(f"{module}:{name}")
    assert data.source == f"user_source:{name}"
    assert data.inputs.shape == (2, 3)
    assert (None if data.labels is None else data.labels.tolist()) == labels


@pytest.mark.parametrize(("source", "message"), [
    ("user_source:missing", "user_source:missing: cannot be imported"),
    ("no_such_module_here:f", "cannot be imported"),
    (":f", "cannot be imported"),
    ("user_source:nothing", "returned NoneType, not a Dataset"),
    ("user_source:broken", "failed with KeyError: 'disk'"),
    ("no/such/file.npz", "no such file or folder"),
])  # fmt: skip
def test_a_source_that_gives_nothing(module, source, message):
    with pytest.raises(DataError, match=message):
        load_dataset(source)


def test_an_unknown_kind_of_file(tmp_path):
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"d.csv: not an .npz file, an image folder, or a tar or zip of one"):
        load_dataset(tmp_path / "d.csv")


# In memory


def test_what_people_pass_as_data():
    inputs = np.zeros((2, 3), np.float32)
    assert as_dataset(inputs).inputs is inputs
    assert as_dataset((inputs, [1, 0])).labels.tolist() == [1, 0]
    data = Dataset(inputs=inputs)
    assert as_dataset(data, classes=("a",)) is data


@pytest.mark.parametrize(("data", "message"), [
    ((1, 2, 3), r"expected \(inputs, labels\), got 3 values"),
    (([[1.0], [1.0, 2.0]], None), "inputs must be numbers of one shape"),
    ((np.zeros((2, 1)), [0]), r"2 samples but labels of shape \(1,\)"),
])  # fmt: skip
def test_data_that_cannot_be_used(data, message):
    with pytest.raises(DataError, match=f"^memory: {message}"):
        as_dataset(data)


def test_labels_count_classes_as_the_network_does():
    """A set without 'bird' counts dog as 1; the network counts it as 2."""
    data = Dataset(inputs=np.zeros((3, 1)), labels=np.array([0, 1, 1]), classes=("cat", "dog"))
    assert as_dataset(data, classes=("bird", "cat", "dog")).labels.tolist() == [1, 2, 2]
    assert as_dataset(data, classes=("bird", "cat", "dog")).classes == ("bird", "cat", "dog")
    with pytest.raises(DataError, match="the network knows no class 'dog'"):
        as_dataset(data, classes=("bird", "cat"))


def test_batches_cover_the_set_in_order_and_take_takes_rows():
    data = Dataset(inputs=np.arange(7), labels=np.arange(7))
    assert [batch.tolist() for batch in data.batches(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert data.take(np.array([4, 1])).labels.tolist() == [4, 1]
    assert len(data.take(slice(2))) == 2


def test_the_digest_sees_samples_labels_shape_dtype_and_preprocessing():
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    changed = pixels.copy()
    changed[1, 3, 3, 2] = 1
    sets = [
        Dataset(inputs=pixels), Dataset(inputs=changed), Dataset(inputs=pixels.reshape(4, 2, 4, 3)),
        Dataset(inputs=pixels.view(np.int8)), Dataset(inputs=pixels, labels=np.array([0, 1])),
        Dataset(inputs=pixels, labels=np.array([1, 0])), Dataset(inputs=pixels, preprocess=RGB),
    ]  # fmt: skip
    assert len({data.sha256 for data in sets}) == len(sets)
    assert Dataset(inputs=pixels[::-1].copy(), source="elsewhere").sha256 == sets[0].sha256


@pytest.mark.cifar
@pytest.mark.skipif(not CIFAR.is_file(), reason="the CIFAR-10 test images are not beside the project")
def test_the_cifar_test_set():
    data = load_dataset(CIFAR, preprocess=RGB)
    assert data.inputs.shape == (5000, 32, 32, 3)
    assert np.bincount(data.labels).tolist() == [500] * 10
    assert data.classes[0] == "airplane"
    assert data.batch(slice(0, 2)).shape == (2, 3, 32, 32)
