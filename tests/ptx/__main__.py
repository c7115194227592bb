"""`./dev ptx`: the tests of the Triton kernels on their PTX, run on the CPU.

python -m tests.ptx [--arch 90] [--seed N | --all] [arguments of pytest]
"""

import argparse
import os
import random
import subprocess
import sys

from ..unchanged import TRITON, tests_of


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev ptx", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability; no tcgen05, so not 100")
    parser.add_argument(
        "--all", action="store_true", help="every case, large ones of every kind, too (tests/sample.py)"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the cases drawn, without --all")
    given, others = parser.parse_known_args()
    seed = "all" if given.all else str(given.seed)
    parallel = ["-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]
    whole = ["--all"] if given.all else []
    tests = ["-k", "triton or Triton or any_valid_input or barrier", *tests_of(TRITON)]
    command = [sys.executable, "-m", "pytest", *tests, *whole, *(others or parallel)]
    # On the CPU where there is a GPU, too.
    chosen = {"H2OT_KERNELS_PTX": str(given.arch), "CUDA_VISIBLE_DEVICES": "", "H2OT_KERNELS_SEED": seed}
    return subprocess.run(command, env=os.environ | chosen, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
