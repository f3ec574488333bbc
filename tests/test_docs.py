"""What the documentation says is so: its links lead somewhere, its Python runs, its example runtime agrees."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import edgekit

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "docs/examples/reference_runtime.py"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))

LINK = re.compile(r"""\]\(([^)\s]+)\)|(?:src|href)="([^"]+)\"""")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of a page in one language, in order."""
    return [body for found, body in FENCE.findall((ROOT / page).read_text()) if found == language]


def anchors(page: Path) -> set[str]:
    """Headings of a page, as code hosts name them in links."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", (ROOT / page).read_text())
    links = [first or second for first, second in LINK.findall(text)]
    assert links, "a page without a link is a dead end"
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.is_relative_to(ROOT), f"{page}: {link} leads out of the project"
        assert target.exists(), f"{page}: {link} does not exist"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link} has no such heading"


def test_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch", reason="exporting needs the export extra")
    pytest.importorskip("sklearn", reason="the digits need the demo extra")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    model, use, _ = blocks("README.md", "python")
    assert model.startswith("# my_net.py\n")
    Path("my_net.py").write_text(model)
    Path("first_use.py").write_text(use)
    try:
        namespace = runpy.run_path("first_use.py")
    finally:
        sys.modules.pop("my_net", None)
    assert edgekit.Profile.load("profile.json").samples == len(namespace["test"])
    result = namespace["result"]
    assert len(set(result.exit.tolist())) == 2, "the example should show samples leaving at both exits"
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert str(result.executed) in printed[0]


@pytest.mark.slow
def test_attached_exits_of_the_readme_answer(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch", reason="exporting needs the export extra")
    pytest.importorskip("sklearn", reason="the digits need the demo extra")
    monkeypatch.chdir(tmp_path)
    _, _, attach = blocks("README.md", "python")
    assert attach.startswith("# attach.py\n")
    Path("attach.py").write_text(attach)
    runpy.run_path("attach.py")
    accuracies = [float(line.removesuffix("%")) for line in capsys.readouterr().out.splitlines()]
    assert len(accuracies) == 3
    assert min(accuracies) >= 70
    assert accuracies[2] >= 90


def test_verbs_of_the_readme_are_those_of_the_command_line():
    typer = pytest.importorskip("typer")
    from edgekit.cli.app import app

    shown = set(re.findall(r"^\| `edgekit (\w+)`", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert shown == set(typer.main.get_command(app).commands)


def test_every_shell_line_of_the_readme_has_options_that_exist():
    typer = pytest.importorskip("typer")
    from edgekit.cli.app import app

    lines = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
    assert len(lines) == 5
    for line in lines:
        program, verb, *arguments = line.split()
        assert program == "edgekit"
        command = typer.main.get_command(app).commands[verb]
        command.make_context(verb, arguments)  # parses, and runs nothing


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """The example as an installed distribution whose entry point names it."""
    pytest.importorskip("onnx", reason="the reference evaluator is part of onnx")
    place = tmp_path / "installed"
    metadata = place / "reference_runtime-1.0.dist-info"
    metadata.mkdir(parents=True)
    shutil.copy(EXAMPLE, place)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: reference-runtime\nVersion: 1.0\n")
    (declared,) = (block for block in blocks("docs/adding-a-runtime.md", "toml") if "edgekit.runtimes" in block)
    line = next(line for line in declared.splitlines() if line.startswith("reference ="))
    (metadata / "entry_points.txt").write_text("[edgekit.runtimes]\n" + line.replace('"', "") + "\n")
    monkeypatch.syspath_prepend(place)
    yield
    sys.modules.pop("reference_runtime", None)


@pytest.fixture
def images():
    rng = np.random.default_rng(7)
    return rng.standard_normal((12, 1, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("score", ["max_prob", "margin", "neg_entropy"])
def test_reference_runtime_answers_as_onnxruntime(registered, exported_digits, images, score):
    with edgekit.load(exported_digits) as fast, edgekit.load(exported_digits, runtime="reference") as plain:
        for session in (fast, plain):
            session.use(edgekit.Policy.never(3, score=score))
        scores = [np.sort(fast.run(images, exit=index).score) for index in range(2)]
        middle = [float((ordered[5] + ordered[6]) / 2) for ordered in scores]
        for session in (fast, plain):
            session.use(edgekit.Policy.fixed(middle, score=score))
        expected, given = fast.run(images), plain.run(images)
        assert len(set(expected.exit.tolist())) > 1, "rows should leave at several exits"
        np.testing.assert_array_equal(given.exit, expected.exit)
        np.testing.assert_allclose(given.logits, expected.logits, rtol=0, atol=1e-5)
        np.testing.assert_allclose(given.score, expected.score, rtol=0, atol=1e-5)
        assert given.executed == expected.executed


def test_reference_runtime_gives_every_exit_and_skips_heads(registered, exported_digits, images):
    with edgekit.load(exported_digits) as fast, edgekit.load(exported_digits, runtime="reference") as plain:
        for given, expected in zip(plain.run_exits(images), fast.run_exits(images), strict=True):
            np.testing.assert_allclose(given, expected, rtol=0, atol=1e-5)
        # Exits that are never taken: the trunks alone run before the last stage.
        np.testing.assert_allclose(plain.run(images).logits, fast.run(images).logits, rtol=0, atol=1e-5)
        assert plain.runtime.describe()["name"] == "reference"


def test_reference_runtime_refuses_what_it_cannot_do(registered, digits_bundle):
    from reference_runtime import ReferenceRuntime

    from edgekit.errors import BundleError, PluginError

    with pytest.raises(PluginError, match="leave threads at 1"):
        edgekit.load(digits_bundle, runtime="reference", threads=2)
    with edgekit.Bundle.open(digits_bundle) as bundle:
        first, second, *_ = bundle.plan.stages
        artifact = bundle.artifact("onnx", second.name)
        with pytest.raises(BundleError, match=f"inputs are not those of stage '{first.name}'"):
            ReferenceRuntime().open(first, artifact)
        artifact.write_bytes(b"not a graph")
        with pytest.raises(BundleError, match=f"stage '{second.name}' is no ONNX graph"):
            ReferenceRuntime().open(second, artifact)
