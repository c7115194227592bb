"""Any valid input: drawn sizes (zero and one among them), strides, dtypes, masks, lengths and keep, on the CPU kernels
(on the PTX of the Triton kernels under `./dev ptx`).

`fast` by default, the same inputs in every run (a few, new by its seed, under `./dev ptx`);
`--hypothesis-profile=nightly` draws new and many more. Each result is held to python_ref, and no byte of an input's
storage changes, that between the elements included.
"""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import nn

import h2ot_kernels as h2ot
import python_ref
from h2ot_kernels import _C
from h2ot_kernels.demo.keypoints import KeypointError, read_clip

from .cases import _KINDS, DTYPES, TokenCase, oracle_index, oracle_labels, oracle_scores
from .compare import assert_scores, assert_within, attention_scales
from .runners import PTX
from .sample import seed_of_run

BACKEND = "triton" if PTX else "cpp"
LAYOUTS = ("contiguous", "permuted", "sliced", "padded", "offset", "expanded")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x on other strides; "expanded": those of its first sample for all. Gaps hold what no value is."""
    gap = float("nan") if x.is_floating_point() else 2**40 if x.dtype == torch.int64 else True
    if layout == "permuted":
        axes = range(x.dim() - 1, -1, -1)
        return x.permute(*axes).contiguous().permute(*axes)
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), gap, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "padded":
        wide = torch.full([size + 1 for size in x.shape], gap, dtype=x.dtype)
        inside = wide[tuple(slice(size) for size in x.shape)]
        inside.copy_(x)
        return inside
    if layout == "offset":
        flat = torch.full((x.numel() + 3,), gap, dtype=x.dtype)
        flat[3:] = x.flatten()
        return flat[3:].view(x.shape)
    return x[:1].expand(x.shape) if layout == "expanded" and x.shape[0] else x


def on_any_strides(draw, x: torch.Tensor) -> torch.Tensor:
    """What stands beside the tokens: indices, masks, weights, gradients."""
    return laid_out(x, draw(st.sampled_from(LAYOUTS[:-1])))


def storage(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([], dtype=torch.uint8).set_(x.untyped_storage())


def unmodified(function, *args, **kwargs):
    """function(...) on the backend; no byte behind any argument changes."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    before = [storage(x.detach()).clone() for x in tensors]
    result = function(*args, **kwargs, backend=BACKEND)
    for x, bytes_before in zip(tensors, before, strict=True):
        assert torch.equal(storage(x.detach()), bytes_before), "an input was modified"
    return result


def integers(draw, low: int, high: int) -> int:
    return draw(st.integers(low, high))


def drawn_index(draw, rows: int, N: int, padded: bool = False) -> torch.Tensor:
    """[rows, K] ascending; padded: each row may end in -1."""
    K = integers(draw, 1, N)
    index = torch.stack([torch.randperm(N)[:K].sort().values for _ in range(rows)])
    if padded:
        for row in index:
            row[integers(draw, 0, K) :] = -1
    return on_any_strides(draw, index)


def hunt(check, record_property) -> None:
    """check(draw) over the inputs that the profile draws; says how many."""
    tried = 0

    @given(st.data())
    def run(data):
        nonlocal tried
        tried += 1
        _C.set_capability(data.draw(st.sampled_from(_C.runnable_capabilities().split(","))))
        torch.manual_seed(data.draw(st.integers(0, 2**32)))
        check(data.draw)

    drawn_by = seed_of_run() if PTX else None
    (run if drawn_by is None else seed(drawn_by)(run))()
    assert tried > 0
    record_property("count", f"fuzz {check.__name__}: {tried} inputs")


