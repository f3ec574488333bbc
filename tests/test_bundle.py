from __future__ import annotations

import errno
import json
import math
import os
import shutil
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgekit import bundle as bundle_module
from edgekit.bundle import Bundle, write_bundle
from edgekit.data import Preprocess
from edgekit.errors import BundleError, PolicyError
from edgekit.manifest import SCHEMA, Manifest
from edgekit.plan import SCORES, Exit, Plan, Run, Stage
from edgekit.policy import Policy, Provenance
from edgekit.tensors import BATCH, TensorSpec


def plan_of(name: str = "a") -> Plan:
    """Two exits on one input; stages ``name`` and ``b``."""
    tensors = {"x": TensorSpec("x", "float32", (BATCH, 2))}
    stages, steps = [], []
    for stage in (name, "b"):
        scores = {score: f"{stage}.{score}" for score in SCORES}
        tensors[f"{stage}.l"] = TensorSpec(f"{stage}.l", "float32", (BATCH, 2))
        tensors[f"{stage}.t"] = TensorSpec(f"{stage}.t", "float32", ())
        tensors |= {score: TensorSpec(score, "float32", (BATCH,)) for score in scores.values()}
        outputs = (f"{stage}.l", *scores.values())
        stages.append(Stage(name=stage, inputs=("x", f"{stage}.t"), outputs=outputs, macs=1, weight_bytes=0))
        steps += [Run(stage), Exit(name=stage, logits=f"{stage}.l", temperature=f"{stage}.t", scores=scores)]
    return Plan(inputs=(tensors["x"],), tensors=tensors, stages=tuple(stages), steps=tuple(steps))


GOLDEN = {"input:x": np.ones((1, 2), np.float32), "exit:a": np.zeros((1, 2), np.float32)}


def fill(writer, *, content: bytes = b"stage a") -> None:
    writer.path("stages/onnx/a.onnx").write_bytes(content)
    writer.path("stages/onnx/a.onnx.data").write_bytes(b"weights")
    writer.path("stages/onnx/b.onnx").write_bytes(b"stage b")
    writer.golden(GOLDEN)
    artifacts = {"onnx": {"a": "stages/onnx/a.onnx", "b": "stages/onnx/b.onnx"}}
    preprocess = Preprocess(mean=(0.5,), std=(0.25,), channels=1)
    writer.describe(
        Manifest(name="net", created="", plan=plan_of(), artifacts=artifacts, preprocess=preprocess, classes=("n", "y"))
    )


def write(path: Path, *, content: bytes = b"stage a", **options) -> Path:
    with write_bundle(path, **options) as writer:
        fill(writer, content=content)
    return path


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "net.edgekit")


@pytest.fixture
def packed(tmp_path):
    return write(tmp_path / "packed.edgekit", packed=True)


@pytest.fixture(params=[False, True], ids=["folder", "packed"])
def either(request, tmp_path):
    return write(tmp_path / "net.edgekit", packed=request.param)


def listing(path: Path) -> list[str]:
    return sorted(each.relative_to(path).as_posix() for each in path.rglob("*"))


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_was_written_is_read(either):
    with Bundle.open(either) as bundle:
        assert bundle.plan == plan_of()
        assert bundle.targets == ("onnx",)
        assert bundle.manifest.schema == SCHEMA
        assert bundle.manifest.name == "net"
        assert bundle.manifest.preprocess == Preprocess(mean=(0.5,), std=(0.25,), channels=1)
        assert bundle.manifest.classes == ("n", "y")
        assert bundle.manifest.created.endswith("+00:00")
        assert bundle.artifact("onnx", "a").read_bytes() == b"stage a"
        assert set(bundle.artifact_digests("onnx")) == {
            "stages/onnx/a.onnx",
            "stages/onnx/a.onnx.data",
            "stages/onnx/b.onnx",
        }
        assert bundle.artifact_digests("tensorrt") == {}
        assert {name: array.tolist() for name, array in bundle.golden().items()} == {
            name: array.tolist() for name, array in GOLDEN.items()
        }
        bundle.verify()
    assert os.listdir(either.parent) == [either.name]


