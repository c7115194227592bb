"""The host side of the CUDA kernels: choice of search and tiles, grids, workspace. No GPU needed."""

import itertools
import math

import pytest

from h2ot_kernels import _C, backend

from . import every_plan

H200 = {"major": 9, "minor": 0, "multiprocessors": 132}
ORIN = {"major": 8, "minor": 7, "multiprocessors": 16}
ALIGNMENT = 256  # of the parts of the workspace
GUARD = 256  # bytes after each that nothing touches
LIMIT = 256 << 20


def plan(B=4, N=243, J=1, C=512, k=2, dtype="float32", **rest):
    return _C.plan_score(B, N, J, C, k, dtype, **rest)


def plan_assign(B=4, N=243, J=1, C=512, centres=81, dtype="float32", **rest):
    return _C.plan_assign(B, N, J, C, centres, dtype, **rest)


def label_sizes(made, N, wide):
    """Of what labels need."""
    lists = made["samples"] * N * made["label_splits"]
    return {
        "centre_low": lists * 32 * wide,
        "centre_at": lists * 32 * 4,
        "centre_reach": lists * wide,
        "centre_count": lists * 4,
    }


def sizes(made, N, k, wide):
    """Bytes that each part must have, written out from its shape alone."""
    tokens, list_ = made["samples"] * N, max(made["list"], 4)
    lists = tokens * made["splits"] * list_
    return {
        "rows": tokens * made["pitch"] * wide,
        "valid": tokens,
        "exponent": made["samples"] * math.ceil(N / 8) * 4,
        "operands": tokens * made["line_pitch"] * 2,
        "scale": tokens * 4 if made["distance"] == "products" else made["samples"] * 8,
        "norm": tokens * wide,
        "matrix": tokens * made["matrix_pitch"] * wide,
        "listed": lists * wide,
        "listed_at": lists * 4,
        "furthest": tokens * made["splits"] * wide,
        "nearest": tokens * made["near"] * 8,
        "nearest_at": tokens * made["near"] * 4,
        "proven": tokens * 4,
        "peaks": tokens * 4,
        "peak_count": made["samples"] * 4,
        "largest": made["samples"] * 16,
        "parent": tokens * 4,
        "arrived": made["samples"] * 4,
        "flag": tokens,
        **{name: tokens * 8 for name in ("m", "key", "squared", "keys")},
        **label_sizes(made, N, wide),
    }


def assert_apart(made, needed):
    """Parts are aligned, as long as they must be, and do not overlap."""
    places = sorted(made["offsets"].items(), key=lambda item: (item[1], needed[item[0]]))
    for (name, offset), (_, after) in zip(places, [*places[1:], ("end", made["workspace"])], strict=True):
        assert offset % ALIGNMENT == 0
        assert offset + needed[name] + GUARD <= after, name


