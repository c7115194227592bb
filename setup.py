"""Drives CMake (the one build description is CMakeLists.txt). Metadata stands in pyproject.toml.

H2OT_KERNELS_CUDA=1 also builds the CUDA library: it needs nvcc, not a GPU. H2OT_KERNELS_CUDA_ARCHITECTURES: for which
devices, as CMake writes them ("90", "80-real;90"); without it for all that CMakeLists.txt lists.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def wants_cuda() -> bool:
    given = os.environ.get("H2OT_KERNELS_CUDA") or "0"
    if given not in ("0", "1"):
        raise SystemExit(f"H2OT_KERNELS_CUDA: got {given!r}, wanted 0 or 1")
    return given == "1"


def compiler() -> str:
    """What tells builds by $CXX apart: CMake asks for it once for each folder."""
    return "".join(f"-{Path(part).name}" for part in os.environ.get("CXX", "").split())


class CMakeBuild(build_ext):
    def run(self):
        cuda = wants_cuda()
        import torch

        package = Path(self.get_ext_fullpath("h2ot_kernels._C")).resolve().parent
        if not cuda:  # that of an earlier build would be loaded, or packed, beside what it was not built with
            (package / "libh2ot_kernels_cuda.so").unlink(missing_ok=True)
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}{compiler()}"
        options = {
            "TORCH_DIR": Path(torch.__file__).parent,
            "Python_EXECUTABLE": sys.executable,
            "H2OT_VERSION": self.distribution.get_version(),
            "H2OT_CUDA": "ON" if cuda else "OFF",
            "CMAKE_INSTALL_PREFIX": package,
        }
        configure = ["-U", "H2OT_CUDA_ARCHITECTURES"]  # what an earlier build was given
        if architectures := os.environ.get("H2OT_KERNELS_CUDA_ARCHITECTURES"):
            options["H2OT_CUDA_ARCHITECTURES"] = architectures
        configure += [f"-D{name}={value}" for name, value in options.items()]
        # cmake and ninja of this Python's environment come first, whether it is activated or not.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        cmake = shutil.which("cmake", path=path) or "cmake"
        for command in (["-S", ROOT, "-B", build, "-G", "Ninja", *configure], ["--build", build], ["--install", build]):
            if subprocess.run([cmake, *command], env=os.environ | {"PATH": path}, check=False).returncode:
                raise SystemExit("cmake failed; what it said stands above")

    def get_outputs(self):
        return list(self.get_output_mapping()) if self.inplace else self._libraries()

    def get_output_mapping(self):
        """Where a wheel would have what is built in place: a strict editable install links what stands here."""
        package = Path(self.build_lib) / "h2ot_kernels"
        return {str(package / Path(path).name): path for path in self._libraries()} if self.inplace else {}

    def _libraries(self) -> list[str]:
        package = Path(self.get_ext_fullpath("h2ot_kernels._C")).parent
        return [str(path) for path in package.glob("*.so")]


setup(ext_modules=[Extension("h2ot_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
