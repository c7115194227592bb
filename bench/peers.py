"""Other libraries that do an operation, or its first stage only: checked, then timed beside ours where installed.

"stage 1 only": the k nearest neighbours, from which density follows; nothing is ranked, compared or selected.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import python_ref
from h2ot_kernels.comparison import Comparison

STAGE_1 = "stage 1 only"
SCORING = ("score_tokens", "prune_cluster", "cluster_tokens")


@dataclass(frozen=True)
class Peer:
    """neighbours(x, k) makes a call -> squared distances [B, N, k]; nearest(x, centres) one -> labels [B, N]."""

    name: str
    package: str
    module: str
    devices: tuple[str, ...]
    neighbours: Callable | None = None
    nearest: Callable | None = None

    def why_not(self, device: torch.device) -> str | None:
        """None where it can run on device, else the reason."""
        if device.type not in self.devices:
            return f"runs on {', '.join(self.devices)} only"
        return None if importlib.util.find_spec(self.module) else f"{self.package} is not installed"


def versions(device: torch.device) -> dict[str, str]:
    """Of the peers that can run on device."""
    return {peer.name: importlib.metadata.version(peer.package) for peer in PEERS if peer.why_not(device) is None}


def rivals(comparison: Comparison, device: torch.device) -> tuple[dict[str, Callable], dict[str, str]]:
    """(label -> call, label -> why it is not timed) of the peers that do something of this operation."""
    ready, absent = {}, {}
    if comparison.op not in (*SCORING, "assign_clusters"):
        return ready, absent
    scoring, x = comparison.op in SCORING, comparison.arguments[0]
    among = x if scoring else python_ref.gather_tokens(x, comparison.arguments[1])
    arguments = (x, comparison.shape["k"]) if scoring else (x, among)
    squared = functools.cache(lambda: python_ref.squared_distances(x[:1].double(), among[:1].double()))
    for peer in PEERS:
        make = peer.neighbours if scoring else peer.nearest
        if make is None:
            continue
        label = f"{peer.name} ({STAGE_1})" if scoring else peer.name
        reason = peer.why_not(device)
        if reason is None:
            call = make(*arguments)
            found, oracle, bound = torch.as_tensor(call()[:1]), squared(), _bound(x)
            if _right_distances(found, oracle, arguments[1], bound) if scoring else _right_labels(found, oracle, bound):
                ready[label] = call
                continue
            reason = "wrong, not timed"
        absent[label] = reason
    return ready, absent


def _bound(x: Tensor) -> float:
    """Products of float32 tokens that are not centred: their rounding, on the scale of the squared norms."""
    return 4 * torch.finfo(torch.float32).eps * x.shape[-1] ** 0.5 * x.double().square().sum(-1).max().item()


def _right_distances(found: Tensor, squared: Tensor, k: int, bound: float) -> bool:
    nearest = squared.topk(k, largest=False).values
    return found.shape == nearest.shape and bool((found.to(nearest).sort(-1).values - nearest).abs().max() <= bound)


def _right_labels(found: Tensor, squared: Tensor, bound: float) -> bool:
    chosen = squared.gather(-1, found.to(squared.device).long()[..., None])[..., 0]
    return bool((chosen - squared.amin(-1)).max() <= bound)


def _sklearn_neighbours(x, k):
    from sklearn.neighbors import NearestNeighbors

    samples = x.numpy()

    def search(sample):
        return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(sample).kneighbors(sample)[0]

    return lambda: torch.stack([torch.from_numpy(search(sample)).square() for sample in samples])


def _sklearn_nearest(x, centres):
    from sklearn.metrics import pairwise_distances_argmin

    pairs = list(zip(x.numpy(), centres.numpy(), strict=True))
    return lambda: torch.stack([torch.from_numpy(pairwise_distances_argmin(*pair)) for pair in pairs])


def _faiss_search(x, centres, k):
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    pairs = list(zip(x.numpy(), centres.numpy(), strict=True))

    def call():
        found = []
        for sample, among in pairs:
            index = faiss.IndexFlatL2(sample.shape[1])
            index.add(among)
            found.append(index.search(sample, k))
        return tuple(torch.stack([torch.from_numpy(part) for part in parts]) for parts in zip(*found, strict=True))

    return call


def _faiss_neighbours(x, k):
    search = _faiss_search(x, x, k)
    return lambda: search()[0]


def _faiss_nearest(x, centres):
    search = _faiss_search(x, centres, 1)
    return lambda: search()[1][..., 0]


def _keops_neighbours(x, k):
    from pykeops.torch import LazyTensor

    rows, columns = LazyTensor(x[:, :, None, :]), LazyTensor(x[:, None, :, :])
    return lambda: ((rows - columns) ** 2).sum(-1).Kmin(k, dim=2)


def _cuvs_neighbours(x, k):
    from cuvs.neighbors import brute_force

    def call():
        found = [brute_force.search(brute_force.build(sample), sample, k)[0] for sample in x]
        return torch.stack([torch.as_tensor(distances, device=x.device) for distances in found])

    return call


def _flash_kmeans_nearest(x, centres):
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    return lambda: euclid_assign_triton(x, centres, x.float().square().sum(-1))


# cuVS has not been run, pykeops on a CPU only, flash-kmeans in Triton's interpreter only. What is wrong is refused.
PEERS = (
    Peer("scikit-learn", "scikit-learn", "sklearn", ("cpu",), _sklearn_neighbours, _sklearn_nearest),
    Peer("faiss-cpu", "faiss-cpu", "faiss", ("cpu",), _faiss_neighbours, _faiss_nearest),
    Peer("pykeops", "pykeops", "pykeops", ("cpu", "cuda"), _keops_neighbours),
    Peer("cuVS", "cuvs-cu13", "cuvs", ("cuda",), _cuvs_neighbours),
    Peer("flash-kmeans", "flash-kmeans", "flash_kmeans", ("cuda",), nearest=_flash_kmeans_nearest),
)