def test_a_packed_bundle_leaves_nothing_unpacked_when_closed(packed):
    with Bundle.open(packed) as bundle:
        unpacked = bundle.artifact("onnx", "a")
        assert unpacked.exists()
    assert not unpacked.exists()


def test_packing_keeps_everything(folder, tmp_path):
    with Bundle.open(folder) as bundle:
        path = bundle.pack(tmp_path / "one.file")
        with pytest.raises(BundleError, match="exists already"):
            bundle.pack(path)
        bundle.pack(path, overwrite=True)
        with Bundle.open(path) as again:
            assert again.manifest == bundle.manifest
            again.verify()


def test_packing_never_replaces_what_is_no_bundle(folder, tmp_path):
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letter.txt").write_text("keep")
    with Bundle.open(folder) as bundle, pytest.raises(BundleError, match="is not a bundle, so it is not overwritten"):
        bundle.pack(precious, overwrite=True)
    assert (precious / "letter.txt").read_text() == "keep"


# Policies


def test_a_policy_is_saved_and_found_again(either):
    policy = Policy.fixed([math.inf], name="default")
    with Bundle.open(either) as bundle:
        bundle.save_policy(policy)
        assert bundle.policy() == policy
    with Bundle.open(either) as bundle:
        assert bundle.policy() == policy
        bundle.verify()


def test_the_newer_policy_of_a_name_replaces_the_older(either):
    with Bundle.open(either) as bundle:
        for threshold in (0.5, 0.6, 0.6, 0.7):
            bundle.save_policy(Policy.fixed([threshold], name="default"))
        bundle.save_policy(Policy.fixed([0.1], name="other"))
    with Bundle.open(either) as bundle:
        assert bundle.policy().thresholds == (float(np.float32(0.7)),)
        assert set(bundle.manifest.policies) == {"default", "other"}
        assert len([name for name in bundle.manifest.files if name.startswith("policies/")]) == 2


def test_policies_saved_by_another_opening_are_kept(folder):
    with Bundle.open(folder) as one, Bundle.open(folder) as two:
        one.save_policy(Policy.fixed([0.1], name="one"))
        two.save_policy(Policy.fixed([0.2], name="two"))
        assert set(two.manifest.policies) == {"one", "two"}


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_older_policy(either, monkeypatch, failing, error):
    """The first replacement is the policy's, the second the manifest's, the third the packed file's."""
    old, new = Policy.fixed([0.5], name="default"), Policy.fixed([0.6], name="default")
    with Bundle.open(either) as bundle:
        bundle.save_policy(old)
    before = listing(either.parent)
    replace, calls = os.replace, []

    def broken(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise error
        replace(source, target)

    with Bundle.open(either) as bundle:
        monkeypatch.setattr(os, "replace", broken)
        if failing == 3 and either.is_dir():
            bundle.save_policy(new)
            old = new
        else:
            with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else BundleError):
                bundle.save_policy(new)
            assert listing(either.parent) == before
        monkeypatch.undo()
        assert bundle.policy() == old
    with Bundle.open(either) as bundle:
        assert bundle.policy() == old
        bundle.verify()


def test_a_policy_of_another_network_is_neither_saved_nor_read(folder):
    foreign = msgspec.structs.replace(
        Policy.fixed([0.5], name="default"), provenance=Provenance(method="m", plan=plan_of("other").fingerprint)
    )
    with Bundle.open(folder) as bundle:
        with pytest.raises(PolicyError, match="made for another network"):
            bundle.save_policy(foreign)
        with pytest.raises(PolicyError, match="has thresholds for 3 exits, the network has 2"):
            bundle.save_policy(Policy.never(3))
        bundle.save_policy(Policy.fixed([0.5], name="default"))
        path = folder / bundle.manifest.policies["default"]
    content = msgspec.json.encode(foreign.to_mapping())
    path.write_bytes(content)
    name = path.relative_to(folder).as_posix()
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: entry(content)}))
    with Bundle.open(folder) as bundle, pytest.raises(PolicyError, match="made for another network"):
        bundle.policy()


def entry(content: bytes) -> dict[str, object]:
    return {"sha256": bundle_module.hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}


