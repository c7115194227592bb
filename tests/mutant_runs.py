"""Where the mutants of tests/mutants.py run: scratch trees under build/mutants, and the tests that each file meets."""

import filecmp
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import sanitize, simt

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "mutants"
TORCH = Path(torch.__file__).parent
STEMS = ("score", "select", "gather", "cluster", "recover_attention", "recover_interpolation")
PYTHON_STEMS = (*STEMS, "recover_pose")
PATIENCE = 3  # times what the unchanged source takes, and a minute: a mutant that runs longer counts as killed
# File stem -> (test files, which of their tests): the shortest that know the file.
FUZZ = "tests/test_fuzz.py"
FLOATS = ("tests/test_linear_floats.py", "tests/test_linear_floats_used.py")
SCORING = (FUZZ, "tests/test_cluster.py", "tests/test_score.py")
BY_STEM = {
    **{stem: (FUZZ, f"tests/test_{stem}.py") for stem in STEMS},
    **dict.fromkeys((f"score_{part}" for part in ("state", "rows", "peaks", "matrix", "stored", "streamed")), SCORING),
    **dict.fromkeys(("score", "score_gaussian", "pack", "distance", "product", "quantise"), SCORING),
    **dict.fromkeys(("attention_score", "received"), (FUZZ, "tests/test_select.py")),
    "recover_attention": (FUZZ, "tests/test_recover_attention.py", "tests/test_dropin_head.py"),
    **dict.fromkeys(("recover_pose", "recover_tail"), ("tests/test_recover_attention.py", "tests/test_nn.py")),
    "recover_rotated": ("tests/test_recover_rotated.py",),
    "graph": ("tests/test_graph.py", "tests/test_graph_refuses.py"),
    **dict.fromkeys(("linear_floats", "linear_blocks", "gelu"), FLOATS),
    **dict.fromkeys(("add_norm", "layer_norm"), ("tests/test_add_norm.py", "tests/test_add_norm_refuses.py")),
}
EVERYTHING = tuple(dict.fromkeys(file for files in BY_STEM.values() for file in files))
TRITON = {
    "score": ("tests/test_triton_score.py", "tests/test_score.py"),
    "score_large": ("tests/test_triton_score.py",),
    "distance": ("tests/test_triton_score.py", "tests/test_score.py", "tests/test_cluster.py"),
    "gather": ("tests/test_triton_gather.py", "tests/test_gather.py"),
    "recover_tail": ("tests/test_recover_attention.py", "tests/test_triton.py"),
    "recover_pose": ("tests/test_triton_pairs.py", "tests/test_triton.py"),
    "recover_project": ("tests/test_triton_pairs.py", "tests/test_triton.py"),
    "pairs": ("tests/test_triton_pairs.py", "tests/test_triton.py"),
    "attention_scores": ("tests/test_select.py", "tests/test_triton.py"),
    "common": ("tests/test_triton.py", "tests/test_gather.py", "tests/test_select.py"),
    "repeated": ("tests/test_triton_repeated.py", "tests/test_triton.py"),
    "density": ("tests/test_triton_score.py", "tests/test_score.py"),
}


def versions() -> dict:
    compiler = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()
    return {"python": platform.python_version(), "torch": torch.__version__, "g++": compiler}


def copy_if_changed(source: str, target: str) -> None:
    """The time of the copy is its own, so that a build after a run that was cut off makes the mutant's object again."""
    if not (os.path.exists(target) and filecmp.cmp(source, target, shallow=False)):
        shutil.copyfile(source, target)


