"""pytest bench/bench_cluster.py"""

from .rivals import every, run


@every("cluster")
def test_cluster(benchmark, case, rival):
    run(benchmark, case, rival)
