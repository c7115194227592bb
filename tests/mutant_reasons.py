"""Mutants of tests/mutants.py that change no result: (file, line, replacement), and why no test can tell.

Where the line stands more than once, it is given with the line below it.
"""

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "csrc/cpu/recover_interpolation.cpp",
        "const int64_t s = tile * kTile, count = (tile + 1 < tiles ? s + kTile : a.S) - s;",
        "const int64_t s = tile * kTile, count = (tile + 2 < tiles ? s + kTile : a.S) - s;",
    ): "the last tile but one takes what is left over, too; the last writes the same there",
    (
        "csrc/cpu/select.cpp",
        "if (c < L) {",
        "if (c <= L) {",
    ): "with nothing left over no lane is counted",
    (
        "csrc/cpu/select.cpp",
        "uint64_t* const keys = carver.take<uint64_t>(2 * a.N + 1);",
        "uint64_t* const keys = carver.take<uint64_t>(2 * a.N + 2);",
    ): "room for one more",
    (
        "csrc/cpu/select.cpp",
        "const bool rows = a.stride_d == 1 && a.stride_j == a.D && a.J * a.D >= 4;",
        "const bool rows = a.stride_d == 1 && a.stride_j == a.D && a.J * a.D > 4;",
    ): "four coordinates in the other form, to the same bits",
    (
        "csrc/cpu/select.cpp",
        "for (int64_t b = 0; b < a.B && a.F > 0; b++) a.score[b * a.F] = 0;",
        "for (int64_t b = 0; b < a.B && a.F >= 0; b++) a.score[b * a.F] = 0;",
    ): "the operator wants one token at least, so there are frames",
    (
        "csrc/cpu/pack.h",
        "if (panels && !mask && x.N > kPanel && sample.takes_digits()) {",
        "if (panels && !mask && x.N >= kPanel && sample.takes_digits()) {",
    ): "a panel of tokens in one pass or two, to the same bits (the tile unit's)",
    (
        "csrc/cpu/pack.h",
        "const A d = sample.row(i)[c] - first[c], size = d < 0 ? -d : d;",
        "const A d = sample.row(i)[c] - first[c], size = d <= 0 ? -d : d;",
    ): "minus zero for zero",
    (
        "csrc/cpu/pack.h",
        "if (!(scale > 0x1p-100 && scale < 0x1p100)) return false;",
        "if (!(scale > 0x1p-100 || scale < 0x1p100)) return false;",
    ): "the limits only choose between two searches with the same result",
    (
        "csrc/cpu/cluster.cpp",
        "for (int64_t at = 0; at < stride; at += kPanel) {",
        "for (int64_t at = 0; at <= stride; at += kPanel) {",
    ): "the first panel once more: the same distances in the same places",
    (
        "csrc/cpu/pack.h",
        "if (!(radius > 0x1p-80)) return;",
        "if (!(radius >= 0x1p-80)) return;",
    ): "the limits only choose between two searches with the same result",
    (
        "csrc/cpu/recover_interpolation.cpp",
        "for (int64_t t = from; t < to; t += kLanes<E>) {",
        "for (int64_t t = from; t <= to; t += kLanes<E>) {",
    ): "a vector more, which the next interval overwrites and the arrays have room for",
    (
        "csrc/cpu/recover_interpolation.cpp",
        "const bool few = a.S < kLanes<E>;",
        "const bool few = a.S <= kLanes<E>;",
    ): "a whole vector of channels comes out the same from both forms",
    (
        "csrc/cpu/recover_interpolation.cpp",
        "for (; past >= step; past -= step) plan.first[++before] = t;",
        "for (; past > step; past -= step) plan.first[++before] = t;",
    ): "a frame that is a kept one is kept by weight 1 instead of weight 0",
    (
        "csrc/cpu/score_streamed.h",
        "if (open[i] && state->near_count[i] < 0) state->set_nearest_exactly(i, room.list);",
        "if (open[i] || state->near_count[i] < 0) state->set_nearest_exactly(i, room.list);",
    ): "rows that are proven are decided again, the same",
    (
        "csrc/cpu/score_stored.h",
        "for (int64_t i = 0, j = 0; i < sample.n && j < K; i++) {",
        "for (int64_t i = 0, j = 0; i < sample.n && j <= K; i++) {",
    ): "with nothing left in index, the body leaves every token out",
    (
        "csrc/cuda/score_rows.cuh",
        "row.scan(nullptr, lane, [&](int, int j, A, A bound, double) { "
        "reached += j < row.N && pattern(bound) <= middle; });",
        "row.scan(nullptr, lane, [&](int, int j, A, A bound, double) { "
        "reached += j < row.N && pattern(bound) < middle; });",
    ): "a limit one step higher: more candidates, the same nearest",
    (
        "h2ot_kernels/triton/score_large.py",
        "side = 16 if double else 32 if gaussian or B * N < 8192 or (slots > 8 and not half) else 64",
        "side = 16 if double else 32 if gaussian or B * N <= 8192 or (slots > 8 and not half) else 64",
    ): "another tile, the same results",
    (
        "csrc/cuda/score_stream.cuh",
        "if (wants_largest && lane == 0) {",
        "if (wants_largest && lane != 0) {",
    ): "31 lanes write what one would",
    (
        "python_ref/cluster.py",
        "labels = index.new_full((index.shape[0], N + 1), -1)",
        "labels = index.new_full((index.shape[0], N + 2), -1)",
    ): "a column more of those that are cut off again",
    (
        "python_ref/cluster.py",
        "labels = torch.where(own >= 0, own, labels)",
        "labels = torch.where(own > 0, own, labels)",
    ): "the first selected token is nearest to itself, and the lowest wins a tie",
    (
        "h2ot_kernels/triton/score.py",
        'active = (least < float("inf")) & ((floor < best) | ((floor == best) & (candidate < parent)))',
        'active = (least < float("inf")) & ((floor < best) | ((floor == best) & (candidate <= parent)))',
    ): "a candidate that is the parent already",
    (
        "h2ot_kernels/triton/common.py",
        "if first.is_cuda and first.get_device() != torch.cuda.current_device():",
        "if first.is_cuda and first.get_device() == torch.cuda.current_device():",
    ): "where to launch for another GPU: a machine with two can tell",
    (
        "h2ot_kernels/triton/gather.py",
        "columns = next((width for width in (4, 16, 64) if inner <= width), 256)",
        "columns = next((width for width in (4, 16, 64) if inner < width), 256)",
    ): "blocks of another width, the rest of which is masked",
    (
        "h2ot_kernels/triton/recover_interpolation.py",
        "end = tl.where(position == K - 1, F, ((right * span) // tl.maximum(K - 1, 1)) + 1)",
        "end = tl.where(position == K - 1, F, ((right * span) // tl.maximum(K - 1, 1)) + 2)",
    ): "a frame more, whose share is 0",
    (
        "h2ot_kernels/triton/gather.py",
        "if FRAME < 0:",
        "if FRAME <= 0:",
    ): "axis 0 is the batch's: no frames lie along it",
    (
        "h2ot_kernels/triton/cluster.py",
        'active = (least < float("inf")) & ((floor < best) | ((floor == best) & (first + candidate < label)))',
        'active = (least < float("inf")) & ((floor <= best) | ((floor == best) & (first + candidate < label)))',
    ): "a centre more is measured, and loses by its number",
    (
        "h2ot_kernels/triton/cluster.py",
        'active = (least < float("inf")) & ((floor < best) | ((floor == best) & (first + candidate < label)))',
        'active = (least < float("inf")) & ((floor < best) | ((floor == best) | (first + candidate < label)))',
    ): "centres more are measured, and lose by their distance",
    (
        "h2ot_kernels/triton/select.py",
        "kept = (ranks(keys, key, column, N, CHUNK) < K) & (column < N)",
        "kept = (ranks(keys, key, column, N, CHUNK) < K) & (column <= N)",
    ): "what stands behind the last token ranks behind all",
    (
        "csrc/cpu/distance.h",
        "for (int64_t begin = 0; begin < C; begin += kChunk) {",
        "for (int64_t begin = 0; begin <= C; begin += kChunk) {",
    ): "one chunk more, of no channels: nothing is added",
    (
        "csrc/cpu/score_streamed.h",
        "if (proven < state->wanted) return false;",
        "if (proven <= state->wanted) return false;",
    ): "rows that are proven are decided again, the same",
    (
        "csrc/cpu/lists.h",
        "for (; at > 0 && (value < values[at - 1] || (value == values[at - 1] && from < slots[at - 1])); at--) {",
        "for (; at > 0 && (value < values[at - 1] || (value == values[at - 1] && from <= slots[at - 1])); at--) {",
    ): "no slot is offered twice to a list",
    (
        "csrc/cuda/score_device.cuh",
        "if (i > 0 || copy == nullptr) return;",
        "if (i > 0 && copy == nullptr) return;",
    ): "tokens are cleared of which nobody reads; without a copy there is no pitch either",
    (
        "csrc/cuda/select.cuh",
        "if (keep.M > 0) {",
        "if (keep.M >= 0) {",
    ): "with nothing to keep nothing is wrong",
    (
        "csrc/cuda/score_stored.cuh",
        "if (lane == 0) shared.wanted[warp] = 0;",
        "if (lane != 0) shared.wanted[warp] = 0;",
    ): "31 lanes write what one would",
    (
        "csrc/cuda/score_lists.cuh",
        "if (token[e] >= 0 && !(list.full() && least_of(low[e]) > list.worst())) return token[e++];",
        "if (token[e] >= 0 && !(list.full() && least_of(low[e]) >= list.worst())) return token[e++];",
    ): "bounds above zero are below the distance; those of zero come in the order of tokens",
    (
        "h2ot_kernels/triton/recover_tail.py",
        "row_at = tl.minimum(row, rows - 1) * attended_r",
        "row_at = tl.minimum(row, rows - 0) * attended_r",
    ): "behind the last row stands proj_weight's first, and what it gives is not stored",
    (
        "csrc/cpu/score_matrix.h",
        "refined[q] |= upper != 0;",
        "refined[q] |= upper == 0;",
    ): "panels with no refined block are packed and split for nothing; one with no other kind has that of the diagonal",
    (
        "csrc/cpu/recover_interpolation.cpp",
        "(first[middle] <= t ? low : high) = middle;",
        "(first[middle] < t ? low : high) = middle;",
    ): "an interval too early, none of whose frames is left, for a thread that starts at a kept frame",
    (
        "csrc/cpu/score_state.h",
        "if (pays && count > 2 * wanted - (wanted == 1) && sample.most < 0x1p126) "
        "count = sift(i, list, count, wanted);",
        "if (pays && count > 2 * wanted - (wanted != 1) && sample.most < 0x1p126) "
        "count = sift(i, list, count, wanted);",
    ): "candidates are sifted or not; float64 decides either way",
    (
        "csrc/cuda/cluster_search.cuh",
        "constexpr int kCentreBlocks = Tiles::kProducts || Tiles::kBlocks < 2 ? Tiles::kBlocks : 2;",
        "constexpr int kCentreBlocks = Tiles::kProducts && Tiles::kBlocks < 2 ? Tiles::kBlocks : 2;",
    ): "what the compiler is told of registers",
    (
        "csrc/cuda/score_stream_products.cuh",
        "bool hit = low[u] <= shared.worst[r] && j != i;",
        "bool hit = low[u] < shared.worst[r] && j != i;",
    ): "which of the equally near goes on a full list: its last one is the limit of what it proves, either way",
    (
        "h2ot_kernels/triton/score.py",
        "inside = (row < N) & (tl.load(valid + b * N + row, row < N, 0) != 0)\n"
        "open_pairs = inside[:, None] & (column < N)[None, :] & (column[None, :] != row[:, None])",
        "inside = (row < N) | (tl.load(valid + b * N + row, row < N, 0) != 0)",
    ): "all bounds of a token that is not valid are infinity: it has no candidates",
    (
        "h2ot_kernels/triton/score_large.py",
        "inside = (row < N) & (tl.load(valid + b * N + row, row < N, 0) != 0)",
        "inside = (row <= N) & (tl.load(valid + b * N + row, row < N, 0) != 0)",
    ): "behind the last token 0 is loaded: not valid",
    (
        "h2ot_kernels/triton/score_large.py",
        "there = (column < N) & (tl.load(valid + b * N + column, column < N, 0) != 0)",
        "there = (column <= N) & (tl.load(valid + b * N + column, column < N, 0) != 0)",
    ): "behind the last token 0 is loaded: not valid",
    (
        "h2ot_kernels/triton/score.py",
        'active = (least < float("inf")) & ((floor < best) | ((floor == best) & (candidate < parent)))',
        'active = (least <= float("inf")) & ((floor < best) | ((floor == best) & (candidate < parent)))',
    ): "infinity is below no best, and with none found there is no parent that a candidate could stand before",
    (
        "csrc/cpu/add_norm.cpp",
        "parallel_for(pool, a.rows, 1 + 65536 / (C + 1), [&](int64_t begin, int64_t end) {",
        "parallel_for(pool, a.rows, 1 + 65536 / (C + 2), [&](int64_t begin, int64_t end) {",
    ): "how many rows a thread takes at least",
    (
        "csrc/cpu/form.h",
        ": enabled(form.in_digits() || (prefix_of(form.rows.C) > 0 && prefix_of(form.rows.C) * 4 <= form.rows.C)),",
        ": enabled(form.in_digits() || (prefix_of(form.rows.C) > 0 && prefix_of(form.rows.C) * 4 < form.rows.C)),",
    ): "whether the first channels are looked at first; the bound of a tile holds with them and without",
    (
        "csrc/cpu/balls.h",
        "const int64_t from = sample->n * (2 * asked + 1) / (2 * kAsked);",
        "const int64_t from = sample->n * (2 * asked + 2) / (2 * kAsked);",
    ): "four other tokens are asked which search to take, both with the same result; the panels have room for the last",
    (
        "csrc/cpu/graph.cpp",
        "for (int64_t begin = 0; begin < a.T; begin += kPanel<E>) {",
        "for (int64_t begin = 0; begin <= a.T; begin += kPanel<E>) {",
    ): "after whole panels one more, without nodes",
    (
        "csrc/cuda/select.cuh",
        "for (int64_t from = 0; from < N; from += threads) {",
        "for (int64_t from = 0; from <= N; from += threads) {",
    ): "after whole rounds one more, of the whole block, without keys",
    (
        "csrc/cuda/score_stream_products.cuh",
        "if (i < 0) continue;",
        "if (i <= 0) continue;",
    ): "the largest distance is met from its other token, whatever stands in the place of the first",
    (
        "h2ot_kernels/triton/recover_interpolation.py",
        "span = tl.maximum(F - 1, 1).to(tl.int64)",
        "span = tl.maximum(F - 0, 1).to(tl.int64)",
    ): "the range ends a frame later, and begins after the left neighbour at most: frames beside it weigh 0",
    (
        "h2ot_kernels/triton/score_large.py",
        'active = (least < float("inf")) & (-least.to(tl.float64) > best)\ntl.atomic_max(largest + b, best)',
        'active = (least < float("inf")) & (-least.to(tl.float64) >= best)',
    ): "a pair that is at most as far as the farthest is measured, too",
    (
        "h2ot_kernels/triton/score_large.py",
        "denser &= inside[:, None] & there[None, :]",
        "denser &= inside[:, None] | there[None, :]",
    ): "a row that is not there has the rank of the densest, a column that is not there an infinite one",
    (
        "h2ot_kernels/triton/score_large.py",
        '"EXACT": 32 if slots > 16 and side == 32 and not half else 64,  # sums and lists stay in registers',
        '"EXACT": 32 if slots > 16 and side != 32 and not half else 64,  # sums and lists stay in registers',
    ): "how many channels of a float64 sum are added at a time",
    (
        "csrc/cuda/score_lists.cuh",
        "for (int u = 0; u < kOwn; u++) {  // tokens ascend with u",
        "for (int u = 0; u <= kOwn; u++) {  // tokens ascend with u",
    ): "no pair is open at a bit that no column has",
    (
        "csrc/cuda/score_lists.cuh",
        "if ((open >> u & 1) && bound < own) {",
        "if ((open >> u & 1) && bound <= own) {",
    ): "of a lane's equals the last is listed first, and gives way to the others",
    (
        "csrc/cuda/score_lists.cuh",
        "if (!(least < last || (least == last && at < last_at))) return;",
        "if (!(least < last || (least == last && at <= last_at))) return;",
    ): "no token comes twice",
    (
        "csrc/cuda/score_lists.cuh",
        "const int32_t place = __popc(__ballot_sync(kAllLanes, listed < least || "
        "(listed == least && listed_at < at)));",
        "const int32_t place = __popc(__ballot_sync(kAllLanes, listed < least || "
        "(listed == least && listed_at <= at)));",
    ): "no token comes twice",
    (
        "csrc/cuda/score_lists.cuh",
        "if (lane >= place && lane < room) {",
        "if (lane >= place && lane <= room) {",
    ): "what lies behind a list's last entry is not stored",
    (
        "csrc/cuda/score_lists.cuh",
        "if (norm == nullptr) return true;",
        "if (norm != nullptr) return true;",
    ): "norms only save work",
    (
        "csrc/cuda/score_lists.cuh",
        "const A length = root(squared_norm), apart = length > own_length ? length - own_length : own_length - length;",
        "const A length = root(squared_norm), apart = length >= own_length ? length "
        "- own_length : own_length - length;",
    ): "0 either way",
    (
        "csrc/cuda/score_lists.cuh",
        "return !(apart - A(bound.spread) * (length + own_length) > reach);",
        "return !(apart - A(bound.spread) * (length + own_length) >= reach);",
    ): "the reach has more room than a rounding",
    (
        "csrc/cuda/score_lists.cuh",
        "for (int e = 0; e < kMany; e++) bits |= uint32_t(!(unscaled(scale, bound.least(double(first[e]))) "
        "> limit)) << e;",
        "for (int e = 0; e <= kMany; e++) bits |= uint32_t(!(unscaled(scale, bound.least(double(first[e]))) "
        "> limit)) << e;",
    ): "a bit that no row has",
    (
        "csrc/cuda/score_lists.cuh",
        "for (int e = 0; e < kMany; e++) bits |= uint32_t(!(unscaled(scale, bound.least(double(first[e]))) "
        "> limit)) << e;",
        "for (int e = 0; e < kMany; e++) bits |= uint32_t(!(unscaled(scale, bound.least(double(first[e]))) "
        ">= limit)) << e;",
    ): "the least that a distance can be is below it",
    (
        "csrc/cuda/score_lists.cuh",
        "for (int64_t split = lane; split < splits; split += kLanes) {",
        "for (int64_t split = lane; split <= splits; split += kLanes) {",
    ): "with another token's list beside its own a token proves less, and is searched",
    (
        "csrc/cuda/score_lists.cuh",
        "if (last == 0 && token[end] < equal) equal = token[end];",
        "if (last == 0 && token[end] <= equal) equal = token[end];",
    ): "the same number",
    (
        "csrc/cuda/score_lists.cuh",
        "if (last == 0 && token[end] < equal) equal = token[end];",
        "if (last == 0 || token[end] < equal) equal = token[end];",
    ): "fewer equals are proven, and the others searched",
    (
        "csrc/cuda/score_lists.cuh",
        "return bounded < infinity_of(A()) ? unscaled(scale, bound.least(bounded)) : infinity_of(0.0);",
        "return bounded <= infinity_of(A()) ? unscaled(scale, bound.least(bounded)) : infinity_of(0.0);",
    ): "the least for infinity is infinity",
    (
        "csrc/cuda/score_lists.cuh",
        "if (known.full() && known.worst() < limit) limit = known.worst();",
        "if (known.full() && known.worst() <= limit) limit = known.worst();",
    ): "the same limit",
    (
        "csrc/cuda/score_lists.cuh",
        "return list.full() && list.worst() == 0 && list.token[list.count - 1] < end;",
        "return list.full() && list.worst() == 0 && list.token[list.count - 1] <= end;",
    ): "token `end` is still to come",
}
# What an explanation is of, where that is not one place: it holds in each of so many.
PLACES: dict[tuple[str, str, str], int] = {
    (
        "h2ot_kernels/triton/score_large.py",
        "inside = (row < N) & (tl.load(valid + b * N + row, row < N, 0) != 0)",
        "inside = (row <= N) & (tl.load(valid + b * N + row, row < N, 0) != 0)",
    ): 3,
    (
        "h2ot_kernels/triton/score_large.py",
        "there = (column < N) & (tl.load(valid + b * N + column, column < N, 0) != 0)",
        "there = (column <= N) & (tl.load(valid + b * N + column, column < N, 0) != 0)",
    ): 3,
}
