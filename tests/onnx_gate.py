"""`./dev onnx`: every host exported at a reduced size, and its graph held to PyTorch's poses by onnxruntime.

While nothing has changed since all of them were right (unchanged.py), a share of them, drawn by --seed; --all: the
others, too. Exit code 1: a graph is wrong. A JSON line with their number is last.
"""

import argparse
import json
import random
import sys

from bench import bench_onnx, hosts

from . import sample, unchanged


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev onnx", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every host, whatever was proven before")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of those that run of the proven")
    given = parser.parse_args()
    names = list(hosts.LIFTING)
    if not given.all and unchanged.is_unchanged(unchanged.ONNX):
        others = sample.thinned({name: [name] for name in names}, given.seed)
        names = [name for name in names if name not in others]
        print(f"onnx: nothing has changed since every host was right; one in {sample.UNCHANGED} (--seed {given.seed})")
    code = bench_onnx.main(["--check", "--hosts", *names])
    print(json.dumps({"hosts": len(names)}))
    return code


if __name__ == "__main__":
    sys.exit(main())
