"""Mistakes in the streamed search and in what its lists prove that must not survive.

name -> (file, text, replacement). tests/test_cuda_simt.py plants each of them.
"""

MUTANTS = {
    # score_stream.cuh, score_stream_products.cuh
    "one column split less": (
        "score_stream.cuh",
        "(part.split + 1) / part.splits, around / Tiles::kColumns);",
        "(part.split + 1) / part.splits - (part.split > 0), around / Tiles::kColumns);",
    ),
    "lists of peaks in each other's place": (
        "score_stream.cuh",
        "(job.for_peaks ? first_row + r : i) * splits + split;",
        "(job.for_peaks ? first_row + r : i) + split;",
    ),
    "peaks by the splits of all": (
        "score_stream.cuh",
        "block + warp, job.peak_count[2 * b + 1], lane);",
        "block + warp, 1, lane);",
    ),
    "one split of large tiles less": (
        "score_stream_products.cuh",
        "(part.split + 1) / part.splits, around / kSide);",
        "(part.split + 1) / part.splits - (part.split > 0), around / kSide);",
    ),
    "rows with pairs are another's": (
        "score_stream_products.cuh",
        "!= 0) << (r - first);",
        "!= 0) << (r - first) / 2 * 2;",
    ),
    "a neighbour past the last of a list": (
        "score_stream.cuh",
        "while (proven < list.count",
        "while (proven <= list.count",
    ),
    "rows that their lists do not settle are left": (
        "score_stream.cuh",
        "list.squared[job.k - 2] <= lists.limit) {",
        "list.squared[job.k - 2] >= 0) {",
    ),
    # score_lists.cuh
    "a list entry displaced too early": (
        "score_lists.cuh",
        "listed = lane == place ? least : before;",
        "listed = lane == place + 1 ? least : before;",
    ),
    "any listed equal is the first": ("score_lists.cuh", "(s == 0 && j <= last_equal);", "s == 0;"),
    "of a lane's pairs only the nearest": ("score_lists.cuh", "open &= ~(1u << own_u);", "open = 0;"),
    "tiles before those around are left out": (
        "score_lists.cuh",
        "tile = tile + 1 < last ? tile + 1 : first;",
        "tile = tile + 1 < last ? tile + 1 : last - 1;",
    ),
    "norms leave what is near": ("score_lists.cuh", "(length + own_length) > reach);", "length > A(0.5) * reach);"),
    "first channels leave what is near": ("score_lists.cuh", "> limit)) << e;", "> 0.5 * limit)) << e;"),
    "the nearest around limits too much": ("score_lists.cuh", "rank - 1 ? mine :", "rank - 1 ? 0.5 * mine :"),
    "tokens that are known come again": ("score_lists.cuh", " && !known.holds(int32_t(mine));", ";"),
    "shares begin too late": (
        "score_lists.cuh",
        "first = share.member * kAtOnce;",
        "first = (share.member + 1) * kAtOnce;",
    ),
    "the list of a warp that searched is lost": (
        "score_lists.cuh",
        "shared.lists.join(list, 0, lane);",
        "shared.lists.join(list, 1, lane);",
    ),
}
