"""What the compile-only gate takes from another architecture: which rows, and that a difference is a failure."""

from dataclasses import replace

from .aot_rows import ARCHITECTURES, LIKE, SHARE, Row, compared, not_assembled

ALL = list(ARCHITECTURES)
ROWS = [Row("kernel", "float32", arch, registers=40, shared=1024) for arch in ALL]


def test_one_in_six_is_assembled_and_the_seed_says_which():
    taken = not_assembled(300, ALL, seed=5)
    assert taken == not_assembled(300, ALL, seed=5) != not_assembled(300, ALL, seed=6)
    assert sum(map(len, taken)) == len(LIKE) * 300 * (SHARE - 1) // SHARE
    assert set().union(*taken) == set(LIKE)


def test_every_kernel_is_assembled_where_no_other_architecture_stands_for_it():
    assert not any(not_assembled(300, [87, 89, 90], seed=5))
    assert not_assembled(1, [80, 86, 87], seed=5) == [set()]


def test_rows_that_must_agree_and_do_not_fail():
    assert compared(ROWS) == ROWS
    for arch in LIKE:
        for change in ({"registers": 41}, {"shared": 2048}, {"spills": 8}):
            rows = [replace(row, **change) if row.arch == arch else row for row in ROWS]
            assert [row.arch for row in compared(rows) if row.error] == [arch]


def test_a_row_that_was_not_assembled_claims_no_numbers():
    row = Row("kernel", "float32", 87, taken_from=86)
    assert "as sm_86, not assembled" in str(row)
    assert "regs" not in str(row)
    assert compared([*ROWS[:2], row])[2] == row
