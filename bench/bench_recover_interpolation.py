"""pytest bench/bench_recover_interpolation.py"""

from .rivals import every, run


@every("recover_interpolation")
def test_recover_interpolation(benchmark, case, rival):
    run(benchmark, case, rival)
