"""Mistakes in the CUDA labels that must not survive.

name -> (file, text, replacement). tests/test_cuda_simt_cluster.py plants each of them.
"""

MUTANTS = {
    # cluster_search.cuh
    "one split of the centres less": (
        "cluster_search.cuh",
        "(split + 1) / job.label_splits);",
        "(split + 1) / job.label_splits - (split > 0));",
    ),
    "the edge of the centres one too early": (
        "cluster_search.cuh",
        "p < job.K ? centre[p]",
        "p < job.K - 1 ? centre[p]",
    ),
    "the edge of the rows one too early": ("cluster_search.cuh", "i < N && job.valid", "i < N - 1 && job.valid"),
    "masked centres attract": ("cluster_search.cuh", "j < N && job.valid[b * N + j];", "j < N;"),
    "the row block of the next split": (
        "cluster_search.cuh",
        "first = blockIdx.x / job.label_splits *",
        "first = (blockIdx.x + 1) / job.label_splits *",
    ),
    "no norm of the centres": ("cluster_search.cuh", " + shared.column_norm[c];", ";"),
    "no bound of products": ("plan.cpp", "bound.spread = float(", "bound.spread = 0 * float("),
    "the bound of a reach": ("cluster_search.cuh", "A(job.bound.reach(warp_min(least)))", "warp_min(least)"),
    "only the last columns of a lane are near": ("cluster_search.cuh", "near |= low[u]", "near = low[u]"),
    "a full list counts as whole": ("cluster_search.cuh", "    count = -1;", "    count = kCandidates;"),
    "a list has room for one more": (
        "cluster_search.cuh",
        "if (count + more > kCandidates) {",
        "if (count + more > kCandidates + 1) {",
    ),
    "what stays of a list does not move": (
        "cluster_search.cuh",
        "const int place = __popc(kept & ((1u << lane) - 1));",
        "const int place = lane;",
    ),
    "positions within a tile": ("cluster_search.cuh", "= first + u * kLanes + lane;", "= u * kLanes + lane;"),
    "places of the lanes before": (
        "cluster_search.cuh",
        "count + __popc(bits & ((1u << lane) - 1));",
        "count + __popc(bits & ((2u << lane) - 1));",
    ),
    "a centre is nobody's own": ("cluster_search.cuh", "      shared.reach[r] = -1;\n", ""),
    # cluster_label.cuh
    "ties to the highest position": ("cluster_label.cuh", "squared[e] < least)", "squared[e] <= least)"),
    "bounds decide alone": ("cluster_label.cuh", "if (found <= 1)", "if (found >= 0)"),
    "no bound of stored products": ("cluster_label.cuh", "pair ? spread * (own + n[u])", "pair ? 0 * (own + n[u])"),
    "the bound of a stored reach": ("cluster_label.cuh", "A(job.bound.reach(least)), lane)", "least, lane)"),
    "a stored centre is nobody's own": ("cluster_label.cuh", "itself = j[u] == self;", "itself = false;"),
    "the last of a list is left out": (
        "cluster_label.cuh",
        "lane < count[e / kCandidates];",
        "lane < count[e / kCandidates] - 1;",
    ),
    "the lists of the first split": ("cluster_label.cuh", "count[e / kCandidates];", "count[0];"),
    "lists that ran full are taken": ("cluster_label.cuh", "open |= job.centre_count[at + split] < 0;", ""),
    "every centre but the first 32": (
        "cluster_label.cuh",
        "int64_t from = 0; from < job.K &&",
        "int64_t from = 32; from < job.K &&",
    ),
    "positions within a warp's": ("cluster_label.cuh", "bits ? from + __ffs", "bits ? __ffs"),
    "masked centres attract in the end": (
        "cluster_label.cuh",
        "j < job.x.N && is_valid(job, b, j);",
        "j < job.x.N;",
    ),
    "of equals in float64 the highest": (
        "cluster_label.cuh",
        "if (squared < least) {",
        "if (squared <= least) {",
    ),
    "of the sieve's rows all but the first": ("cluster_label.cuh", "!(passed >> e & 1)", "!(passed >> 1 >> e & 1)"),
    "the nearest limits too much": (
        "cluster_label.cuh",
        "sieve.set_limit(squared);",
        "sieve.set_limit(0.1 * squared);",
    ),
    "bounds limit too much": ("cluster_label.cuh", "double(reach)));", "0.1 * double(reach)));"),
    # cluster.cu
    "one row of the index for each sample": ("cluster.cu", "args.index_rows > 1 ? args.K : 0;", "args.K;"),
    "the index of the first pass": ("cluster.cu", "args.index + first * job.centre_stride;", "args.index;"),
    # score_launch.cuh
    "labels of the first pass": ("score_launch.cuh", "offset_by(args.labels, first * in.x.N);", "args.labels;"),
    "kept tokens of the first sample": ("score_launch.cuh", "job.centre_stride = args.K;", "job.centre_stride = 0;"),
}
