"""Calibration and test sets: ``.npz`` files, image folders, tar archives of image folders, and Python callables."""

from __future__ import annotations

import hashlib
import importlib
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError, require
from edgekit.progress import Progress, silent

__all__ = ["Dataset", "Preprocess", "load_dataset"]

INPUT = "input:"
"""Before the name of an input, in an archive of several."""
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"})
"""Files of an image folder that are read; others are an error, never skipped in silence (but hidden files are)."""

DAMAGED = (OSError, EOFError, ValueError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
"""What the standard library and numpy raise on files that cannot be read, encrypted archives included."""


class Preprocess(msgspec.Struct, frozen=True, kw_only=True):
    """What turns 8-bit images into a network's input: ``(pixel / 255 - mean) / std``, per channel.

    Attributes:
        mean: per channel, in units of full scale.
        std: per channel, in units of full scale.
        size: ``(height, width)`` that images are resized to; ``None`` keeps their own.
        channels: 1 converts to grey, 3 to RGB.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None
    channels: int = 3

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.channels:
            raise DataError(
                f"preprocessing gives {len(self.mean)} means and {len(self.std)} standard deviations "
                f"for {self.channels} channels: give one of each per channel"
            )
        if not all(np.isfinite(value) and value > 0 for value in self.std):
            raise DataError(f"preprocessing standard deviations must be positive, not {self.std}")

    def require_images(self, inputs: NDArray[Any], source: str) -> None:
        """Raises :class:`DataError` unless these are 8-bit images with as many channels as this takes."""
        if inputs.dtype != np.uint8 or inputs.ndim != 4 or inputs.shape[3] != self.channels:
            raise DataError(
                f"{source}: preprocessing takes images (samples, height, width, {self.channels}) uint8, "
                f"not {inputs.shape} {inputs.dtype}"
            )

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """``(batch, height, width, channels) uint8`` to ``(batch, channels, height, width) float32``."""
        scale = (1.0 / (255.0 * np.asarray(self.std))).astype(np.float32)
        shift = (np.asarray(self.mean) / np.asarray(self.std)).astype(np.float32)
        return np.ascontiguousarray((images.astype(np.float32) * scale - shift).transpose(0, 3, 1, 2))


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Samples in memory, with their labels when they have any.

    Attributes:
        inputs: ``(samples, ...)``: model-ready arrays, or ``(samples, height, width, channels) uint8`` images when
            ``preprocess`` is set. For a network with several inputs an array ``(samples,)`` with a field for each,
            under its name; :meth:`several` makes one.
        labels: ``(samples,) int64`` class indices, or ``None``.
        classes: class names in label order, empty when the source has none.
        source: where the samples came from, for provenance.
        preprocess: applied batch by batch, so that a large set stays 8-bit in memory.
    """

    inputs: NDArray[Any]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    source: str = "memory"
    preprocess: Preprocess | None = None

    def __post_init__(self) -> None:
        if self.inputs.ndim == 0 or len(self.inputs) == 0:
            raise DataError(f"{self.source}: no samples")
        if not _is_numeric(self.inputs.dtype):
            raise DataError(f"{self.source}: inputs must be numbers of one shape, not {self.inputs.dtype}")
        if self.preprocess is not None:
            self.preprocess.require_images(self.inputs, self.source)
        if self.labels is not None and self.labels.shape != (len(self.inputs),):
            raise DataError(
                f"{self.source}: {len(self.inputs)} samples but labels of shape {self.labels.shape}; "
                "give one integer label per sample"
            )

    @classmethod
    def several(
        cls, inputs: Mapping[str, Any], labels: NDArray[np.int64] | None = None, *, source: str = "memory"
    ) -> Dataset:
        """Samples of a network with several inputs.

        Args:
            inputs: ``(samples, ...)`` each, by the network's names for them.
            labels: ``(samples,) int64`` class indices.
            source: where they came from.

        Raises:
            DataError: they are no numbers, or not as many of each.
        """
        arrays = {name: _numbers(given, f"{source}: input '{name}'") for name, given in inputs.items()}
        counts = {name: len(array) for name, array in arrays.items()}
        if not counts or len(set(counts.values())) > 1:
            raise DataError(f"{source}: not as many samples of every input: {counts or 'there is none'}")
        fields = [(name, array.dtype, array.shape[1:]) for name, array in arrays.items()]
        made = np.empty(next(iter(counts.values())), dtype=fields)
        for name, array in arrays.items():
            made[name] = array
        return cls(inputs=made, labels=labels, source=source)

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def sha256(self) -> str:
        """Digest of samples, labels and preprocessing: what a policy's provenance names."""
        digest = hashlib.sha256()
        for array in (self.inputs, self.labels):
            if array is not None:
                digest.update(f"{array.dtype.str}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        if self.preprocess is not None:
            digest.update(msgspec.json.encode(self.preprocess))
        return digest.hexdigest()

    def batch(self, rows: slice | NDArray[np.intp]) -> NDArray[Any]:
        """Model-ready inputs of some rows: ``(rows, ...)``."""
        chosen = self.inputs[rows]
        return chosen if self.preprocess is None else self.preprocess(chosen)

    def batches(self, size: int) -> Iterator[NDArray[Any]]:
        """Model-ready inputs in order, ``size`` rows at a time (the last may be shorter)."""
        for start in range(0, len(self), size):
            yield self.batch(slice(start, start + size))

    def take(self, rows: NDArray[np.intp] | slice) -> Dataset:
        """The same set with some rows only."""
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, inputs=self.inputs[rows], labels=labels)

    def counted_as(self, classes: Sequence[str]) -> Dataset:
        """The same set with labels in the order of ``classes``, matched by name; as it is where either has no names.

        A folder that lacks a class counts its classes otherwise than the network does.

        Raises:
            DataError: a class of this set is not among ``classes``.
        """
        if self.labels is None or not self.classes or not classes or self.classes == tuple(classes):
            return self
        unknown = sorted(set(self.classes) - set(classes))
        if unknown:
            raise DataError(
                f"{self.source}: the network knows no class '{unknown[0]}', but {', '.join(list(classes)[:5])}, ...; "
                "name class folders as the network does"
            )
        order = np.asarray([list(classes).index(name) for name in self.classes], dtype=np.int64)
        return replace(self, labels=order[self.labels], classes=tuple(classes))


def load_dataset(source: str | Path, *, preprocess: Preprocess | None = None, progress: Progress = silent) -> Dataset:
    """Read a data set.

    Args:
        source: an ``.npz`` with ``inputs`` (or ``x``, ``images``), or with ``input:NAME`` for each of several inputs,
            and optionally ``labels`` (or ``y``); a folder, or a
            ``.tar``, ``.tar.gz`` or ``.zip`` of one, laid out as ``class-name/image.jpg``, with any folders above; or
            ``module:callable`` returning a :class:`Dataset`, an array, or ``(inputs, labels)``. In an ``.npz``,
            ``(samples, height, width, channels) uint8`` are images too, where preprocessing is given.
        preprocess: how images become inputs (a bundle carries its own); needed for images only.
        progress: told how many images have been read.

    Raises:
        DataError: the source is missing, empty, damaged, or not of a known kind.
        MissingExtraError: images need Pillow.
    """
    text = str(source)
    path = Path(source)
    if not path.exists():
        if ":" in text:
            return _from_callable(text)
        raise DataError(f"{text}: no such file or folder (a Python source is written module:callable)")
    try:
        if path.is_dir():
            return _from_images(_folder_files(path), text, preprocess, progress)
        if path.suffix == ".npz":
            return _from_npz(path, preprocess)
        if tarfile.is_tarfile(path):
            return _from_images(_tar_files(path), text, preprocess, progress)
        if zipfile.is_zipfile(path):
            return _from_images(_zip_files(path), text, preprocess, progress)
    except DAMAGED as error:
        raise DataError(f"{text}: cannot be read ({error})") from error
    raise DataError(f"{text}: not an .npz file, an image folder, or a tar or zip of one")


def as_dataset(
    data: Dataset | str | Path | tuple[Any, Any] | Mapping[str, Any] | NDArray[Any],
    *,
    preprocess: Preprocess | None = None,
    classes: Sequence[str] = (),
    progress: Progress = silent,
) -> Dataset:
    """What people pass as ``data``: a :class:`Dataset`, a source to read, ``(inputs, labels)`` or inputs alone.

    Inputs are an array, or, for a network with several, a mapping of arrays by its names for them.

    Args:
        data: any of these.
        preprocess: as for :func:`load_dataset`.
        classes: the network's class names in label order, when known; labels are made to count as it does.
        progress: as for :func:`load_dataset`.

    Raises:
        DataError: it is none of these, cannot be used, or has classes that the network does not know.
    """
    if isinstance(data, str | Path):
        data = load_dataset(data, preprocess=preprocess, progress=progress)
    if isinstance(data, Dataset):
        return data.counted_as(classes)
    if isinstance(data, tuple) and len(data) != 2:
        raise DataError(f"memory: expected (inputs, labels), got {len(data)} values")
    inputs, labels = data if isinstance(data, tuple) else (data, None)
    found = _integer_labels(labels, "memory")
    if isinstance(inputs, Mapping):
        return Dataset.several(inputs, found)
    return Dataset(inputs=_numbers(inputs, "memory: inputs"), labels=found)


def _numbers(given: Any, what: str) -> NDArray[Any]:
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise DataError(f"{what} must be numbers of one shape ({error})") from error
    if array.ndim == 0:
        raise DataError(f"{what} must be samples, not one number")
    if not _is_numeric(array.dtype):
        raise DataError(f"{what} must be numbers of one shape, not {array.dtype}")
    return array


def _is_numeric(dtype: np.dtype[Any]) -> bool:
    """Whether an array holds numbers, or a field of numbers for each of several inputs."""
    fields = [field[0] for field in dtype.fields.values()] if dtype.fields else [dtype]
    return all(each.base.kind in "biufc" for each in fields)


def _integer_labels(labels: Any, source: str) -> NDArray[np.int64] | None:
    if labels is None:
        return None
    array = np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"{source}: labels must be one integer per sample, not {array.dtype} {array.shape}")
    return array.astype(np.int64)


