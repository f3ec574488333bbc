"""LiteRT files joined, and taken apart, by their signatures.

A file holds subgraphs, signatures that name some of them, and buffers of constants, which subgraphs can share: one file
can hold every stage of a network, and a weight that two of its graphs have lies in it once. litert-torch 0.10 mixes up
the constants of programs that it is to write into one file (github.com/google-ai-edge/litert-torch, issue 1061), so
each is written by itself and they are joined here, in the terms of LiteRT's own schema.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgekit.artifacts import trunk_of, unbatched
from edgekit.errors import LoweringError
from edgekit.plan import Stage

__all__ = ["LiteRTFiles", "join", "read_model", "signatures", "write_model"]

ALIGNMENT = 16
"""Of a buffer in the file: LiteRT's schema asks for it, and its Python classes do not see to it."""
LARGEST = 2**31 - 1
"""Bytes of a file: what its offsets reach."""
OTHERS = 1 << 26
"""Bytes that are left for what is no weight."""


def read_model(path: Path) -> Any:
    """A file in the classes of LiteRT's schema, a ``ModelT``."""
    from ai_edge_litert.tools import flatbuffer_utils

    return flatbuffer_utils.read_model(str(path))


def write_model(model: Any) -> bytes:
    """The file of a ``ModelT``."""
    builder = _aligning()(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def signatures(path: Path) -> list[str]:
    """Names of a file's signatures, in order."""
    return [_text(each.signatureKey) for each in read_model(path).signatureDefs or ()]


def join(files: Iterable[tuple[Path, Sequence[str] | None]]) -> bytes:
    """One file with signatures of several, in their order; buffers of the same content are in it once.

    Args:
        files: each with the names of the signatures that are taken from it, ``None`` for all.

    Raises:
        LoweringError: it would be larger than a file can be.
    """
    joined = _Joined()
    for path, names in files:
        joined.add(read_model(path), names)
    return joined.content()


class LiteRTFiles:
    """The stages of a network in one file. See :class:`edgekit.interfaces.Joining`."""

    def join(self, files: Sequence[Path], path: Path) -> None:
        """Write one file that holds every stage of several."""
        path.write_bytes(join((file, None) for file in files))

    def part(self, file: Path, stage: Stage, path: Path) -> None:
        """Write a file that holds one stage of several.

        Raises:
            LoweringError: the stage is not in it.
        """
        graphs = (stage.name, trunk_of(stage.name))
        names = [name for name in signatures(file) if unbatched(name)[0] in graphs]
        if stage.name not in names:
            raise LoweringError(f"{file}: holds no stage '{stage.name}'; export again")
        path.write_bytes(join([(file, names)]))


class _Joined:
    """A model that takes over parts of others."""

    def __init__(self) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self._model: Any = schema.ModelT(version=3, description="edgekit")
        self._model.operatorCodes, self._model.subgraphs, self._model.signatureDefs = [], [], []
        self._model.metadata = []
        self._model.buffers = [schema.BufferT()]  # of all that is computed: it is empty
        self._operators: dict[tuple[Any, ...], int] = {}
        self._buffers: dict[bytes, int] = {}
        self._metadata: dict[bytes, Any] = {}

    def add(self, model: Any, names: Sequence[str] | None) -> None:
        """Take signatures, and all that they reach, from a model that is not used any more."""
        taken = [each for each in model.signatureDefs if names is None or _text(each.signatureKey) in names]
        reached = _reached(model, [each.subgraphIndex for each in taken])
        places = {old: len(self._model.subgraphs) + new for new, old in enumerate(reached)}
        for subgraph in (model.subgraphs[old] for old in reached):
            for tensor in subgraph.tensors:
                tensor.buffer = self._buffer(model.buffers[tensor.buffer])
            for operator in subgraph.operators:
                operator.opcodeIndex = self._operator(model.operatorCodes[operator.opcodeIndex])
                for options, field, called in _calls(operator):
                    setattr(options, field, places[called])
            self._model.subgraphs.append(subgraph)
        for signature in taken:
            signature.subgraphIndex = places[signature.subgraphIndex]
            self._model.signatureDefs.append(signature)
        for entry in model.metadata or ():
            self._add_metadata(entry, model.buffers[entry.buffer])

    def _buffer(self, buffer: Any) -> int:
        if buffer.data is None:  # one without bytes is a constant all the same, as the shape of a single number
            return 0
        return _place(self._buffers, hashlib.sha256(buffer.data).digest(), self._model.buffers, buffer)

    def _operator(self, code: Any) -> int:
        return _place(self._operators, tuple(vars(code).values()), self._model.operatorCodes, code)

    def _add_metadata(self, entry: Any, buffer: Any) -> None:
        """Keep what the first file says, and of the runtime's versions that are needed the newest."""
        known = self._metadata.get(entry.name)
        if known is None:
            self._metadata[entry.name] = entry
            self._model.metadata.append(entry)
        if known is None or (entry.name == b"min_runtime_version" and _version(buffer) > _version(self._of(known))):
            self._metadata[entry.name].buffer = self._buffer(buffer)

    def _of(self, entry: Any) -> Any:
        return self._model.buffers[entry.buffer]

    def content(self) -> bytes:
        """The file."""
        size = sum(len(each.data) for each in self._model.buffers if each.data is not None)
        if size + OTHERS > LARGEST:
            raise LoweringError(f"{size / 1e9:.1f} GB of weights are more than a LiteRT file can hold (2.1 GB)")
        return write_model(self._model)


def _place(known: dict[Any, int], key: Any, rows: list[Any], row: Any) -> int:
    """Where a row of a table is, which gets it if it has no equal yet."""
    if key not in known:
        known[key] = len(rows)
        rows.append(row)
    return known[key]


def _reached(model: Any, first: Iterable[int]) -> list[int]:
    """Subgraphs that these need, themselves among them, each once."""
    found, left = list[int](), list(first)
    while left:
        place = left.pop(0)
        if place not in found:
            found.append(place)
            left += [called for operator in model.subgraphs[place].operators for _, _, called in _calls(operator)]
    return found


def _calls(operator: Any) -> Iterator[tuple[Any, str, int]]:
    """Fields of an operator's options that name subgraphs, as those of ``WHILE`` and of composites do."""
    for options in (operator.builtinOptions, operator.builtinOptions2):
        for field, value in vars(options).items() if options is not None else ():
            if field.lower().endswith("subgraphindex") or field == "subgraph":
                yield options, field, int(value)


def _aligning() -> type[Any]:
    import flatbuffers

    class Builder(flatbuffers.Builder):  # type: ignore[misc]
        """Aligns every vector as buffers must be."""

        def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:  # noqa: N802, N803 - its names
            return super().StartVector(elemSize, numElems, max(alignment, ALIGNMENT))

    return Builder


def _version(buffer: Any) -> tuple[int, ...]:
    text = bytes(buffer.data).rstrip(b"\0").decode()
    return tuple(int(part) if part.isdigit() else 0 for part in text.split("."))


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name