def test_a_damaged_policy(folder):
    (folder / "policies").mkdir()
    (folder / "policies/p.json").write_bytes(b"{")
    edit_manifest(
        folder,
        lambda manifest: manifest.update(
            policies={"default": "policies/p.json"}, files={**manifest["files"], "policies/p.json": entry(b"{")}
        ),
    )
    with Bundle.open(folder) as bundle, pytest.raises(PolicyError, match=r"policy 'default' is damaged .*calibrate"):
        bundle.policy()


def test_no_such_policy(folder):
    with Bundle.open(folder) as bundle:
        bundle.save_policy(Policy.fixed([0.5], name="mild"))
        with pytest.raises(PolicyError, match=r"has no policy 'default' \(saved: mild\); run edgekit calibrate"):
            bundle.policy()


# Damage


@pytest.mark.parametrize("keep", [0, 1, 100, 700])
def test_a_truncated_manifest(folder, keep):
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BundleError, match=r"net.edgekit: manifest.json is damaged \(.*\); copy the whole bundle"):
        Bundle.open(folder)


@pytest.mark.parametrize(("change", "message"), [
    (lambda manifest: manifest.update(schema=SCHEMA + 1, plan="of the future"),
     f"bundle schema {SCHEMA + 1} is newer than this edgekit knows .*upgrade edgekit"),
    (lambda manifest: manifest.pop("plan"), "manifest.json is damaged .*missing required field `plan`"),
    (lambda manifest: manifest["plan"].update(steps=[]), "manifest.json is damaged .*the last step must be an exit"),
    (lambda manifest: manifest["preprocess"].update(std=[0]), "manifest.json is damaged .*must be positive"),
    (lambda manifest: manifest["artifacts"]["onnx"].pop("b"), "target 'onnx' has no artifact of stage 'b'"),
    (lambda manifest: manifest["files"].pop("stages/onnx/b.onnx"), "lists no digest for it"),
])  # fmt: skip
def test_a_manifest_that_cannot_be_used(folder, change, message):
    edit_manifest(folder, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


@pytest.mark.parametrize("name", [
    "/etc/passwd", "../secret", "stages/../../secret", "..\\secret", "C:secret", "", "nul\0byte",
])  # fmt: skip
def test_a_path_that_points_outside(folder, name):
    (folder.parent / "secret").write_text("secret")
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: entry(b"secret")}))
    with pytest.raises(BundleError, match="which is outside the bundle; do not use it"):
        Bundle.open(folder)


@pytest.mark.parametrize("target", ["../secret", "loop"])
def test_a_link_that_points_outside_or_at_itself(folder, target):
    (folder.parent / "secret").write_bytes(b"secret")
    (folder / "loop").symlink_to(target)
    edit_manifest(folder, lambda manifest: manifest["files"].update({"loop": entry(b"secret")}))
    with pytest.raises(BundleError, match=r"outside the bundle; do not use it|loop is missing"):
        Bundle.open(folder)


def test_a_missing_file(folder):
    (folder / "stages/onnx/b.onnx").unlink()
    with pytest.raises(BundleError, match=r"stages/onnx/b.onnx is missing; copy the whole bundle, or export again"):
        Bundle.open(folder)


def test_a_file_of_another_size(folder):
    (folder / "stages/onnx/b.onnx").write_bytes(b"stage b and more")
    with pytest.raises(BundleError, match=r"stages/onnx/b.onnx has 16 bytes instead of 7"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["stages/onnx/a.onnx", "stages/onnx/a.onnx.data"])
def test_one_changed_byte(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[0] ^= 1
    (folder / name).write_bytes(content)
    with Bundle.open(folder) as bundle:
        assert bundle.artifact("onnx", "b").exists()
        with pytest.raises(BundleError, match=f"{name} was changed after export"):
            bundle.artifact("onnx", "a")
        with pytest.raises(BundleError, match=f"{name} was changed after export"):
            bundle.verify()


def test_an_artifact_that_was_not_exported(folder):
    message = r"holds no 'litert' artifact of stage 'a' \(targets: onnx\); export again with targets=\('litert',\)"
    with Bundle.open(folder) as bundle, pytest.raises(BundleError, match=message):
        bundle.artifact("litert", "a")


@pytest.mark.parametrize(("content", "message"), [
    (None, "no such bundle"), (b"text", "neither a bundle folder nor a packed bundle"), (b"", "neither a bundle"),
])  # fmt: skip
def test_what_is_no_bundle(tmp_path, content, message):
    path = tmp_path / "net.edgekit"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=message):
        Bundle.open(path)
    with pytest.raises(BundleError, match=r"has no readable manifest.json .*is it a bundle\?"):
        Bundle.open(tmp_path)