def scoring(draw) -> None:
    """score_tokens, prune_cluster and assign_clusters, with all their options."""
    N, B = integers(draw, 1, 40), integers(draw, 0, 3)
    options = {}
    if draw(st.booleans()):
        options["metric"] = draw(st.sampled_from(["euclidean", "cosine"]))
        options["scale"] = draw(st.sampled_from([None, 0.37, 20.0]))
        options["exclude_self"] = N > 1 and draw(st.booleans())
        if draw(st.booleans()):
            options |= {"density": "gaussian", "cutoff": draw(st.sampled_from([0.05, 1.0]))}
    K = integers(draw, 1, N)
    layout = draw(st.sampled_from(LAYOUTS if B == 1 else LAYOUTS[:-1]))
    case = TokenCase(
        draw(st.sampled_from(sorted(_KINDS))) if B else "random",
        B=B,
        N=N,
        C=integers(draw, 1, 33),
        J=integers(draw, 0, 4),
        k=integers(draw, 1, N - bool(options.get("exclude_self"))),
        K=K,
        dtype=draw(st.sampled_from(DTYPES)),
        masked=draw(st.booleans()),
        ragged=draw(st.booleans()),
        noisy=draw(st.booleans()),
        keep=draw(st.none() | st.integers(0, N - 1)),
        options=tuple(options.items()),
    )
    if case.J == 3 and case.kind in ("integers", "lattice"):
        case = replace(case, J=4)  # thirds are rounded: which of two sums that tie is smaller hangs on their last bit
    x, given_ = laid_out(case.tokens(), layout), case.arguments()
    for name, value in given_.items():
        if isinstance(value, torch.Tensor):
            given_[name] = on_any_strides(draw, value)
    scores = unmodified(h2ot.score_tokens, x, case.k, **given_)
    assert_scores(scores, oracle_scores(case))
    index = unmodified(h2ot.prune_cluster, x, K, case.k, keep=case.keep, **given_)
    assert torch.equal(index, oracle_index(case))
    index = on_any_strides(draw, index)
    named = {name: value for name, value in given_.items() if name in ("mask", "lengths", "metric")}
    assert torch.equal(unmodified(h2ot.assign_clusters, x, index, **named), oracle_labels(case))
    if BACKEND == "cpp" and not (case.noisy or any(given_.get(name) for name in ("scale", "exclude_self", "cutoff"))):
        clusters = unmodified(h2ot.cluster_tokens, x, K, case.k, keep=case.keep, **named)
        assert torch.equal(clusters.index, index)
        assert torch.equal(clusters.labels, oracle_labels(case))
        assert torch.equal(clusters.score, scores.score)
    if h2ot.can_run("assign_by_parent", BACKEND, "cpu")[0]:
        parent = on_any_strides(draw, scores.parent)
        by_parent = unmodified(h2ot.assign_clusters, x, index, parent=parent, **named)
        assert torch.equal(by_parent, oracle_labels(case, by_parent=True))


def selecting(draw) -> None:
    """select_tokens, a number of tokens per sample included, and prune_motion; ties and NaN among the scores."""
    B, N = integers(draw, 0, 3), integers(draw, 1, 70)
    score = torch.randint(-4, 5, (B, N)).double()
    score[torch.rand(B, N) < 0.1] = float("nan")
    score[torch.rand(B, N) < 0.1] = float("inf")
    score = laid_out(score.to(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(LAYOUTS)))
    K = integers(draw, 1, N)
    keep = torch.randint(0, N, (draw(st.sampled_from([1, max(B, 1)])), integers(draw, 0, K)))
    keep = on_any_strides(draw, keep)
    mask = on_any_strides(draw, torch.rand(B, N) < 0.7) if draw(st.booleans()) else None
    lengths = torch.randint(0, N + 1, (B,)) if draw(st.booleans()) else None
    valid = python_ref.score.valid_tokens(torch.zeros(B, N, 1), mask, lengths)
    keep = keep if B else None
    ours = unmodified(h2ot.select_tokens, score, K, keep=keep, mask=mask, lengths=lengths)
    assert torch.equal(ours, python_ref.select_tokens(score, K, keep=keep, mask=valid))
    counts = [integers(draw, 0, N) for _ in range(B)]
    ours = unmodified(h2ot.select_tokens, score, counts, mask=mask, lengths=lengths)
    assert torch.equal(ours, python_ref.select_ragged(score, counts, mask=valid))
    pose = torch.randn(B, N, integers(draw, 1, 5), integers(draw, 1, 3)).to(score.dtype)
    pose = laid_out(pose, draw(st.sampled_from(LAYOUTS)))
    assert torch.equal(unmodified(h2ot.prune_motion, pose, K, keep=keep), python_ref.prune_motion(pose, K, keep=keep))


