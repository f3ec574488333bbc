"""What several rooms' tests share: a small bundle of the digits network, exported once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def exported_digits(tmp_path_factory) -> Path:
    """The digits network as a bundle. Read only: take ``digits_bundle`` to change one."""
    pytest.importorskip("torch", reason="exporting needs the export extra")
    import edgekit
    from edgekit.zoo.registry import find, load

    network = find("msdnet-digits")
    path = tmp_path_factory.mktemp("exported") / "digits.edgekit"
    edgekit.export(
        load(network.name),
        (network.example(),),
        path,
        name=network.name,
        preprocess=network.preprocess,
        classes=network.classes,
    ).close()
    return path


@pytest.fixture
def digits_bundle(exported_digits, tmp_path) -> Path:
    """A copy of the digits bundle that a test may change."""
    return Path(shutil.copytree(exported_digits, tmp_path / "digits.edgekit"))
