"""Every operation once, forward and backward, small and odd, on every backend that can run: what sanitizers watch.

    python -m tests.every_op [--device cuda] [--guard]

Results are held to python_ref. --guard: guard bands around every CUDA buffer (tests/guard). Exit code 1: a wrong
result or a damaged band.
"""

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import h2ot_kernels as h2ot
import python_ref
from h2ot_kernels import backend


def inputs(many: int) -> dict[str, torch.Tensor]:
    """Arguments by name; "many" has that many tokens (above 512 they are streamed), half of them nearly the same."""
    made = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=made)

    index = torch.stack([torch.randperm(33, generator=made)[:9].sort().values for _ in range(2)])
    return {
        "x": rand(2, 33, 3, 20),
        "index": index,
        "embed": rand(9, 20),
        "mask": torch.rand(2, 33, generator=made) > 0.2,
        "noise": torch.rand(2, 33, generator=made, dtype=torch.float64),
        "labels": torch.randint(-1, 9, (2, 33), generator=made),
        "weight": torch.rand(2, 33, generator=made),
        "heads": rand(2, 4, 33, 16),
        "query": rand(33, 20),
        "kept": rand(6, 9, 20),
        "pose": rand(2, 33, 3, 2),
        "many": torch.cat([rand(1, many // 2, 20), 1 + 1e-4 * rand(1, many - many // 2, 20)], 1),
    }


def pose_arguments(t: dict[str, torch.Tensor]) -> tuple:
    """token, query, key, value, and modules of the weights in t."""
    query, kept = t["query"].detach(), t["kept"].detach()
    proj, norm, head = nn.Linear(20, 20), nn.LayerNorm(20), nn.Linear(20, 3)
    values = {"weight": query[:20], "bias": query[20]}, {"weight": query[21], "bias": query[22]}
    for module, own in zip((proj, norm, head), (*values, {"weight": query[23:26], "bias": query[26, :3]}), strict=True):
        for name, value in own.items():
            # Memory of its own: behind its end stands a fence (tests/fence), not the next one's.
            setattr(module, name, nn.Parameter(value.clone(), requires_grad=False))
    return query, query, kept, kept, proj, norm, head


Call = Callable[..., tuple[torch.Tensor, ...]]


def clusters(module, x: torch.Tensor, **given) -> tuple[torch.Tensor, ...]:
    if module is h2ot:
        return h2ot.cluster_tokens(x, 9, 3, **given)[:2]
    index = module.prune_cluster(x, 9, 3, **given)
    return index, module.assign_clusters(x, index, **given)


def every_seventh(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(0, x.shape[1], 7, device=x.device)[None]


def chain(x: torch.Tensor) -> torch.Tensor:
    """[B, N]: every token's parent is the one before it."""
    return torch.arange(-1, x.shape[1] - 1, device=x.device).repeat(x.shape[0], 1)


def into(module, op: str, *inputs, **given) -> tuple[torch.Tensor]:
    """An operation that writes into a buffer of the caller's."""
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    result = getattr(module, op)(*inputs, **given)
    if module is h2ot:
        result = getattr(module, op)(*inputs, out=torch.full_like(result, float("nan")), **given)
    return (result,)


def calls() -> Iterator[tuple[str, Call]]:
    """(operation, call of (module h2ot_kernels or python_ref, inputs, backend or nothing))."""
    yield "score_tokens", lambda m, t, **b: m.score_tokens(t["x"].detach(), 3, mask=t["mask"], **b)
    yield "score_tokens", lambda m, t, **b: m.score_tokens(t["x"].detach(), noise=t["noise"].detach(), **b)
    yield "score_tokens", lambda m, t, **b: m.score_tokens(t["many"].detach(), **b)
    yield "score_variant", lambda m, t, **b: m.score_tokens(t["x"].detach(), 3, exclude_self=True, scale=2.0, **b)
    yield "prune_cluster", lambda m, t, **b: (m.prune_cluster(t["x"], 9, keep=5, **b),)
    yield "select_tokens", lambda m, t, **b: (m.select_tokens(t["noise"], 9, mask=t["mask"], **b),)
    yield "prune_motion", lambda m, t, **b: (m.prune_motion(t["pose"], 9, **b),)
    yield "prune_attention", lambda m, t, **b: (m.prune_attention(t["heads"], t["heads"], 9, **b),)
    yield "gather_tokens", lambda m, t, **b: (m.gather_tokens(t["x"], t["index"], t["embed"], out_dim=2, **b),)
    yield "cluster_tokens", lambda m, t, **b: clusters(m, t["x"].detach(), mask=t["mask"], **b)
    yield "cluster_tokens", lambda m, t, **b: clusters(m, t["many"].detach(), **b)
    yield "assign_clusters", lambda m, t, **b: (m.assign_clusters(t["x"], t["index"], mask=t["mask"], **b),)
    yield "assign_clusters", lambda m, t, **b: (m.assign_clusters(t["many"], every_seventh(t["many"]), **b),)
    yield "assign_by_parent", lambda m, t, **b: (m.assign_clusters(t["x"], t["index"], parent=chain(t["x"]), **b),)
    yield "merge_tokens", lambda m, t, **b: (m.merge_tokens(t["x"][:, :, 0], t["labels"], 9, t["weight"], **b),)
    yield "recover_attention", lambda m, t, **b: (m.recover_attention(t["query"], t["kept"], t["kept"], 4, **b),)
    yield "recover_tail", lambda m, t, **b: (m.recover_pose(*pose_arguments(t), 4, num_joints=3, **b),)
    yield "recover_interpolate", lambda m, t, **b: (m.recover_interpolate(t["kept"][:2], t["index"], 33, **b),)
    yield "gather_tokens", lambda m, t, **b: into(m, "gather_tokens", t["x"], t["index"], t["embed"], out_dim=2, **b)
    yield "recover_attention", lambda m, t, **b: into(m, "recover_attention", t["query"], t["kept"], t["kept"], 4, **b)
    yield "recover_interpolate", lambda m, t, **b: into(m, "recover_interpolate", t["kept"][:2], t["index"], 33, **b)


def results(call: Call, module, given: dict[str, torch.Tensor], **named) -> list[torch.Tensor]:
    """What the call gives and the gradients of its sum, on the CPU in float64 where it is floating."""
    leaves = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in given.items()}
    out = call(module, leaves, **named)
    total = sum((part * part.detach()).sum() for part in out if part.requires_grad)  # its gradients fill memory
    grads = []
    if isinstance(total, torch.Tensor):
        inputs = [leaf for leaf in leaves.values() if leaf.requires_grad]
        grads = [grad for grad in torch.autograd.grad(total, inputs, allow_unused=True) if grad is not None]
    return [part.detach().cpu().double() if part.is_floating_point() else part.cpu() for part in (*out, *grads)]


def run(device: str, many: int = 600) -> tuple[int, list[str]]:
    """(calls made, what was wrong)."""
    made, wrong = 0, []
    exact = inputs(many)
    there = {name: t.to(device) for name, t in exact.items()}
    double = {name: t.double() if t.is_floating_point() else t for name, t in exact.items()}
    for op, call in calls():
        wanted = results(call, python_ref, double)
        for name in backend.BACKENDS[:-1]:
            if not backend.can_run(op, name, device)[0]:
                continue
            made += 1
            try:
                ours = results(call, h2ot, there, backend=name)
            except Exception as error:  # whatever stops one call is its result: the others are run
                wrong.append(f"{op} on {name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                continue
            same = len(ours) == len(wanted) and all(
                torch.allclose(a.to(b), b, rtol=1e-4, atol=1e-5, equal_nan=True) if b.is_floating_point()
                else torch.equal(a, b)
                for a, b in zip(ours, wanted, strict=True)
            )  # fmt: skip
            if not same:
                wrong.append(f"{op} on {name}")
    return made, wrong


def main(arguments: list[str] | None = None, run: Callable[[str], tuple[int, list[str]]] = run) -> int:
    """run: of this module, or one like it."""
    module = sys.modules[run.__module__]
    parser = argparse.ArgumentParser(description=module.__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--guard", action="store_true", help="guard bands around every CUDA buffer")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if given.guard:
            from . import guard

            library = guard.install(Path(folder))
        made, wrong = run(given.device)
        for line in wrong:
            print(f"WRONG: {line}")
        damaged = 0
        if given.guard:
            gc.collect()
            torch.cuda.synchronize()
            allocated, damaged = guard.counters(library)
            print(f"guard bands: {allocated} buffers, {damaged} damaged")
    print(f"{made} calls on {given.device}, {len(wrong)} wrong")
    return int(bool(wrong) or damaged > 0 or made == 0)


if __name__ == "__main__":
    sys.exit(main())
