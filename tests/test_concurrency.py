"""Many callers: threads, DataLoader workers, two training processes; 10 000 calls; errors in parallel regions."""

import ctypes
import gc
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, Dataset

import h2ot_kernels as h2ot

from .host_cases import NO_DROP, inputs, poses, small
from .test_determinism import CALLS, same, threads

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
asks_malloc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this C library does not say how much memory is in use"
)
WHOLE = slice(0, 3)


@pytest.mark.parametrize("inner", [1, 2])
def test_16_python_threads_of_mixed_calls_equal_serial(inner):
    """inner: the threads of each call's own parallel region."""
    expected = {name: call(WHOLE) for name, call in CALLS.items()}

    def worker(seed):
        names = list(CALLS)
        random.Random(seed).shuffle(names)
        return [name for name in names if not same(CALLS[name](WHOLE), expected[name])]

    with threads(inner), ThreadPoolExecutor(16) as pool:
        assert not [name for wrong in pool.map(worker, range(16)) for name in wrong]


@pytest.mark.parametrize("name", CALLS)
def test_the_first_call_of_a_thread_may_have_no_samples(name):
    with ThreadPoolExecutor(1) as fresh:
        results = fresh.submit(CALLS[name], slice(0, 0)).result()
    assert all(part.shape[0] == 0 for part in results if part.dim() > 1)


class Pruned(Dataset):
    """Clips of which a worker keeps nine frames."""

    def __len__(self):
        return 6

    def __getitem__(self, n):
        x = torch.randn(1, 33, 3, 8, generator=torch.Generator().manual_seed(n))
        return h2ot.gather_tokens(x, h2ot.prune_cluster(x, 9))[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start):
    expected = torch.stack([Pruned()[n] for n in range(6)])  # the parent has used its threads before it forks
    loader = DataLoader(Pruned(), batch_size=3, num_workers=2 if start == "fork" else 1, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), expected)


def training_step(rank: int = 0, processes: int = 1, rendezvous: str = "", result: str = "") -> dict | None:
    """One step of SGD on this process's share of a batch; the weights after it, from rank 0."""
    torch.set_num_threads(1)
    model = small("hot_mixste", **NO_DROP["mixste"])
    x, _ = inputs()
    x = torch.cat([x, x.flip(0) * 0.5])
    goal = torch.linspace(-1, 1, x.shape[0] * 27 * 17 * 3, dtype=x.dtype).reshape(x.shape[0], 27, 17, 3)
    share = slice(rank * len(x) // processes, (rank + 1) * len(x) // processes)
    trained = model
    if processes > 1:
        distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
        trained = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (poses(trained(x[share])) - goal[share]).square().mean().backward()
    optimizer.step()
    if processes == 1:
        return model.state_dict()
    if rank == 0:
        torch.save(model.state_dict(), result)
    distributed.destroy_process_group()
    return None


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
def test_a_data_parallel_step_of_two_processes_equals_one(tmp_path):
    arguments = (2, f"file://{tmp_path / 'rendezvous'}", str(tmp_path / "weights.pth"))
    # Children of a fork server leave by _exit. Python's own exit races with gloo's threads, which may still let go of
    # Python objects then: a plain Linear under DDP, spawned, dies so in every sixth run.
    torch.multiprocessing.start_processes(training_step, arguments, nprocs=2, start_method="forkserver")
    with threads(1):
        alone, before = training_step(), small("hot_mixste", **NO_DROP["mixste"]).state_dict()
    together = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert any((alone[name] != before[name]).any() for name in alone)
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-11, atol=1e-13, msg=lambda m: f"{name}: {m}")


class MallocInfo(ctypes.Structure):
    """struct mallinfo2 of the C library: what malloc has handed out, in bytes, over all arenas."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    ))  # fmt: skip


def in_use() -> int:
    """Bytes that malloc has handed out and nobody has freed, and 64 for each small object of Python."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallocInfo
    now = mallinfo()
    return now.uordblks + now.hblkhd + 64 * sys.getallocatedblocks()