SHAPES = [
    {"B": B, "N": N, "C": C, "k": k, "dtype": dtype, "J": J}
    for (B, N, C, k, J), dtype in itertools.product(
        [(1, 1, 1, 1, 1), (4, 243, 512, 2, 17), (256, 351, 1536, 2, 1), (3, 2048, 7, 40, 1), (1, 2049, 64, 5, 1),
         (2, 16384, 512, 2, 1), (1, 1_000_000, 64, 30, 1), (70_000, 27, 16, 2, 1)],
        ["float32", "float64", "bfloat16", "float16"],
    )
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
def test_parts_of_the_workspace_fit_and_do_not_overlap(shape):
    made = plan(**shape)
    wide = 8 if shape["dtype"] == "float64" else 4
    needed = sizes(made, shape["N"], shape["k"], wide)
    assert_apart(made, needed)
    assert {"valid", "m", "key", "squared", "parent", "arrived", "keys"} <= set(made["offsets"])
    assert ("matrix" in made["offsets"]) == (made["search"] == "stored")
    for part in ("listed", "proven", "peaks", "flag"):
        assert (part in made["offsets"]) == (made["search"] == "streamed")
    assert ("norm" in made["offsets"]) == (made["distance"] != "direct")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("share", [1, 4, 0])
def test_labels_have_their_parts_and_fit_a_grid(shape, share):
    """By a share of the tokens, 0: by none."""
    wide, N = 8 if shape["dtype"] == "float64" else 4, shape["N"]
    centres = -(-N // share) if share else 0
    given = {name: value for name, value in shape.items() if name != "k"}
    scored, alone = plan(**shape, centres=centres), plan_assign(**given, centres=centres)
    listed = {"centre_low", "centre_at", "centre_reach", "centre_count"}
    assert (listed <= set(scored["offsets"])) == (scored["search"] == "streamed" and centres > 0)
    tokens = {"rows", "valid", "exponent", "operands", "scale", "norm", "largest", "arrived"}
    assert listed <= set(alone["offsets"]) <= listed | tokens
    for made in (scored, alone):
        assert_apart(made, sizes(made, N, shape["k"], wide))
        assert made["workspace"] <= LIMIT or made["samples"] == 1
        rows, columns = made["label_tile"]
        if made["label_splits"]:
            assert 1 <= made["label_splits"] <= max(1, math.ceil(centres / columns))
            assert math.ceil(N / rows) * made["label_splits"] < 2**31
    assert ("norm" in alone["offsets"]) == (alone["distance"] != "direct")
    # The memory of labels does not grow with the centres.
    assert alone["workspace"] <= alone["samples"] * N * (8 * 400 + 12 * shape["C"]) + (64 << 10)


def test_the_counted_choice_of_labels():
    assert plan_assign()["distance"] == "direct"
    assert plan_assign()["label_tile"] == (16, 32)
    assert plan_assign(B=64, N=256, centres=128, dtype="float64")["label_tile"] == (32, 64)
    assert plan_assign(B=4, N=576, C=768, centres=288)["distance"] == "products"
    assert plan_assign(B=4, N=576, C=768, centres=288)["label_tile"] == (64, 64)
    assert plan_assign(B=4, N=576, C=768, centres=288)["label_splits"] == 5
    assert plan_assign(B=1, N=8192, C=256, centres=2048)["label_tile"] == (128, 128)
    assert plan_assign(B=64, N=8192, C=256, centres=2048)["label_splits"] == 1
    assert plan_assign(B=64, dtype="bfloat16")["distance"] == "exact_products"
    assert plan(N=2048, centres=500)["label_splits"] == 0  # from the stored matrix
    assert plan(B=1, N=8192, C=256, k=5, centres=2048)["label_tile"] == (128, 128)
    assert plan(B=1, N=8192, C=256, k=5, dtype="float64", centres=2048)["label_tile"] == (32, 64)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
def test_launches_fit_a_grid(shape):
    made = plan(**shape)
    rows, columns = made["tile"]
    blocks = made["tiles"] if made["search"] == "stored" else math.ceil(shape["N"] / rows) * made["splits"]
    assert 1 <= blocks < 2**31
    assert 1 <= made["samples"] <= min(shape["B"], 65535)
    assert made["workspace"] <= LIMIT or made["samples"] == 1
    assert columns % rows == 0


@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("columns", [1, 2, 3, 17, 40])
def test_tiles_cover_the_upper_triangle_once(columns, ratio):
    count = ratio * columns * (columns + 1) // 2
    tiles = [_C.plan_tile(number, ratio) for number in range(count)]
    assert len(set(tiles)) == count
    assert set(tiles) == {(row, column) for column in range(columns) for row in range(ratio * (column + 1))}


@pytest.mark.parametrize("N", [1, 31, 32, 33, 64, 65, 96, 97, 243, 2048])
def test_the_last_tile_is_that_of_the_last_token(N):
    for dtype, B in (("float32", 1), ("bfloat16", 4096)):
        made = plan(B=B, N=N, k=1, dtype=dtype)
        rows, columns = made["tile"]
        row, column = _C.plan_tile(made["tiles"] - 1, columns // rows)
        assert (row, column) == ((N - 1) // rows, (N - 1) // columns)
        assert made["matrix_pitch"] == (column + 1) * columns


def test_tile_numbers_beyond_2_to_the_31():
    columns = 1 << 22
    number = 2 * (columns * (columns + 1) // 2)
    assert number > 2**42
    assert _C.plan_tile(number - 1, 2) == (2 * columns - 1, columns - 1)
    assert _C.plan_tile(number, 2) == (0, columns)


def test_workspace_beyond_2_to_the_31():
    made = plan(B=1, N=1 << 22, C=512, k=20)
    assert made["search"] == "streamed"
    assert made["workspace"] > 2**33
    assert max(made["offsets"].values()) > 2**32


def test_memory_is_linear_in_the_tokens_when_streamed():
    one, two = (plan(B=1, N=N, C=64, in_place=True)["workspace"] for N in (100_000, 200_000))
    assert two < 2.05 * one


def test_the_counted_choice():
    assert plan(B=4, N=243)["distance"] == "direct"
    assert plan(B=4, N=243)["tile"] == (16, 32)
    assert plan(B=256, N=351, C=1536)["distance"] == "products"
    assert plan(B=256, N=351, C=1536)["tile"] == (128, 128)
    assert plan(B=1, N=243)["distance"] == plan(B=16, N=243, C=256)["distance"] == "direct"
    assert plan(B=1, N=1024, C=512)["tile"] == (64, 64)
    assert plan(B=256, N=351, C=1536, **ORIN)["distance"] == "direct"
    assert plan(B=256, dtype="bfloat16")["distance"] == "exact_products"
    assert plan(B=256, dtype="bfloat16", J=17)["distance"] == "products"
    assert plan(B=256, dtype="float64")["distance"] == "direct"
    assert plan(N=2048)["search"] == "stored"
    assert plan(N=2049)["search"] == "streamed"
    assert plan(B=1, N=2049, **H200)["splits"] > 1
    assert plan(B=64, N=16384)["splits"] == 1
    assert plan(N=2049, k=100)["list"] == 0
    with pytest.raises(ValueError, match="dtype: got 'int8'"):
        plan(dtype="int8")


def busiest(B, N, rows, columns, multiprocessors) -> int:
    """Pairs of the busiest multiprocessor where tiles of the upper triangle are dealt out."""
    starts = ((row, column) for row in range(0, N, rows) for column in range(0, N, columns))
    tiles = B * sum(row < column + columns for row, column in starts)
    return math.ceil(tiles / multiprocessors) * rows * columns


@pytest.mark.parametrize("device", [H200, ORIN], ids=["h200", "orin"])
def test_small_tiles_are_for_few_tiles(device):
    """Small ones read twice as much: they are taken where they save an eighth and more of the arithmetic."""
    chosen = set()
    for B, N in itertools.product((1, 2, 4, 7, 16, 64, 256), (1, 16, 17, 27, 81, 100, 243, 351, 2048)):
        small, large = (busiest(B, N, *tile, device["multiprocessors"]) for tile in ((16, 32), (32, 64)))
        made = plan(B=B, N=N, dtype="float64", **device)
        assert made["tile"] == ((16, 32) if 8 * small < 7 * large else (32, 64)), (B, N)
        chosen.add(made["tile"])
    assert chosen == {(16, 32), (32, 64)}
    assert plan(B=1, N=2049, dtype="float64", **device)["tile"] == (32, 64)  # streamed


def test_blocks_of_a_call_overlap_from_9_0_on():
    for major, minor in ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)):
        assert plan(major=major, minor=minor)["overlaps"] == (major >= 9)


def test_blocks_of_older_code_do_not_overlap():
    """Which has no instruction to wait: PTX of 8.0, compiled by the driver for a newer device."""
    for code, waits in ((80, False), (89, False), (90, True), (100, True)):
        assert plan(major=10, minor=0, code=code)["overlaps"] == waits


def test_two_warps_pool_a_token_of_many_channels():
    assert [plan(C=C)["pool_warps"] for C in (1, 255, 256, 5120)] == [1, 1, 2, 2]


def test_tokens_read_in_place_are_not_copied():
    assert "rows" not in plan(in_place=True)["offsets"]
    assert plan(C=5)["pitch"] == 8
    whole = {"B": 256, "N": 351, "C": 1536, "in_place": True}
    for dtype in ("bfloat16", "float16"):
        for made in (plan(**whole, dtype=dtype), plan_assign(**whole, dtype=dtype), plan(**{**whole, "N": 4096})):
            assert "rows" not in made["offsets"]
        assert "operands" not in plan(**whole, dtype=dtype)["offsets"]
        assert "operands" not in plan_assign(**whole, dtype=dtype)["offsets"]
        assert plan(**{**whole, "C": 1000, "in_place": False}, dtype=dtype)["line_pitch"] == 1024
        assert plan(B=1, N=27, C=64, in_place=True, dtype=dtype)["distance"] == "direct"
        assert plan(B=1, N=27, C=64, in_place=True, dtype=dtype)["pitch"] == 64  # differences are of float32
    assert plan(**whole)["line_pitch"] == 2 * 1536


@pytest.mark.parametrize("device", [H200, ORIN], ids=["h200", "orin"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_many_tokens_read_in_place_need_a_hundredth_of_the_official_memory(dtype, device):
    official = 4.7e9  # N 16384, C 1024, K 4096: what the official code asks for beside its tokens
    made = plan(B=1, N=16384, C=1024, k=2, dtype=dtype, in_place=True, **device)
    assert made["search"] == "streamed"
    assert made["workspace"] < 4 << 20 < official / 100
    assert plan(B=1, N=16384, C=1024, k=2, dtype=dtype, in_place=True, centres=4096)["workspace"] < official / 100


def test_cuda_comes_before_triton():
    assert backend._order("cuda", None) == ("cuda", "triton", "reference")
    assert backend._order("cuda", "reference") == ("reference",)


def scored_as(B, N, J, C, k, dtype, in_place):
    made = plan(B, N, J, C, k, dtype, in_place=in_place, centres=N // 3, **H200)
    numbers = (made[part] > 0 for part in ("list", "pitch", "line_pitch"))
    return (dtype, made["search"], made["distance"], made["tile"], made["label_tile"], *numbers)


def labelled_as(B, N, J, C, dtype, in_place):
    made = plan_assign(B, N, J, C, N // 3, dtype, in_place=in_place, **H200)
    return (dtype, made["distance"], made["label_tile"], *(made[part] > 0 for part in ("pitch", "line_pitch")))


def test_the_native_cases_reach_every_plan():
    scored, labelled = set(), set()
    for case in every_plan.CASES:
        dtype = str(case.dtype).removeprefix("torch.")
        vector = 8 if case.dtype in every_plan.HALVES else 4
        size = case.B, case.N, max(case.J, 1), case.C
        in_place = not case.J and case.C % vector == 0
        scored.add(scored_as(*size, case.k, dtype, in_place))
        labelled.add(labelled_as(*size, dtype, in_place))
    batches, tokens, channels = (1, 2, 8, 48, 200), (27, 243, 700, 2048, 2049, 8192), (3, 16, 64, 128, 512, 1536)
    for B, N, C, dtype in itertools.product(batches, tokens, channels, ("float32", "float64", "bfloat16", "float16")):
        for J, in_place in ((1, False), (3, False), *[(1, True)] * (C != 3)):  # of whole vectors
            assert {scored_as(B, N, J, C, k, dtype, in_place) for k in (2, 40)} <= scored
            assert labelled_as(B, N, J, C, dtype, in_place) in labelled
