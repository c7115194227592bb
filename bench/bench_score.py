"""pytest bench/bench_score.py"""

from .rivals import every, run


@every("score")
def test_score(benchmark, case, rival):
    run(benchmark, case, rival)
