"""pytest bench/bench_gather.py"""

from .rivals import every, run


@every("gather")
def test_gather(benchmark, case, rival):
    run(benchmark, case, rival)