def attending(draw) -> None:
    """prune_attention: its scores within the bound, its choice that of its scores."""
    shape = [integers(draw, 0, 2), *([integers(draw, 1, 3)] * draw(st.integers(0, 1)))]
    shape += [integers(draw, 1, 3), integers(draw, 1, 40), integers(draw, 1, 40)]
    dtype = draw(st.sampled_from(DTYPES))
    query, key = (laid_out(torch.randn(shape).to(dtype), draw(st.sampled_from(LAYOUTS))) for _ in range(2))
    K = integers(draw, 1, shape[-2])
    scale = draw(st.sampled_from([None, -0.3]))
    score = torch.ops.h2ot_kernels.attention_scores(query, key, scale or shape[-1] ** -0.5)
    exact = python_ref.attention_scores(query.double(), key.double(), scale)
    assert_within(score, exact, python_ref.attention_scores(query, key, scale), shape[-1])
    kept = unmodified(h2ot.prune_attention, query, key, K, scale=scale)
    assert torch.equal(kept, python_ref.select_tokens(score, K))


def gradients(function, leaves, weight):
    """Of the sum of function's result times weight, whose strides they meet."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    return torch.autograd.grad(function(*leaves), leaves, weight)


def gathering(draw) -> None:
    """gather_tokens and its gradients on integers: exactly those of the definition."""
    F, dims = integers(draw, 1, 30), integers(draw, 2, 5)
    dim, out_dim = integers(draw, 1, dims - 1), integers(draw, 1, dims - 1)
    shape = [integers(draw, 0, 3), *(integers(draw, 0, 6) for _ in range(dims - 1))]
    shape[dim] = F
    x = torch.randint(-8, 9, shape).to(draw(st.sampled_from(DTYPES)))
    x = laid_out(x, draw(st.sampled_from(LAYOUTS)))
    embedded = out_dim < dims - 1 and draw(st.booleans())
    rows = draw(st.sampled_from([1, max(shape[0], 1)])) if shape[0] else 1
    index, given_ = drawn_index(draw, rows, F, padded=not embedded), {"dim": dim, "out_dim": out_dim}
    inputs = [x]
    if embedded:
        channels = shape[-1 if dim < dims - 1 else -2]
        embed = torch.randint(-8, 9, (index.shape[1], channels)).to(x.dtype)
        inputs.append(on_any_strides(draw, embed))

    def call(function, x, *embed):
        return function(x, index, *embed, **given_)

    expected = call(python_ref.gather_tokens, *inputs)
    ours = call(partial(unmodified, h2ot.gather_tokens), *inputs)
    assert torch.equal(ours, expected)
    assert ours.is_contiguous()
    weight = on_any_strides(draw, torch.randint(-1, 2, expected.shape).to(x.dtype))
    found, wanted = (
        gradients(partial(call, function), inputs, weight)
        for function in (partial(unmodified, h2ot.gather_tokens), python_ref.gather_tokens)
    )
    assert all(map(torch.equal, found, wanted))


def merging(draw) -> None:
    B, N, C, K = integers(draw, 0, 3), integers(draw, 0, 30), integers(draw, 0, 33), integers(draw, 1, 9)
    dtype = draw(st.sampled_from(DTYPES))
    x = laid_out(torch.randn(B, N, C).to(dtype), draw(st.sampled_from(LAYOUTS)))
    labels = on_any_strides(draw, torch.randint(-1, K, (B, N)))
    weight = None
    if draw(st.booleans()):
        weight = on_any_strides(draw, torch.rand(B, N).to(draw(st.sampled_from(DTYPES))))
    exact = python_ref.merge_tokens(x.double(), labels, K, None if weight is None else weight.double())
    ours = unmodified(h2ot.merge_tokens, x, labels, K, weight)
    assert_within(ours, exact, python_ref.merge_tokens(x, labels, K, weight), N)


def recovering(draw) -> None:
    """recover_attention and its gradients."""
    B, K, F = integers(draw, 0, 3), integers(draw, 1, 30), integers(draw, 1, 40)
    H = integers(draw, 1, 4)
    C = H * integers(draw, 1, 17)
    dtype = draw(st.sampled_from(DTYPES))
    rows = draw(st.sampled_from([1, B])) if B else 1
    x = [torch.randn(rows, F, C), torch.randn(B, K, C), torch.randn(B, K, C)]
    x = [laid_out(part.to(dtype), draw(st.sampled_from(LAYOUTS[:-1]))) for part in x]
    weight = on_any_strides(draw, torch.randn(B, F, C).to(dtype))
    scale = draw(st.sampled_from([None, -0.3]))

    def results(function, dtype):
        leaves = [part.detach().to(dtype).requires_grad_() for part in x]
        out = function(*leaves, H, scale=scale)
        return out.detach(), *torch.autograd.grad(out, leaves, weight.to(dtype))

    ours = results(partial(unmodified, h2ot.recover_attention), dtype)
    exact, same = (results(python_ref.recover_attention, precision) for precision in (torch.float64, dtype))
    scales = attention_scales(*x, weight, H, scale)
    for found, wanted, torch_own, largest in zip(ours, exact, same, scales, strict=True):
        assert_within(found, wanted, torch_own, max(B, 1) * K * F, largest)

    if BACKEND == "cpp" and rows == 1 and B:  # the fused tail: the same bits on any strides
        tail = [
            module.requires_grad_(False).to(dtype) for module in (nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, 3))
        ]
        token = laid_out(torch.randn(1, F, C).to(dtype), draw(st.sampled_from(LAYOUTS)))
        ours, plain = (
            unmodified(h2ot.recover_pose, *given_, *tail, H, num_joints=B)
            for given_ in ((token, *x), [part.contiguous() for part in (token, *x)])
        )
        assert torch.equal(ours, plain)
        assert ours.shape == (1, B, F, 3)


def interpolating(draw) -> None:
    B, F = integers(draw, 0, 3), integers(draw, 1, 50)
    index = drawn_index(draw, draw(st.sampled_from([1, max(B, 1)])) if B else 1, F)
    choices = {"mode": ["linear", "nearest"], "align": ["index", "uniform"]}
    options = {name: draw(st.sampled_from(allowed)) for name, allowed in choices.items()}
    trailing = [integers(draw, 0, 5) for _ in range(integers(draw, 0, 3))]
    dtype = draw(st.sampled_from(DTYPES))
    x = laid_out(torch.randn(B, index.shape[1], *trailing).to(dtype), draw(st.sampled_from(LAYOUTS)))
    exact = python_ref.recover_interpolate(x.double(), index, F, **options)
    ours = unmodified(h2ot.recover_interpolate, x, index, F, **options)
    assert_within(ours, exact, python_ref.recover_interpolate(x, index, F, **options), 2)
    weight = on_any_strides(draw, torch.randn(exact.shape).to(dtype))
    (found,) = gradients(lambda leaf: unmodified(h2ot.recover_interpolate, leaf, index, F, **options), [x], weight)
    (of_exact,), (of_torch,) = (
        gradients(lambda leaf: python_ref.recover_interpolate(leaf, index, F, **options), [x.to(wide)], weight.to(wide))
        for wide in (torch.float64, dtype)
    )
    assert_within(found, of_exact, of_torch, F)


@pytest.mark.parametrize(
    "check", [scoring, selecting, attending, gathering, merging, recovering, interpolating], ids=lambda f: f.__name__
)
def test_any_valid_input(check, record_property):
    hunt(check, record_property)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".json"])
def test_any_keypoint_file_is_read_or_refused(suffix, tmp_path, record_property):
    """A good file with bytes replaced, removed and repeated: a clip of finite numbers, or one KeypointError."""
    path, tried = tmp_path / f"clip{suffix}", [0, 0]
    points = np.arange(3 * 17 * 2.0).reshape(3, 17, 2)
    if suffix == ".json":
        people = [{"image_id": n, "keypoints": [1.5, 2, 1] * 17, "score": 0.5} for n in range(3)]
        path.write_text(json.dumps({"images": [{"width": 8, "height": 6}], "annotations": people}))
    elif suffix == ".npy":
        np.save(path, points)
    else:
        np.savez(path, keypoints_2d=points, image_wh=[1000, 800], fps=50)
    good = path.read_bytes()
    place = st.integers(0, len(good) - 1) | st.integers(0, min(len(good) - 1, 200))
    edits = st.lists(st.tuples(place, st.integers(0, 3), st.binary(max_size=6)), max_size=4)

    @settings(max_examples=4 * settings.default.max_examples)
    @given(edits)
    def run(made):
        content = good
        for at, cut, text in made:
            content = content[:at] + text + content[at + cut :]
        path.write_bytes(content)
        try:
            clip = read_clip(path)
        except KeypointError:
            tried[1] += 1
            return
        assert np.isfinite(clip.points).all()
        assert np.isfinite(clip.normalised).all()
        tried[0] += 1

    run()
    assert tried[0] > 0
    assert tried[1] > 0
    record_property("count", f"fuzz {suffix}: {tried[0]} files read, {tried[1]} refused")
