"""The wheel gate: `python -m tests.wheel_gate` builds the wheel, installs it into a clean environment, uses it there.

The sources are copied first, so that nothing built or left over in the working tree can get into the wheel, and the
wheel is made of the source distribution of that copy (MANIFEST.in), which so holds all that a build needs. The clean
environment sees this one's packages (torch is not downloaded again), but not the project: neither its directory nor an
editable installation of it, and everything runs from another directory.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("h2ot_kernels", "python_ref", "csrc", "CMakeLists.txt", "MANIFEST.in", "setup.py", "pyproject.toml",
           "README.md", "LICENSE")  # fmt: skip
SDIST = "import sys, setuptools.build_meta as build; build.build_sdist(sys.argv[1])"
LEFT_OUT = shutil.ignore_patterns("*.so", "__pycache__")
USE = """
import sys
from pathlib import Path

import torch

import h2ot_kernels as h2ot
import python_ref

for package in (h2ot, python_ref):
    assert Path(package.__file__).is_relative_to(sys.prefix), package.__file__
x = torch.randn(2, 27, 17, 32)
assert torch.equal(h2ot.prune_cluster(x, 9), h2ot.prune_cluster(x, 9, backend="reference"))
model = h2ot.hosts.build("h2ot_mixste", num_frames=27, channels=32, depth=4, stages={1: 13, 2: 9}).eval()
with torch.inference_mode():
    assert model(torch.randn(1, 27, 17, 2)).shape == (1, 27, 17, 3)
print(h2ot.explain("prune_cluster", x).splitlines()[0])
"""
LIBRARIES = {"h2ot_kernels/libh2ot_kernels_cpu.so"} | (
    {"h2ot_kernels/libh2ot_kernels_cuda.so"} if shutil.which("nvcc") else set()
)
# One architecture, as machine code and for newer ones: tests/cuda_gate.py compiles the kernels for all.
CUDA = {"H2OT_KERNELS_CUDA": "1", "H2OT_KERNELS_CUDA_ARCHITECTURES": "80"} if shutil.which("nvcc") else {}


def build(folder: Path) -> Path:
    """The wheel of the source distribution of a copy of the sources, all in folder."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=LEFT_OUT)
        else:
            shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-c", SDIST, folder], cwd=source, stdout=subprocess.DEVNULL, check=True)
    (sdist,) = folder.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, sdist]
    subprocess.run(command, check=True, env=os.environ | CUDA)
    (wheel,) = folder.glob("*.whl")
    return wheel


def faults(wheel: Path) -> list[str]:
    """What is in the wheel and should not be, or the other way round."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        str(path.relative_to(ROOT))
        for package in ("h2ot_kernels", "python_ref")
        for path in (ROOT / package).rglob("*.py")
    }
    built = {name for name in packed if name.endswith(".so")}
    found = [f"missing: {name}" for name in wanted - packed]
    found += [f"should not be there: {name}" for name in packed - wanted - built]
    return found + [f"missing: {name}" for name in LIBRARIES - built]


def use(wheel: Path, folder: Path) -> None:
    """Install into a clean environment and run the installed package from another directory."""
    environment, elsewhere = folder / "venv", folder / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    purelib = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)}))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    # A plain path: .pth files inside it, those of editable installations, are not read.
    (purelib / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for arguments in (["-c", USE], ["-m", "h2ot_kernels", "explain", "gather_tokens"], ["-m", "h2ot_kernels", "env"]):
        command = [python, "-P", *arguments]
        done = subprocess.run(command, cwd=elsewhere, env={}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"wheel gate: {arguments[:3]} failed\n{done.stdout}{done.stderr}")
    print(f"wheel gate: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB: installed and used from another directory")


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        found = faults(wheel)
        for fault in found:
            print(f"wheel gate: {fault}")
        if not found:
            use(wheel, folder)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
