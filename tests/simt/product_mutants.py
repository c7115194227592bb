"""Mistakes in the products of scoring that must not survive, by warps and by warpgroups.

name -> (file, text, replacement). tests/test_cuda_simt.py and test_cuda_simt_groups.py plant each of them.
"""

MUTANTS = {
    "fragment rows and channels swapped": (
        "score_multiply.cuh",
        "stage.place(row + lane % 16, v + lane / 16)",
        "stage.place(row + lane / 16 * 8 + lane % 8, v + lane / 8 % 2)",
    ),
    "fragment columns and channels swapped": (
        "score_multiply.cuh",
        "stage.place(column, v + lane / 8 % 2)",
        "stage.place(column - lane / 16 * 8 + lane / 8 % 2 * 8, v + lane / 16)",
    ),
    "fragment column of the sums": (
        "score_products.cuh",
        "first_column() + across * 8 + lane % 4 * 2;",
        "first_column() + across * 8 + lane % 4;",
    ),
    "another order of vectors where they are read": (
        "score_multiply.cuh",
        "load_matrices(a, stage.place(row + lane % 16, v + lane / 16));",
        "load_matrices(a, &stage.token[row + lane % 16][(v + lane / 16) * kVector]);",
    ),
    "a line is read before it is there": (
        "score_products.cuh",
        "sums.finish_line(slab.stage[at]);\n      wait_for_copies<kStages - 2>();",
        "sums.finish_line(slab.stage[at]);\n      wait_for_copies<kStages - 1>();",
    ),
    "a line is copied to where another is read": (
        "score_products.cuh",
        "const int before = at == 0 ? kStages - 1 : at - 1;",
        "const int before = at == kStages - 1 ? 0 : at + 1;",
    ),
    "copies not committed": (
        "score_products.cuh",
        "slab.stage[before]);\n      commit_copies();",
        "slab.stage[before]);",
    ),
    "one of the three products twice": (
        "score_multiply.cuh",
        "multiply(part, a[1], b[0]);\n          multiply(part, a[0], b[1]);",
        "multiply(part, a[0], b[1]);\n          multiply(part, a[0], b[1]);",
    ),
    "the edge of large tiles one too early": (
        "score_products.cuh",
        "if (column + c > row + r) matrix",
        "if (column + c > row + r + 1) matrix",
    ),
    "lower parts of another scale": (
        "score_pairs.cuh",
        "narrow_half(large - widen",
        "narrow_half(2 * large - widen",
    ),
}

GROUP_MUTANTS = {
    "a line is started before it is there": (
        "score_products.cuh",
        "sums.finish_line(slab.stage[at]);\n      wait_for_copies<kStages - 2>();",
        "sums.finish_line(slab.stage[at]);\n      wait_for_copies<kStages - 1>();",
    ),
    "a line is copied to where another is started": (
        "score_products.cuh",
        "const int before = at == 0 ? kStages - 1 : at - 1;",
        "const int before = at == kStages - 1 ? 0 : at + 1;",
    ),
    "a line is not summed from zero": (
        "score_multiply.cuh",
        "multiply(kLower + c, c, c > 0);",
        "multiply(kLower + c, c, true);",
    ),
    "lower parts of rows and of columns": (
        "score_multiply.cuh",
        "multiply(c, kLower + c, true);",
        "multiply(kLower + c, kLower + c, true);",
    ),
    "half of the upper parts": (
        "score_multiply.cuh",
        "for (int c = 0; c < kLower; c += kStep) multiply(c, c, true);",
        "for (int c = 0; c < kStep; c += kStep) multiply(c, c, true);",
    ),
    "a step of eight values": ("score_multiply.cuh", "constexpr int kStep = 16,", "constexpr int kStep = 8,"),
    "warpgroups of a tile take the same rows": (
        "score_multiply.cuh",
        "threadIdx.x / kGroupThreads / kGroupsAcross * kGroupSide;",
        "threadIdx.x / kGroupThreads / (2 * kGroupsAcross) * kGroupSide;",
    ),
    "rows of another warp": ("score_multiply.cuh", "threadIdx.x / kLanes % 4 * 16;", "threadIdx.x / kLanes % 2 * 32;"),
    "another order of vectors": ("score_multiply.cuh", "(v ^ (t & 7)) * kVector", "(v ^ (t & 3)) * kVector"),
}
