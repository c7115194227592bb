"""Wrong input: one table of (call, exception, message), for test_bad_input.py."""

import numpy
import torch
from torch import nn

import h2ot_kernels as h2ot
import h2ot_kernels.onnx

from .test_dropin import BAD as DROPIN
from .test_ftp_pose import BAD as FTP_POSE
from .test_hosts import BAD as HOSTS
from .test_hourglass import BAD as HOURGLASS
from .test_nn import BAD as MODULES

X = torch.randn(2, 9, 4)
INDEX = torch.tensor([[0, 4, 8]])
KEPT = torch.randn(2, 3, 4)
LEAF = torch.randn(2, 3, 4, requires_grad=True)
POSE, HEADS = torch.randn(2, 9, 3, 2), torch.randn(2, 1, 9, 4)
KEEP, PARENT = torch.tensor([0, 9]), torch.full((2, 9), 9)
LONG = torch.zeros(1, 1, 1).expand(1, 2**31, 1)  # one number in memory
COUNTS = numpy.array([3, 10])
LINEAR, NORM, HEAD = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
WIDE, DOUBLE, ELSEWHERE = nn.Linear(4, 8), nn.Linear(4, 4).double(), nn.Linear(4, 4, device="meta")


def tail(proj, token=None, value=None):
    token, value = X[0] if token is None else token, KEPT if value is None else value
    with torch.no_grad():
        return h2ot.recover_pose(token, X[0], KEPT, value, proj, NORM, HEAD, 2, num_joints=1)


