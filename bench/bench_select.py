"""pytest bench/bench_select.py"""

from .rivals import every, run


@every("select")
def test_select(benchmark, case, rival):
    run(benchmark, case, rival)