def _from_npz(path: Path, preprocess: Preprocess | None) -> Dataset:
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: is damaged or no .npz archive; write it with numpy.savez")
    with np.load(path, allow_pickle=False) as archive:
        names = set(archive.files)
        inputs = next((name for name in ("inputs", "x", "images") if name in names), None)
        labels = next((name for name in ("labels", "y") if name in names), None)
        several = {name.removeprefix(INPUT): archive[name] for name in archive.files if name.startswith(INPUT)}
        if several:
            return Dataset.several(
                several, _integer_labels(archive[labels], str(path)) if labels else None, source=str(path)
            )
        if inputs is None:
            raise DataError(
                f"{path}: no array named 'inputs' or 'x', and none '{INPUT}NAME' "
                f"(found: {', '.join(sorted(names)) or 'none'})"
            )
        array = archive[inputs]
        images = array.dtype == np.uint8 and array.ndim == 4
        return Dataset(
            inputs=array,
            labels=_integer_labels(archive[labels], str(path)) if labels else None,
            source=str(path),
            preprocess=preprocess if images else None,
        )


def _from_callable(text: str) -> Dataset:
    module, _, name = text.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"{text}: cannot be imported ({error})") from error
    try:
        made = function()
    except Exception as error:  # a user's function may raise anything
        raise DataError(f"{text}: failed with {type(error).__name__}: {error}") from error
    if not isinstance(made, Dataset | tuple | Mapping | np.ndarray):
        raise DataError(f"{text}: returned {type(made).__name__}, not a Dataset, an array or (inputs, labels)")
    return replace(as_dataset(made), source=text)