def growth(call, times: int) -> int:
    """By how many bytes memory grows over calls, after as many as fill every cache."""
    for _ in range(times // 10):
        call()
    gc.collect()
    before = in_use()
    for _ in range(times):
        call()
    gc.collect()
    return in_use() - before


@asks_malloc
def test_memory_is_flat_over_10_000_calls():
    """Forward, backward, and calls that raise, in turn."""
    x = torch.randn(2, 12, 4)
    index, outside = torch.tensor([[0, 4, 8]]), torch.tensor([[0, 4, 12]])
    labels = torch.randint(-1, 3, (2, 12))
    leaf = x.clone().requires_grad_()
    tail = [module.requires_grad_(False) for module in (nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))]

    def refused():
        with pytest.raises(IndexError):
            h2ot.gather_tokens(x, outside)

    calls = [
        lambda: h2ot.score_tokens(x, 3, mask=x[..., 0] > -1),
        lambda: h2ot.prune_cluster(x, 3, keep=5),
        lambda: h2ot.assign_clusters(x, index),
        lambda: h2ot.prune_attention(x[:, None], x[:, None], 3),
        lambda: h2ot.gather_tokens(leaf, index).sum().backward(),
        lambda: h2ot.merge_tokens(leaf, labels, 3).sum().backward(),
        lambda: h2ot.recover_attention(x[0], leaf, leaf, 2).sum().backward(),
        lambda: h2ot.recover_interpolate(leaf[:, :3], index, 12).sum().backward(),
        refused,
        lambda: h2ot.prune_motion(x[..., None], 3),
        lambda: h2ot.cluster_tokens(x, 3, keep=5),
        lambda: h2ot.recover_pose(x[0], x[0], x, x, *tail, 2, num_joints=1),
    ]
    turn = iter(range(10**9))
    with threads(1):
        assert growth(lambda: calls[next(turn) % len(calls)](), 10_000) < 200_000


@asks_malloc
def test_all_threads_give_large_scratch_back():
    """Scratch of labels: 64 bytes a centre in each thread, of which none may stay."""
    N, others = 5 * 2**18, 32
    x, index = torch.zeros(1, N, 1), torch.arange(N - others)[None]
    with threads(2):
        assert growth(lambda: h2ot.assign_clusters(x, index), 1) < 80e6
        assert growth(lambda: h2ot.assign_clusters(x.expand(2, -1, -1), index), 1) < 80e6


@asks_malloc
def test_the_measure_of_memory_sees_a_leak():
    """Negative control: 40 bytes a call."""
    kept = []
    assert growth(lambda: kept.append(torch.empty(10)), 10_000) > 400_000


WRONG = {
    "gather_tokens": lambda x, bad: h2ot.gather_tokens(x, bad),
    "assign_clusters": lambda x, bad: h2ot.assign_clusters(x, bad),
    "merge_tokens": lambda x, bad: h2ot.merge_tokens(x, bad[:, 1:].expand(-1, 64) // 41, 9),
    "select_tokens": lambda x, bad: h2ot.select_tokens(x[..., 0], 9, keep=bad),
    "recover_interpolate": lambda x, bad: h2ot.recover_interpolate(x[:, :2], bad, 64),
    "descending": lambda x, bad: h2ot.recover_interpolate(x[:, :2], bad * 0, 64),
    "too many": lambda x, bad: h2ot.select_tokens(x[..., 0], 1, keep=bad % 64),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("sample", [0, 63])
def test_an_error_inside_a_parallel_region_is_a_python_error(name, sample):
    """Whichever thread meets it; the next call is right."""
    x, index = torch.randn(64, 64, 16), torch.tensor([[3, 40]]).repeat(64, 1)
    bad = index.clone()
    bad[sample, 1] = 64 * 10**6 + 1
    good = h2ot.gather_tokens(x, index)
    with threads(4):
        for _ in range(3):
            with pytest.raises(IndexError):
                WRONG[name](x, bad)
        assert torch.equal(h2ot.gather_tokens(x, index), good)


NO_MEMORY = """
import resource, torch
import h2ot_kernels as h2ot
x = torch.randn(1, 30000, 256)
h2ot.score_tokens(x[:, :9])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))
try:
    h2ot.score_tokens(x)
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
print(h2ot.prune_cluster(x[:, :9], 9).tolist())
"""


@linux_only
def test_no_memory_for_scratch_is_a_python_error():
    done = subprocess.run([sys.executable, "-c", NO_MEMORY], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert "score_tokens: no memory for the kernel's scratch" in first
    assert second == str([list(range(9))])
