"""An object is compiled once for one source and its flags, wherever the source lies."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
LAUNCHER = Path(__file__).with_name("object_cache.py")


def compiled(folder: Path, *flags: str, text: str = "int value() { return VALUE; }\n") -> bytes:
    """The object that the launcher makes of a source in `folder`/sources, in a folder of its own."""
    source = folder / "sources" / "value.cpp"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(f'#include "value.h"\n{text}')
    source.with_name("value.h").write_text("#define VALUE (1 + GIVEN)\n")
    made, needs = folder / "value.o", folder / "value.d"
    command = ["g++", f"-I{source.parent}", *flags, "-MD", "-MT", made, "-MF", needs, "-o", made, "-c", source]
    environment = os.environ | {"H2OT_OBJECTS": str(folder.parent / "objects")}
    subprocess.run([sys.executable, LAUNCHER, *command], check=True, env=environment)
    assert "value.h" in needs.read_text()
    return made.read_bytes()


def test_what_decides_an_object(tmp_path):
    first = compiled(tmp_path / "one", "-O1", "-DGIVEN=2")
    (kept,) = (tmp_path / "objects").iterdir()
    kept.write_bytes(b"what was kept")
    assert compiled(tmp_path / "two", "-O1", "-DGIVEN=2", "-DOTHER") == b"what was kept"
    assert compiled(tmp_path / "one", "-O1", "-DGIVEN=3") != first  # by the source
    others = {compiled(tmp_path / "two", flag, "-DGIVEN=2") for flag in ("-O2", "-O0")}  # by its flags
    others.add(compiled(tmp_path / "two", "-O1", "-DGIVEN=2", text="int value() { return -VALUE; }\n"))
    assert b"what was kept" not in others
    assert b"what was kept" != compiled(tmp_path / "one", "-O1", "-g", "-DGIVEN=2") != first


def test_an_error_is_the_compilers(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        compiled(tmp_path / "one", "-DGIVEN=2", text="int value() { return }\n")
    assert not (tmp_path / "objects").exists()