class Tree:
    """A copy of the project whose package is tested; by default with the libraries that are built."""

    name, memory = "python", 16 << 30
    chosen = (
        "not triton and not clip and not compile_fullgraph and not once and not export and not compiled and not planted"
    )

    def __init__(self):
        self.folder = BUILD / self.name
        self.seconds: dict[tuple[str, ...], float] = {}  # of tests that pass on the unchanged source
        for part in ("h2ot_kernels", "python_ref", "tests", "bench", "csrc"):
            options = {"dirs_exist_ok": True, "ignore": self.ignored, "copy_function": copy_if_changed}
            shutil.copytree(ROOT / part, self.folder / part, **options)
        for file in ("pyproject.toml", "CMakeLists.txt"):
            shutil.copy(ROOT / file, self.folder)

    ignored = staticmethod(shutil.ignore_patterns("__pycache__", "results"))

    @staticmethod
    def tests(file: str) -> tuple[str, ...]:
        return (*BY_STEM[Path(file).stem], "tests/test_bad_input.py", "tests/test_torch.py")

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        return kept | {"PYTHONPATH": str(self.folder)}

    def prepare(self, file: str) -> bool:
        """Whether the changed file could be built; Python: compiled."""
        try:
            compile((self.folder / file).read_text(), file, "exec")
        except SyntaxError:
            return False
        return True

    def assert_sound(self, file: str) -> None:
        """The tests of the file pass while nothing is changed."""
        if self.tests(file) in self.seconds:
            return
        began = time.monotonic()
        failed = self.run(file) if self.prepare(file) else "the build"
        if failed:
            sys.exit(f"mutants: the unchanged {self.name} tree fails: {failed}")
        self.seconds[self.tests(file)] = time.monotonic() - began

    def outcome(self, file: str, source: str) -> str | None:
        """The first test that fails with `source` as the file, "" if none does, None if it cannot be built."""
        path = self.folder / file
        kept = path.read_text()
        path.write_text(source)
        try:
            return self.run(file) if self.prepare(file) else None
        finally:
            path.write_text(kept)

    def run(self, file: str) -> str:
        command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider",
                   "--all"]  # fmt: skip
        environment = self.environment() | {"OMP_NUM_THREADS": "1"}
        seconds = 60 + PATIENCE * self.seconds[self.tests(file)] if self.tests(file) in self.seconds else None
        try:
            done = subprocess.run(
                [*command, "-k", self.chosen, *self.tests(file)],
                cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=seconds,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (self.memory, self.memory)),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"no end after {seconds:.0f} s"
        if done.returncode == 0:
            return ""
        if done.returncode in (4, 5):  # nothing was tested
            sys.exit(f"mutants: {self.tests(file)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        failed = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return failed[0] if failed else f"exit code {done.returncode}"


class CppTree(Tree):
    """The portable kernels alone under AddressSanitizer and UBSan, rebuilt object by object."""

    name = "cpp"
    # no_access_behind: tests/fence and the sanitizer each want to be malloc.
    chosen = "not avx and not triton and not reference and not 243x and not 351x and not large and not no_access_behind"
    memory = resource.RLIM_INFINITY  # the sanitizer reserves terabytes of addresses

    def environment(self) -> dict[str, str]:
        return sanitize.environment("address", self.folder)

    def __init__(self):
        super().__init__()
        self.build = self.folder / "build"
        package = self.folder / "h2ot_kernels"
        options = [f"-DTORCH_DIR={TORCH}", f"-DPython_EXECUTABLE={sys.executable}", "-DH2OT_CPU_SETS=portable",
                   "-DH2OT_KERNELS_SANITIZE=address", f"-DCMAKE_INSTALL_PREFIX={package}"]  # fmt: skip
        configure = ["cmake", "-S", self.folder, "-B", self.build, "-G", "Ninja", *options]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        if not self.prepare(""):
            sys.exit("mutants: the unchanged source does not build")

    ignored = staticmethod(shutil.ignore_patterns("__pycache__", "results", "*.so"))

    def prepare(self, file: str) -> bool:
        for step in ("--build", "--install"):
            done = subprocess.run(["cmake", step, self.build], capture_output=True, check=False)
            if done.returncode:
                return False
        return True

    @staticmethod
    def tests(file: str) -> tuple[str, ...]:
        return BY_STEM.get(Path(file).stem, EVERYTHING)


class TritonTree(Tree):
    name, chosen, memory = "triton", "triton or Triton", resource.RLIM_INFINITY  # tests/fence reserves a terabyte

    @staticmethod
    def tests(file: str) -> tuple[str, ...]:
        stem = Path(file).stem
        return (*TRITON.get(stem, (f"tests/test_{stem}.py", "tests/test_triton.py")), "tests/test_guard.py")


class CudaTree(Tree):
    """The CUDA source under the simulator and its sanitizers: a quick comparison with the oracle, then its tests."""

    name, memory = "cuda", resource.RLIM_INFINITY
    chosen = "not large and not caught and not sanitizer and not every_order"

    @staticmethod
    def tests(file: str) -> tuple[str, ...]:
        stem = Path(file).stem
        selects, labels = stem in ("select", "device", "warp"), stem.startswith("cluster") or stem == "score_launch"
        return (
            *(["tests/test_cuda_simt_select.py"] if selects else []),
            *(["tests/test_cuda_simt_cluster.py"] if labels else []),
            "tests/test_cuda_simt.py",
            "tests/test_cuda_simt_halves.py",
            "tests/test_cuda_simt_races.py",  # what nobody writes, and some read and use nothing of
        )

    def prepare(self, file: str) -> bool:
        for built in ("driver", "build/simt"):
            shutil.rmtree(self.folder / built, ignore_errors=True)
        try:
            self.driver = simt.build(simt.SANITIZED, self.folder / "csrc", self.folder / "driver")
        except RuntimeError:
            return False
        return True

    def run(self, file: str) -> str:
        from . import test_cuda_simt

        try:
            alive = test_cuda_simt.survives(self.driver)
        except subprocess.TimeoutExpired:
            return "no end"
        return super().run(file) if alive else "tests/test_cuda_simt.py::survives"


TREES = {"cpp": CppTree, "cuda": CudaTree, "triton": TritonTree, "python": Tree}
