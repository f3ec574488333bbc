"""What lies on disk: a folder ``NAME.edgekit/``, or the same packed as one zip file.

::

    manifest.json                 plan, tensor contracts, digest and size of every file, versions that made it
    stages/<target>/<stage>.*     one artifact per stage and target, or one file of a target for all
    stages/<set>-<digest>/...     one more set, as "onnx-int8"; it may share files of the target's own
    golden/golden.npz             inputs, and the eager model's logits of every exit
    policies/<name>-<digest>.json thresholds with their provenance
    proposals/<name>-<digest>.json policies proposed for testing

Written aside and renamed into place. Every read checks path, size and digest. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.artifacts import FLOAT, precision_of
from edgekit.certificate import Proposal, to_mapping
from edgekit.errors import BundleError, CalibrationError, PolicyError
from edgekit.manifest import MANIFEST, FileEntry, Manifest, encode_manifest, lies_inside, read_manifest
from edgekit.plan import Plan
from edgekit.policy import Policy

__all__ = ["Bundle", "BundleWriter", "variant", "write_bundle"]

GOLDEN = "golden/golden.npz"
READ_BYTES = 1 << 17
"""Read at once into one block, small enough to stay in the processor's cache."""


class Bundle:
    """An open bundle. A context manager: a packed one is unpacked to a temporary folder until closed."""

    def __init__(self, path: Path, folder: Path, manifest: Manifest, unpacked: tempfile.TemporaryDirectory[str] | None):
        self.path = path
        self.manifest = manifest
        self._folder = folder
        self._unpacked = unpacked

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle folder or packed file and check its manifest and the presence of every file.

        Raises:
            BundleError: it is missing, damaged, incomplete, of a newer schema, or points outside itself.
        """
        path = Path(path)
        if path.is_dir():
            return cls(path, path, read_manifest(path, path), None)
        if not path.exists():
            raise BundleError(f"{path}: no such bundle")
        if not zipfile.is_zipfile(path):
            raise BundleError(f"{path}: neither a bundle folder nor a packed bundle")
        unpacked = tempfile.TemporaryDirectory(prefix="edgekit-")
        try:
            folder = Path(unpacked.name)
            _unpack(path, folder)
            return cls(path, folder, read_manifest(folder, path), unpacked)
        except BaseException:
            unpacked.cleanup()
            raise

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary folder of a packed bundle."""
        if self._unpacked is not None:
            self._unpacked.cleanup()

    @property
    def plan(self) -> Plan:
        """Stages and steps."""
        return self.manifest.plan

    @property
    def targets(self) -> tuple[str, ...]:
        """Kinds of device that the stages were written for."""
        return tuple(self.manifest.artifacts)

    def artifact(self, target: str, stage: str) -> Path:
        """The file of one stage, its digest checked, and that of what lies beside it under the same name.

        Raises:
            BundleError: the bundle has no such artifact, or it changed since it was written.
        """
        return self._artifacts(target, (stage,))[stage]

    def artifacts(self, target: str) -> dict[str, Path]:
        """The file of each stage, by name, as :meth:`artifact` does; a file that holds several is checked once.

        Raises:
            BundleError: the bundle has no such artifacts, or one changed since it was written.
        """
        return self._artifacts(target, [stage.name for stage in self.plan.stages])

    def _artifacts(self, target: str, stages: Sequence[str]) -> dict[str, Path]:
        named = self.manifest.artifacts.get(target, {})
        missing = next((stage for stage in stages if stage not in named), None)
        if missing is not None:
            precision = precision_of(target)
            remedy = f"export again with targets=('{target}',)"
            if precision != FLOAT:
                remedy = f"run edgekit quantize --precision {precision}"
            raise BundleError(
                f"{self.path}: holds no '{target}' artifact of stage '{missing}' "
                f"(targets: {', '.join(self.targets) or 'none'}); {remedy}"
            )
        for file in dict.fromkeys(file for stage in stages for file in self._files_of(named[stage])):
            self._verify(file)
        return {stage: self._folder / named[stage] for stage in stages}

    def artifact_digests(self, target: str) -> dict[str, str]:
        """sha256 of every file of a target's artifacts, by path."""
        artifacts = self.manifest.artifacts.get(target, {}).values()
        return {file: self.manifest.files[file].sha256 for name in artifacts for file in self._files_of(name)}

    def artifact_bytes(self, target: str, stage: str | None = None) -> int:
        """Size of one stage's files, or of all of a target's; files that two targets share count for each."""
        artifacts = self.manifest.artifacts[target]
        chosen = artifacts.values() if stage is None else (artifacts[stage],)
        files = {file for name in chosen for file in self._files_of(name)}
        return sum(self.manifest.files[file].size_bytes for file in files)

    def _files_of(self, artifact: str) -> list[str]:
        """An artifact and what lies beside it under the same name: variants of its graph, its weights."""
        stem = _stem(artifact)
        stems = {_stem(name) for stages in self.manifest.artifacts.values() for name in stages.values()}
        others = tuple(f"{name}{end}" for name in stems if name.startswith((f"{stem}.", f"{stem}-")) for end in ".-")
        return [
            name
            for name in self.manifest.files
            if name.startswith((f"{stem}.", f"{stem}-")) and not name.startswith(others)
        ]

    def verify(self) -> None:
        """Check the digest of every file. Raises :class:`BundleError` at the first that changed."""
        for name in self.manifest.files:
            self._verify(name)

    def golden(self) -> dict[str, NDArray[Any]]:
        """Golden inputs as ``input:NAME`` and the eager model's logits as ``exit:NAME``."""
        with np.load(self._verify(GOLDEN), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    def policy(self, name: str = "default") -> Policy:
        """A saved policy.

        Raises:
            PolicyError: there is none of that name, or it was made for another network.
        """
        try:
            path = self.manifest.policies[name]
        except KeyError:
            raise PolicyError(
                f"{self.path}: has no policy '{name}' (saved: {', '.join(self.manifest.policies) or 'none'}); "
                "run edgekit calibrate"
            ) from None
        try:
            policy = Policy.from_mapping(msgspec.json.decode(self._verify(path).read_bytes()))
        except (msgspec.DecodeError, PolicyError) as error:
            raise PolicyError(f"{self.path}: policy '{name}' is damaged ({error}); calibrate again") from error
        policy.require_fits(self.plan)
        return policy

    def save_policy(self, policy: Policy) -> None:
        """Add a policy, or replace the one of the same name; a crash leaves the old or the new, never half.

        Raises:
            PolicyError: it does not fit this network.
            BundleError: it cannot be written.
        """
        policy.require_fits(self.plan)
        self._save("policies", policy.name, policy.to_mapping())

    def proposal(self, name: str = "default") -> Proposal:
        """A saved proposal of policies to test.

        Raises:
            CalibrationError: there is none of that name, it is damaged, or it was made for another network.
        """
        file = self.manifest.proposals.get(name)
        if file is None:
            known = ", ".join(self.manifest.proposals) or "none"
            raise CalibrationError(f"{self.path}: has no proposal '{name}' (saved: {known}); run edgekit propose")
        try:
            proposed = Proposal.from_mapping(msgspec.json.decode(self._verify(file).read_bytes()))
        except (msgspec.DecodeError, CalibrationError) as error:
            raise CalibrationError(f"{self.path}: proposal '{name}' is damaged ({error}); propose again") from error
        if proposed.plan != self.plan.fingerprint:
            raise CalibrationError(f"{self.path}: proposal '{name}' is for another network: propose on this bundle")
        return proposed

    def save_proposal(self, proposed: Proposal) -> None:
        """Add a proposal, or replace the one of the same name, as :meth:`save_policy` does.

        Raises:
            BundleError: it cannot be written.
        """
        self._save("proposals", proposed.name, to_mapping(proposed))

    def _save(self, kind: Literal["policies", "proposals"], name: str, mapping: Any) -> None:
        content = msgspec.json.format(msgspec.json.encode(mapping), indent=2)
        digest = hashlib.sha256(content).hexdigest()
        file = f"{kind}/{name}-{digest[:12]}.json"
        before = read_manifest(self._folder, self.path)
        saved: dict[str, str] = getattr(before, kind)
        files = {path: entry for path, entry in before.files.items() if path != saved.get(name)}
        files[file] = FileEntry(digest, len(content))
        manifest = msgspec.structs.replace(before, files=files, **{kind: {**saved, name: file}})
        try:
            self._replace_manifest(manifest, before=before, add=lambda: _write_aside(self._folder / file, content))
        except OSError as error:
            reason = error.strerror or error
            raise BundleError(f"{self.path}: {kind} '{name}' cannot be written ({reason})") from error

    def add_artifacts(
        self,
        name: str,
        folder: Path,
        artifacts: Mapping[str, str],
        *,
        shared: Mapping[str, str] | None = None,
        parity: Any = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """Add a set of artifacts, or replace the one of the same name; a crash leaves the old or the new, never half.

        Args:
            name: of the set, as ``"onnx-int8"``.
            folder: what was written; all its files are copied. Not read when ``artifacts`` is empty.
            artifacts: for each stage written, the name of its file in the folder.
            shared: for each stage that was not, the set whose files it shares.
            parity: what was found when it was compared with the float stages.
            versions: of the libraries that wrote it.

        Raises:
            BundleError: a stage has no artifact, or the set cannot be written.
        """
        before = read_manifest(self._folder, self.path)
        written = _entries(folder) if artifacts else {}
        digest = hashlib.sha256(msgspec.json.encode(written, order="sorted")).hexdigest()
        home = f"stages/{name}-{digest[:12]}"
        found = {stage: f"{home}/{file}" for stage, file in artifacts.items()}
        found |= {stage: before.artifacts[other][stage] for stage, other in (shared or {}).items()}
        missing = [stage.name for stage in before.plan.stages if stage.name not in found]
        if missing:
            raise BundleError(f"{self.path}: the set '{name}' has no artifact of stage '{missing[0]}'; write all")
        sets = {**before.artifacts, name: found}
        homes = {_parent(path) for other, stages in sets.items() for path in stages.values() if other != name}
        gone = {_parent(path) for path in before.artifacts.get(name, {}).values()} - homes - {home}
        files = {path: each for path, each in before.files.items() if _parent(path) not in gone}
        manifest = msgspec.structs.replace(
            before,
            artifacts=sets,
            files={**files, **{f"{home}/{file}": each for file, each in written.items()}},
            parity={**before.parity, name: parity} if parity is not None else before.parity,
            versions={**before.versions, **(versions or {})},
        )
        is_new = any(f"{home}/{file}" not in before.files for file in written)
        try:
            add = (lambda: _copy_aside(folder, self._folder / home)) if is_new else (lambda: None)
            self._replace_manifest(manifest, before=before, add=add)
        except OSError as error:
            raise BundleError(f"{self.path}: set '{name}' cannot be written ({error.strerror or error})") from error
        finally:
            for path in (*gone, home):
                if not any(_parent(file) == path for file in self.manifest.files):
                    shutil.rmtree(self._folder / path, ignore_errors=True)

    def _replace_manifest(self, manifest: Manifest, *, before: Manifest, add: Callable[[], None]) -> None:
        """Add files, then write the manifest that lists them: the moment from which they count. Then tidy up."""
        try:
            add()
            _write_aside(self._folder / MANIFEST, encode_manifest(manifest))
            if self._unpacked is not None:
                _pack(self._folder, self.path, manifest)
        except BaseException:
            if self._unpacked is not None:  # this folder is a copy: keep it in step with the packed file
                (self._folder / MANIFEST).write_bytes(encode_manifest(before))
            raise
        finally:
            self.manifest = read_manifest(self._folder, self.path)
            for path in (*self._folder.glob("policies/*.json"), *self._folder.glob("proposals/*.json")):
                if path.relative_to(self._folder).as_posix() not in self.manifest.files:
                    path.unlink()

    def pack(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the bundle as one file.

        Raises:
            BundleError: ``path`` exists and ``overwrite`` is false, is no bundle, or cannot be written.
        """
        path = Path(path)
        _require_writable(path, overwrite=overwrite)
        try:
            return _pack(self._folder, path, self.manifest)
        except OSError as error:
            raise BundleError(f"{path}: cannot be written ({error.strerror or error})") from error

    def _verify(self, name: str) -> Path:
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path}: {name} is not in the manifest")
        path = self._folder / name
        try:
            content_digest = _digest(path)
        except OSError as error:
            raise BundleError(f"{self.path}: {name} cannot be read ({error.strerror})") from error
        if content_digest != entry.sha256:
            raise BundleError(f"{self.path}: {name} was changed after export (its sha256 differs); export again")
        return path


def variant(artifact: Path, name: str) -> Path:
    """A file that belongs to an artifact: of ``stage.onnx``, ``max_prob`` is ``stage-max_prob.onnx``."""
    return artifact.with_name(f"{artifact.stem}-{name}{artifact.suffix}")


@contextmanager
def write_bundle(path: str | Path, *, overwrite: bool = False, packed: bool = False) -> Iterator[BundleWriter]:
    """A folder to fill, beside ``path``; renamed to ``path`` when the block ends well, removed when it does not.

    Raises:
        BundleError: ``path`` exists and ``overwrite`` is false, or writing failed; nothing is left behind.
    """
    path = Path(path)
    _require_writable(path, overwrite=overwrite)
    aside: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        aside.chmod(0o755)
        writer = BundleWriter(aside)
        yield writer
        manifest = writer.finish()
        if packed:
            _pack(aside, path, manifest)
        else:
            _put(aside, path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


class BundleWriter:
    """Fills a bundle that is being written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._manifest: Manifest | None = None

    def path(self, name: str) -> Path:
        """Where to write a file of the bundle; its folder exists."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def golden(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Write golden inputs and outputs."""
        np.savez(self.path(GOLDEN), allow_pickle=False, **arrays)

    def describe(self, manifest: Manifest) -> None:
        """Set the manifest; digests are taken at the end, of every file written."""
        self._manifest = manifest

    def finish(self) -> Manifest:
        """Take digests and write the manifest."""
        if self._manifest is None:
            raise BundleError("a bundle needs a manifest before it is finished")
        files = {
            path.relative_to(self.folder).as_posix(): FileEntry(_digest(path), path.stat().st_size)
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        manifest = msgspec.structs.replace(self._manifest, files=files, created=created)
        (self.folder / MANIFEST).write_bytes(encode_manifest(manifest))
        return manifest


def _stem(artifact: str) -> str:
    return str(PurePosixPath(artifact).with_suffix(""))


def _parent(file: str) -> str:
    return str(PurePosixPath(file).parent)


def _entries(folder: Path) -> dict[str, FileEntry]:
    """Digest and size of a folder's files, by name."""
    return {
        path.name: FileEntry(_digest(path), path.stat().st_size) for path in sorted(folder.iterdir()) if path.is_file()
    }


def _copy_aside(folder: Path, path: Path) -> None:
    """Copy a folder's files to ``path``, which is there with all of them or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        aside.chmod(0o755)
        for file in sorted(folder.iterdir()):
            if file.is_file():
                _write_aside(aside / file.name, file.read_bytes())
        if path.exists():  # left behind by a crash: nothing lists it
            shutil.rmtree(path)
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    block = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def _write_aside(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a power cut must not leave an empty file under the new name
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _require_writable(path: Path, *, overwrite: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise BundleError(f"{path}: exists already; choose another name or allow overwriting")
    if not (path / MANIFEST).is_file() and not (path.is_file() and zipfile.is_zipfile(path)):
        raise BundleError(f"{path}: is not a bundle, so it is not overwritten; choose another name")


def _put(aside: Path, path: Path) -> None:
    """Rename ``aside``, folder or file, to ``path``; an older bundle is moved away first and put back on failure."""
    if not path.exists() or (path.is_file() and aside.is_file()):
        os.replace(aside, path)
        return
    away = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
    old = away / "bundle"
    try:
        os.rename(path, old)
        os.replace(aside, path)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(away, ignore_errors=True)  # not reached while the old one is the only one


def _pack(folder: Path, path: Path, manifest: Manifest) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
            for file in (MANIFEST, *sorted(manifest.files)):
                archive.write(folder / file, file)
        aside.chmod(0o644)
        _put(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _unpack(path: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not lies_inside(name, folder):
                    raise BundleError(f"{path}: holds '{name}', which is outside the bundle; do not use it")
            archive.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
        raise BundleError(f"{path}: cannot be unpacked ({error}); copy it again, or export again") from error
