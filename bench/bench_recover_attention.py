"""pytest bench/bench_recover_attention.py"""

from .rivals import every, run


@every("recover_attention")
def test_recover_attention(benchmark, case, rival):
    run(benchmark, case, rival)