_Files = tuple[int, Iterator[tuple[str, bytes]]]
"""How many image files there are, and each as ``(path inside the source, content)``, in name order."""


def _folder_files(root: Path) -> _Files:
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    names = sorted(name for name in paths if _visible(name))
    return len(names), ((name, paths[name].read_bytes()) for name in names)


def _tar_files(path: Path) -> _Files:
    with tarfile.open(path) as archive:
        members = [member for member in archive if member.isfile() and _visible(member.name)]
        # Read in archive order (a gzip stream only goes forward), hand out in name order.
        contents = {member.name: archive.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    return len(contents), iter(sorted(contents.items()))


def _zip_files(path: Path) -> _Files:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/") and _visible(name)]
        contents = {name: archive.read(name) for name in names}
    return len(contents), iter(sorted(contents.items()))


def _visible(name: str) -> bool:
    """Whether a path has no hidden part, such as the ``._name`` files that some systems put into archives."""
    return not any(part.startswith(".") for part in PurePosixPath(name).parts)


def _from_images(files: _Files, source: str, preprocess: Preprocess | None, progress: Progress) -> Dataset:
    total, items = files
    if total == 0:
        raise DataError(f"{source}: holds no image files")
    if preprocess is None:
        raise DataError(f"{source}: images need preprocessing (mean, std, size), and the bundle names none")
    images: list[NDArray[np.uint8]] = []
    names: list[str] = []
    for done, (name, content) in enumerate(items, start=1):
        parts = Path(name).parts
        if len(parts) < 2 or Path(name).suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(f"{source}: {name} is not an image inside a class folder")
        images.append(_decode(content, f"{source}: {name}", preprocess))
        names.append(parts[-2])
        progress("read images", done, total)
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise DataError(f"{source}: images differ in size ({sorted(shapes)[:3]}); give preprocessing a size")
    classes = tuple(sorted(set(names)))
    index = {name: label for label, name in enumerate(classes)}
    labels = np.asarray([index[name] for name in names], dtype=np.int64)
    return Dataset(inputs=np.stack(images), labels=labels, classes=classes, source=source, preprocess=preprocess)


def _decode(content: bytes, name: str, preprocess: Preprocess) -> NDArray[np.uint8]:
    image_library = require("PIL.Image", extra="images", purpose="Reading images")
    try:
        with image_library.open(BytesIO(content)) as opened:
            image = opened.convert("RGB" if preprocess.channels == 3 else "L")
            if preprocess.size is not None and image.size != preprocess.size[::-1]:
                image = image.resize(preprocess.size[::-1])
    except (OSError, ValueError, SyntaxError, image_library.DecompressionBombError) as error:
        raise DataError(f"{name}: not a readable image ({error})") from error
    array = np.asarray(image, dtype=np.uint8)
    return array if array.ndim == 3 else array[..., None]