def test_a_packed_bundle_that_points_outside(packed):
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("../evil", "evil")
    with pytest.raises(BundleError, match=r"holds '../evil', which is outside the bundle"):
        Bundle.open(packed)
    assert not (packed.parent.parent / "evil").exists()


def test_a_packed_bundle_cut_or_changed(packed):
    whole = packed.read_bytes()
    packed.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match="neither a bundle folder nor a packed bundle"):
        Bundle.open(packed)
    packed.write_bytes(whole.replace(b"stage b", b"stage c"))
    with pytest.raises(BundleError, match=r"cannot be unpacked \(Bad CRC-32"):
        Bundle.open(packed)


# Writing


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("old_packed", [None, False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), ValueError()])
def test_an_interrupted_export_leaves_what_was_there(tmp_path, packed, old_packed, error):
    path = tmp_path / "net.edgekit"
    if old_packed is not None:
        write(path, content=b"older a", packed=old_packed)
    before = listing(tmp_path)
    expected = BundleError if isinstance(error, OSError) else type(error)

    def export():
        with write_bundle(path, overwrite=True, packed=packed) as writer:
            fill(writer)
            raise error

    with pytest.raises(expected):
        export()
    assert listing(tmp_path) == before
    if old_packed is not None:
        with Bundle.open(path) as bundle:
            assert bundle.artifact("onnx", "a").read_bytes() == b"older a"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("old_packed", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_a_failing_last_rename_puts_the_older_bundle_back(tmp_path, monkeypatch, packed, old_packed, error):
    path = write(tmp_path / "net.edgekit", content=b"older a", packed=old_packed)
    before = listing(tmp_path)

    def broken(source, target):
        raise error

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises((BundleError, KeyboardInterrupt)):
        write(path, packed=packed, overwrite=True)
    monkeypatch.undo()
    assert listing(tmp_path) == before
    with Bundle.open(path) as bundle:
        assert bundle.artifact("onnx", "a").read_bytes() == b"older a"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("old_packed", [False, True])
def test_overwriting_replaces_whole(tmp_path, packed, old_packed):
    path = write(tmp_path / "net.edgekit", content=b"older a", packed=old_packed)
    write(path, content=b"newer a", packed=packed, overwrite=True)
    with Bundle.open(path) as bundle:
        assert bundle.artifact("onnx", "a").read_bytes() == b"newer a"
    assert os.listdir(tmp_path) == ["net.edgekit"]


def test_a_disk_that_fills_up_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BundleError, match=r"net.edgekit: cannot be written \(No space left on device\)"):
        write(tmp_path / "net.edgekit")
    assert listing(tmp_path) == []


def test_an_older_bundle_is_not_replaced_unasked(folder):
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="exists already; choose another name or allow overwriting"):
        write(folder)
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_bundle_is_not_overwritten(tmp_path, kind):
    path = tmp_path / "thesis"
    kept = path / "chapter.txt" if kind == "folder" else path
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("three years")
    with pytest.raises(BundleError, match="is not a bundle, so it is not overwritten"):
        write(path, overwrite=True)
    assert kept.read_text() == "three years"


def test_a_bundle_without_manifest_is_not_written(tmp_path):
    with pytest.raises(BundleError, match="needs a manifest"), write_bundle(tmp_path / "n.edgekit") as writer:
        writer.path("stages/x").write_bytes(b"x")
    assert listing(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"):
        write(tmp_path / "file" / "net.edgekit")


def test_a_moved_bundle_still_opens(folder, tmp_path):
    shutil.move(folder, tmp_path / "elsewhere")
    with Bundle.open(tmp_path / "elsewhere") as bundle:
        bundle.verify()