BAD = {
    "score rank": (lambda: h2ot.score_tokens(X[0]), ValueError, r"x: got shape \[9, 4\], wanted \[B, N, C\]"),
    "score type": (lambda: h2ot.score_tokens([1.0]), TypeError, "x: got list"),
    "score dtype": (lambda: h2ot.score_tokens(X.long()), TypeError, "x: got dtype int64, wanted float32"),
    "no tokens": (lambda: h2ot.score_tokens(X[:, :0]), ValueError, "x: got shape .* at least one token"),
    "no channels": (lambda: h2ot.score_tokens(X[..., :0]), ValueError, "x: got shape .* channel"),
    "too many tokens": (lambda: h2ot.score_tokens(LONG), ValueError, "x: got 2147483648 .* wanted at most 2147483647"),
    "too many to label": (lambda: h2ot.assign_clusters(LONG, INDEX[:, :1]), ValueError, "x: got 2147483648 tokens"),
    "too many to merge": (lambda: h2ot.merge_tokens(LONG, INDEX, 1), ValueError, "x: got 2147483648 tokens"),
    "k 0": (lambda: h2ot.score_tokens(X, 0), ValueError, "k: got 0, wanted 1 to 9"),
    "k above N": (lambda: h2ot.score_tokens(X, 10), ValueError, "k: got 10, wanted 1 to 9"),
    "k type": (lambda: h2ot.score_tokens(X, 2.0), TypeError, "k: got float, wanted an integer"),
    "k bool": (lambda: h2ot.score_tokens(X, True), TypeError, "k: got bool"),
    "mask shape": (lambda: h2ot.score_tokens(X, mask=torch.ones(2, 8) > 0), ValueError, r"mask: got shape \[2, 8\]"),
    "mask dtype": (lambda: h2ot.score_tokens(X, mask=torch.ones(2, 9)), TypeError, "mask: got dtype float32"),
    "lengths shape": (lambda: h2ot.score_tokens(X, lengths=torch.tensor([3])), ValueError, "lengths: got shape"),
    "noise shape": (lambda: h2ot.score_tokens(X, noise=torch.rand(9)), ValueError, "noise: got shape"),
    "K above N": (lambda: h2ot.prune_cluster(X, 10), ValueError, "num_tokens: got 10, wanted 1 to 9"),
    "K 0": (lambda: h2ot.prune_cluster(X, 0), ValueError, "num_tokens: got 0"),
    "metric": (lambda: h2ot.score_tokens(X, metric="l1"), ValueError, "metric: got 'l1'"),
    "density": (lambda: h2ot.score_tokens(X, density="box"), ValueError, "density: got 'box'"),
    "no cutoff": (
        lambda: h2ot.score_tokens(X, density="gaussian"),
        TypeError,
        "cutoff: got NoneType, wanted a positive number",
    ),
    "cutoff without gaussian": (lambda: h2ot.prune_cluster(X, 3, cutoff=0.1), ValueError, "cutoff: got 0.1"),
    "cutoff 0": (lambda: h2ot.score_tokens(X, density="gaussian", cutoff=0.0), ValueError, "cutoff: got 0.0"),
    "scale": (lambda: h2ot.score_tokens(X, scale=-1.0), ValueError, "scale: got -1.0, wanted a positive number"),
    "scale type": (lambda: h2ot.score_tokens(X, scale="C"), TypeError, "scale: got str"),
    "exclude_self": (lambda: h2ot.score_tokens(X, exclude_self=1), TypeError, "exclude_self: got int, wanted a bool"),
    "k without self": (
        lambda: h2ot.score_tokens(X, 9, exclude_self=True),
        ValueError,
        r"k: got 9, wanted 1 to 8 \(the number of other tokens\)",
    ),
    "length below 0": (lambda: h2ot.score_tokens(X, lengths=[-1, 9]), ValueError, "lengths: got -1, wanted 0 to 9"),
    "length above N": (lambda: h2ot.score_tokens(X, lengths=[3, 20]), ValueError, "lengths: got 20, wanted 0 to 9"),
    "counts of numpy": (lambda: h2ot.prune_cluster(X, COUNTS), ValueError, "num_tokens: got 10, wanted 0 to 9"),
    "explain tensors": (lambda: h2ot.explain("prune_cluster", "cuda"), TypeError, "tensors: got str, wanted tensors"),
    "counts length": (lambda: h2ot.prune_cluster(X, [3]), ValueError, "num_tokens: got 1 numbers, wanted .* 2"),
    "counts value": (lambda: h2ot.prune_cluster(X, [3, 10]), ValueError, "num_tokens: got 10, wanted 0 to 9"),
    "counts type": (lambda: h2ot.select_tokens(X[..., 0], [3, 1.5]), TypeError, "num_tokens: got float"),
    "counts dtype": (lambda: h2ot.prune_cluster(X, torch.ones(2)), TypeError, "num_tokens: got dtype float32"),
    "counts below keep": (lambda: h2ot.prune_cluster(X, [3, 1], keep=[1, 2]), ValueError, "keep: got 2 tokens"),
    "clusters K": (lambda: h2ot.cluster_tokens(X, 10), ValueError, "num_tokens: got 10, wanted 1 to 9"),
    "clusters keep": (lambda: h2ot.cluster_tokens(X, 3, keep=9), IndexError, "keep: got 9, wanted 0 to 8"),
    "clusters keep tensor": (
        lambda: h2ot.cluster_tokens(X, 3, keep=KEEP),
        IndexError,
        "select_tokens: keep holds a value outside its range",
    ),
    "label metric": (lambda: h2ot.assign_clusters(X, INDEX, metric=2), ValueError, "metric: got 2"),
    "parent shape": (
        lambda: h2ot.assign_clusters(X, INDEX, parent=torch.zeros(2, 8).long()),
        ValueError,
        "parent: got shape",
    ),
    "parent dtype": (lambda: h2ot.assign_clusters(X, INDEX, parent=torch.zeros(2, 9)), TypeError, "parent: got dtype"),
    "parent outside": (
        lambda: h2ot.assign_clusters(X, INDEX, parent=PARENT),
        IndexError,
        "assign_clusters: parent holds a value outside its range",
    ),
    "index outside, parent": (
        lambda: h2ot.assign_clusters(X, INDEX + 1, parent=PARENT),
        IndexError,
        "assign_clusters: index holds a value outside its range",
    ),
    "variant elsewhere": (
        lambda: h2ot.score_tokens(X, exclude_self=True, backend="cuda"),
        RuntimeError,
        "score_variant cannot run on cpu",
    ),
    "no kernel": (
        lambda: h2ot.assign_clusters(X, INDEX, parent=torch.zeros(2, 9).long(), backend="triton"),
        RuntimeError,
        "assign_by_parent has no triton kernel|assign_by_parent cannot run on cpu",
    ),
    "keep outside": (lambda: h2ot.prune_cluster(X, 3, keep=9), IndexError, "keep: got 9, wanted 0 to 8"),
    "keep negative": (lambda: h2ot.select_tokens(X[..., 0], 3, keep=[-1]), IndexError, "keep: got -1"),
    "keep too many": (lambda: h2ot.select_tokens(X[..., 0], 2, keep=[1, 2, 3]), ValueError, "keep: got 3 tokens"),
    "keep tensor outside": (
        lambda: h2ot.select_tokens(X[..., 0], 3, keep=KEEP),
        IndexError,
        "select_tokens: keep holds a value outside its range",
    ),
    "keep tensor too many": (
        lambda: h2ot.select_tokens(X[..., 0], 1, keep=torch.tensor([0, 1])),
        IndexError,
        "select_tokens: keep names more tokens than num_tokens",
    ),
    "keep tensor of none": (
        lambda: h2ot.prune_cluster(X, [0, 3], keep=torch.tensor([1])),
        IndexError,
        r"keep: got shape \[1, 1\], wanted none",
    ),
    "cluster keep": (lambda: h2ot.prune_cluster(X, 3, keep=KEEP), IndexError, "select_tokens: keep holds"),
    "motion keep": (lambda: h2ot.prune_motion(POSE, 3, keep=KEEP), IndexError, "select_tokens: keep holds"),
    "attention scale": (lambda: h2ot.prune_attention(HEADS, HEADS, 3, scale="a"), TypeError, "scale: got str"),
    "attention scale list": (
        lambda: h2ot.recover_attention(X[0], KEPT, KEPT, 2, scale=[1]),
        TypeError,
        "scale: got list, wanted a number",
    ),
    "attention scale nan": (
        lambda: h2ot.prune_attention(HEADS, HEADS, 3, scale=float("nan")),
        ValueError,
        "scale: got nan, wanted a finite number",
    ),
    "attention keep": (
        lambda: h2ot.prune_attention(HEADS, HEADS, 3, keep=KEEP),
        IndexError,
        "select_tokens: keep holds",
    ),
    "keep type": (lambda: h2ot.select_tokens(X[..., 0], 3, keep="centre"), TypeError, "keep: got str"),
    "score of rank 3": (lambda: h2ot.select_tokens(X, 3), ValueError, "score: got shape"),
    "sample K": (lambda: h2ot.prune_sample(9, 10), ValueError, "num_tokens: got 10"),
    "sample keep": (lambda: h2ot.prune_sample(9, 3, keep=9), IndexError, "keep: got 9"),
    "pose rank": (lambda: h2ot.prune_motion(X, 3), ValueError, "pose: got shape"),
    "key shape": (
        lambda: h2ot.prune_attention(X[None], X[None, :, :8], 3),
        ValueError,
        r"key: got shape \[1, 2, 8, 4\], wanted the shape of query",
    ),
    "index outside": (
        lambda: h2ot.gather_tokens(X, INDEX + 1),
        IndexError,
        "gather_tokens: index holds a value outside",
    ),
    "index dtype": (lambda: h2ot.gather_tokens(X, INDEX.int()), TypeError, "index: got dtype int32, wanted int64"),
    "index rows": (lambda: h2ot.gather_tokens(X, INDEX.expand(3, -1)), ValueError, "index: got shape"),
    "index empty": (lambda: h2ot.gather_tokens(X, INDEX[:, :0]), ValueError, "index: got shape"),
    "dim batch": (lambda: h2ot.gather_tokens(X, INDEX, dim=0), ValueError, "dim: got 0, the batch axis"),
    "dim outside": (lambda: h2ot.gather_tokens(X, INDEX, dim=3), ValueError, "dim: got 3"),
    "embed shape": (lambda: h2ot.gather_tokens(X, INDEX, X[:1]), ValueError, "pos_embed: got shape"),
    "labels shape": (lambda: h2ot.merge_tokens(X, INDEX, 3), ValueError, "labels: got shape"),
    "label outside": (
        lambda: h2ot.merge_tokens(X, torch.full((2, 9), 3), 3),
        IndexError,
        "merge_tokens: labels holds a value outside its range",
    ),
    "clusters 0": (lambda: h2ot.merge_tokens(X, torch.zeros(2, 9).long(), 0), ValueError, "num_clusters: got 0"),
    "weight shape": (
        lambda: h2ot.merge_tokens(X, torch.zeros(2, 9).long(), 3, torch.ones(9)),
        ValueError,
        "weight: got shape",
    ),
    "heads": (
        lambda: h2ot.recover_attention(X[0], KEPT, KEPT, 3),
        ValueError,
        "num_heads: got 3, wanted a divisor of C",
    ),
    "query width": (lambda: h2ot.recover_attention(X[0, :, :2], KEPT, KEPT, 1), ValueError, "query: got shape"),
    "value shape": (lambda: h2ot.recover_attention(X[0], KEPT, X, 2), ValueError, "value: got shape"),
    "mixed dtypes": (lambda: h2ot.recover_attention(X[0].double(), KEPT, KEPT, 2), TypeError, "query: got dtype"),
    "joints": (
        lambda: h2ot.recover_pose(X[0], X[0], KEPT, KEPT, LINEAR, NORM, HEAD, 2),
        (ValueError, RuntimeError),
        "num_joints: got 17|inference",
    ),
    "projected width": (lambda: tail(WIDE), ValueError, "proj: got 4 to 8 features, wanted C = 4 to 4"),
    "projection dtype": (lambda: tail(DOUBLE), TypeError, "proj.weight: got dtype torch.float64"),
    "projection elsewhere": (lambda: tail(ELSEWHERE), ValueError, "proj.weight: got device meta"),
    "no tensor where gradients are recorded": (
        lambda: h2ot.recover_pose(X[0], [1.0], KEPT, KEPT, LINEAR, NORM, HEAD, 2, num_joints=1),
        TypeError,
        "query: got list, wanted a tensor",
    ),
    "not a module": (lambda: h2ot.recover_pose(X[0], X[0], KEPT, KEPT, 1, NORM, HEAD, 2), TypeError, "proj: got int"),
    "mode": (lambda: h2ot.recover_interpolate(KEPT, INDEX, 9, mode="cubic"), ValueError, "mode: got 'cubic'"),
    "align": (lambda: h2ot.recover_interpolate(KEPT, INDEX, 9, align="left"), ValueError, "align: got 'left'"),
    "frames": (lambda: h2ot.recover_interpolate(KEPT, INDEX, 2), ValueError, "num_frames: got 2, wanted 3 or more"),
    "no index": (lambda: h2ot.recover_interpolate(KEPT, None, 9), TypeError, "index: got NoneType"),
    "frame outside": (lambda: h2ot.recover_interpolate(KEPT, INDEX, 8), IndexError, "recover_interpolate: index holds"),
    "not ascending": (
        lambda: h2ot.recover_interpolate(KEPT, INDEX.flip(1), 9),
        IndexError,
        "recover_interpolate: index is not strictly ascending",
    ),
    "out type": (lambda: h2ot.gather_tokens(X, INDEX, out=[]), TypeError, "out: got list, wanted a tensor"),
    "out shape": (
        lambda: h2ot.gather_tokens(X, INDEX, out_dim=2, out=torch.empty(2, 3, 4)),
        ValueError,
        r"out: got shape \[2, 3, 4\], wanted the shape of the result = \[2, 4, 3\]",
    ),
    "out dtype": (
        lambda: h2ot.recover_attention(X[0], KEPT, KEPT, 2, out=torch.empty(2, 9, 4).double()),
        TypeError,
        "out: got dtype torch.float64, wanted torch.float32, that of value",
    ),
    "out strides": (
        lambda: h2ot.recover_interpolate(KEPT, INDEX, 9, out=torch.empty(2, 4, 9).mT),
        ValueError,
        r"out: got strides \[36, 1, 9\], wanted a contiguous tensor",
    ),
    "out elsewhere": (
        lambda: h2ot.gather_tokens(X, INDEX, out=torch.empty(2, 3, 4, device="meta")),
        ValueError,
        "out: got device meta, wanted cpu, that of x",
    ),
    "out, gradient": (
        lambda: h2ot.recover_interpolate(LEAF, INDEX, 9, out=torch.empty(2, 9, 4)),
        RuntimeError,
        "out= does not record gradients",
    ),
    "out with gradient": (
        lambda: h2ot.gather_tokens(X, INDEX, out=LEAF),
        RuntimeError,
        "out= does not record gradients",
    ),
    "out, index outside": (
        lambda: h2ot.gather_tokens(X, INDEX + 1, out=torch.empty(2, 3, 4)),
        IndexError,
        "gather_tokens: index holds a value outside",
    ),
    "device mix": (lambda: h2ot.gather_tokens(X, INDEX.to("meta")), ValueError, "index: got device meta, wanted cpu"),
    "backend": (lambda: h2ot.gather_tokens(X, INDEX, backend="fast"), ValueError, "backend: got 'fast'"),
    "backend elsewhere": (lambda: h2ot.gather_tokens(X, INDEX, backend="cuda"), RuntimeError, "tensors are on cpu"),
    "backend asked for": (lambda: h2ot.use_backend("fast").__enter__(), ValueError, "backend: got 'fast'"),
    "device of an op": (lambda: h2ot.can_run("gather_tokens", "cpp", X), TypeError, "device: got (Fake)?Tensor"),
    "backend of an op": (lambda: h2ot.can_run("gather_tokens", "fast", "cpu"), ValueError, "backend: got 'fast'"),
    "op": (lambda: h2ot.explain("sort"), ValueError, "op: got 'sort', wanted one of assign_clusters"),
    "host": (lambda: h2ot.hosts.build("mix"), ValueError, "name: got 'mix', wanted one of mixste"),
    "no host": (lambda: h2ot.hosts.count_flops(LINEAR), TypeError, "model: got Linear, wanted a host"),
    "convention": (lambda: h2ot.hosts.count_flops(LINEAR, "all"), ValueError, "convention: got 'all'"),
    "checkpoint": (lambda: h2ot.hosts.load_checkpoint(LINEAR, "none.pth"), FileNotFoundError, "none.pth"),
    "blocks": (lambda: h2ot.hourglass.wrap(LINEAR, 9, {1: 3}), TypeError, "blocks: got Linear, wanted ModuleList"),
    "patched": (lambda: h2ot.dropin.patch(3), TypeError, "target: got int, wanted an nn.Module"),
    "kernels": (lambda: h2ot.dropin.patch(LINEAR, fast=True), TypeError, "patch: got fast, wanted some of cluster"),
    "exported batch": (
        lambda: h2ot_kernels.onnx.export(LINEAR, (X[:1],), "none.onnx"),
        ValueError,
        r"inputs: got shape \[1, 9, 4\] as number 0, wanted a batch of 2 or more",
    ),
}
BAD |= {f"drop-in: {name}": row for name, row in DROPIN.items()}
BAD |= {f"module: {name}": row for name, row in MODULES.items()}
BAD |= {f"hourglass: {name}": row for name, row in HOURGLASS.items()}
COMPILED = list(BAD)  # what is checked when a model is made is checked outside of what is compiled
BAD |= {f"host: {name}": row for name, row in HOSTS.items()}
BAD |= {f"FTP-Pose: {name}": row for name, row in FTP_POSE.items()}
# What only the contents of a tensor tell, which fake tensors do not have.
CONTENTS = {
    *("clusters keep tensor", "parent outside", "keep tensor outside", "keep tensor too many", "index outside"),
    *("label outside", "frame outside", "not ascending", "out, index outside"),
    *("drop-in: point", "drop-in: points", "drop-in: label outside", "drop-in: idx_token outside"),
    *("index outside, parent", "cluster keep", "motion keep", "attention keep"),
    *("hourglass: index range", "hourglass: index of a pruned frame"),
}
