"""Mistakes in the stored search, in what decides from it and in pooling that must not survive.

name -> (file, text, replacement). tests/test_cuda_simt.py plants each of them.
"""

MUTANTS = {
    # score_pool.cuh
    "the second warp of a token is not asked": ("score_pool.cuh", "other < warps;", "other < 1;"),
    "no block counts as arrived from 0 on": ("score_pool.cuh", "job.arrived[b] = 0;", "(void)job.arrived;"),
    # score_tiles.cuh
    "a slab is read before it is there": ("score_tiles.cuh", "wait_for_copies<1>();", "wait_for_copies<2>();"),
    "a slab is copied to where another is read": ("score_tiles.cuh", "copy(lines[stage ^ 1]);", "copy(lines[stage]);"),
    "slabs do not take turns": ("score_tiles.cuh", "stage ^= 1)", "stage ^= 0)"),
    "slabs not committed": ("score_tiles.cuh", "nobody reads\n      commit_copies();", "nobody reads"),
    "the first slab not committed": ("score_tiles.cuh", "copy(lines[0]);\n    commit_copies();", "copy(lines[0]);"),
    "a group of channels is left out": (
        "score_tiles.cuh",
        "int group = 1; group < kGroups",
        "int group = 2; group < kGroups",
    ),
    "groups read the same channels": (
        "score_tiles.cuh",
        "int next = group * kChannels;",
        "int next = group / 2 * kChannels;",
    ),
    "channels past the last are read": ("score_tiles.cuh", "&& next + v * kVector < channels;", ";"),
    "vectors of a line in another order where they are read": (
        "score_tiles.cuh",
        ".v[place_of(column, v)]",
        ".v[place_of(column, v ^ 1)]",
    ),
    "squares that leave the range": ("score_tiles.cuh", " && scale >= A(0x1p-48);", ";"),
    "a tile edge one too early": ("score_tiles.cuh", "if (j < N && j > i)", "if (j < N - 1 && j > i)"),
    "the mirrored edge one too far": ("score_tiles.cuh", "if (j < N && j > i)", "if (j <= N && j > i)"),
    # score_stored.cuh
    "the reach of the first neighbour for all": (
        "score_stored.cuh",
        "wanted == 1 ? warp_min",
        "wanted >= 1 ? warp_min",
    ),
    "a row is left before all candidates were seen": ("score_stored.cuh", "return most > 0 ||", "return true ||"),
    "the list of a warp is lost": (
        "score_stored.cuh",
        "shared.lists.join(list, 1, lane);",
        "shared.lists.join(list, 2, lane);",
    ),
    "warps take the same candidates": ("score_rows.cuh", "!= share.member)", "!= share.member / 2)"),
    "the nearest of several candidates only": ("score_stored.cuh", "!list.full() || mine", "list.count == 0 || mine"),
    "equals that are not denser themselves": (
        "score_stored.cuh",
        "== 0 && denser(equal);",
        "== 0 && (denser(equal) || true);",
    ),
    "equals of a higher number": ("score_stored.cuh", "equal >= 0 && equal < j &&", "equal >= 0 &&"),
    "the nearest neighbour is never the parent": (
        "score_stored.cuh",
        "for (int64_t from = 0; from < job.near;",
        "for (int64_t from = 1; from < job.near;",
    ),
    "parents of equal distance: the highest": ("score_stored.cuh", "squares[e] < squared))", "squares[e] <= squared))"),
    "only pairs of the last batch": ("score_stored.cuh", "e < n && squared[e] > largest ?", "e < n ?"),
    "the last block but one finishes the sample": (
        "score_stored.cuh",
        "== int32_t(gridDim.x) - 1;",
        "== int32_t(gridDim.x) - 2;",
    ),
    # score_finish.cuh, select.cuh
    "kept keys not first": ("select.cuh", "if (kept) return ~uint64_t(0);", "if (kept) return 1;"),
    "two arrays of bins in turn": ("select.cuh", "use = use == 2 ? 0 : use + 1;", "use = use == 1 ? 0 : use + 1;"),
}

# Seen by the sanitizer, whatever the results are.
SANITIZED = {
    "the mirrored edge one too far": ("score_tiles.cuh", "if (j < N && j > i)", "if (j <= N && j > i)"),
    "a token past the last is read": ("score_tiles.cuh", "= i < N ? int32_t(i) : -1;", "= i <= N ? int32_t(i) : -1;"),
}
