"""`./dev tidy`: clang-tidy over csrc, each kernel file as it is compiled for AVX-512 and for any CPU.

Exit code 1: findings. A planted finding (a division of integers that is used as a float) must be seen first.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent
COMMON = ["-std=gnu++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", "-Wno-everything",
          "-isystem", str(TORCH / "include")]  # fmt: skip
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-DH2OT_ISA=avx512"]
PLANTED = "double half(int n) { return n / 2; }\n"


def findings(source: Path, flags: list[str]) -> list[str]:
    """What clang-tidy says about one file."""
    command = ["clang-tidy", "--quiet", f"--config-file={ROOT / '.clang-tidy'}", source, "--", *COMMON, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if ": error: " in line or ": warning: " in line]
    if done.returncode and not found:
        sys.exit(f"tidy: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return found


def main() -> int:
    planted = ROOT / "build" / "planted.cpp"
    planted.parent.mkdir(exist_ok=True)
    planted.write_text(PLANTED)
    if not any("bugprone-integer-division" in line for line in findings(planted, [])):
        sys.exit("tidy: the planted finding was not seen")
    kernels = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    jobs = [(file, flags) for file in kernels for flags in (AVX512, ["-DH2OT_ISA=portable"])]
    amx = [*AVX512, "-UH2OT_ISA", "-DH2OT_ISA=amx", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"]
    halves = ("attention", "rotated_halves", "linear_halves")
    tiles = ("attention_score", "linear_tiles", "rotated_tiles", "score_tiles")
    jobs += [(ROOT / "csrc" / "amx" / f"{stem}.cpp", amx) for stem in halves + tiles]
    dots = [*AVX512, "-UH2OT_ISA", "-DH2OT_ISA=bf16_dots", "-mavx512bf16"]
    jobs += [(ROOT / "csrc" / "amx" / f"{stem}.cpp", dots) for stem in halves]
    others = [
        *(ROOT / "csrc").glob("*registration.cpp"),
        ROOT / "csrc" / "capability.cpp",
        ROOT / "csrc" / "cuda" / "plan.cpp",
    ]
    others.remove(ROOT / "csrc" / "cuda_registration.cpp")  # wants the headers of CUDA
    all_sets = [f"-DH2OT_{name}" for name in ("HAS_AVX2", "HAS_AVX512", "AMX", "BF16_DOTS")]
    jobs += [(file, all_sets) for file in sorted(others)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = sorted({line for lines in pool.map(lambda job: findings(*job), jobs) for line in lines})
    print(*found, sep="\n", end="\n" if found else "")
    files = len({file for file, _ in jobs})
    print(f"tidy: {len(jobs)} compilations of {files} files, {len(found)} findings, the planted one seen")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
