"""Repeated launches (h2ot_kernels/triton/repeated.py) against Triton's own way, without a GPU."""

import copy
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import jit

from h2ot_kernels.triton import common, repeated

from . import aot_samples

pytestmark = pytest.mark.skipif(not repeated.TESTED, reason="only with the Triton that was tested")
LARGE = (2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32 + 1, 2**63 - 1, 2**63, 2**63 + 16, 2**64 - 1)
INTEGERS = (0, 1, 2, 16, 17, -1, -16, *LARGE)


def copy_kernel(x, out, count, scale: tl.float64, sizes, BLOCK: tl.constexpr, KIND: tl.constexpr = None):
    pass


class Compiled:
    """A compiled kernel that notes what its launcher gets."""

    def __init__(self, calls: list):
        self.calls, self.function, self.packed_metadata = calls, object(), object()

    def launch_metadata(self, grid, stream, *arguments):
        return "metadata"

    def run(self, *arguments):
        self.calls.append((self, arguments))


@pytest.fixture
def made(monkeypatch):
    """A kernel of Triton's own JITFunction on a made-up GPU: the calls of launchers, how many went Triton's way."""
    made = SimpleNamespace(calls=[], ordinary=0, stream=7, driver=None)
    target = GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(
        launcher_cls=repeated.CudaLauncher,
        get_current_target=lambda: target,
        get_current_device=lambda: made.device,
        get_current_stream=lambda device: (made.stream, device),
    )
    made.device, made.driver = 0, driver
    made.kernel = jit.JITFunction(copy_kernel)

    def compiled(kernel, key, signature, device, constants, options, attributes, warmup):
        return kernel.device_caches[device][0].setdefault(key, Compiled(made.calls))

    def run(kernel, *arguments, **named):
        made.ordinary += 1
        return original(kernel, *arguments, **named)

    original = repeated._RUN  # with H2OT_KERNELS_PTX it is not JITFunction's
    monkeypatch.setattr(jit.JITFunction, "_do_compile", compiled)
    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(repeated, "_RUN", run)
    monkeypatch.setattr(repeated, "_direct", True)
    monkeypatch.setattr(repeated, "_kept", {})
    before = repeated.driver._active
    repeated.driver.set_active(driver)
    yield made
    repeated.driver.set_active(before)


def given(**changed) -> tuple:
    ordinary = {"x": torch.zeros(64), "out": torch.zeros(64), "count": 2, "scale": 0.5, "sizes": (3, 5)}
    return tuple((ordinary | changed).values())


def launch(made, arguments: tuple, grid=(3,), **constants) -> tuple:
    """What the launcher gets, and whether Triton's own way was gone."""
    before = made.ordinary
    repeated.launch(made.kernel, grid, made.device, arguments, {"BLOCK": 64, "num_warps": 4} | constants)
    return *made.calls[-1], made.ordinary > before


def same(first: tuple, second: tuple) -> bool:
    return len(first) == len(second) and all(a is b or a == b for a, b in zip(first, second, strict=True))


def test_a_repeated_launch_gives_the_launcher_what_triton_gives_it(made, monkeypatch):
    launch(made, given())
    again = given(x=torch.ones(64), count=2**20 + 2, scale=7.0, sizes=(5, 7))
    for grid, stream in (((9,), 7), ((9, 2), 8), ((1, 2, 3), 9)):
        made.stream = stream
        compiled, direct, ordinary = launch(made, again, grid)
        assert not ordinary
        monkeypatch.setattr(repeated, "_direct", False)
        wanted_compiled, wanted, ordinary = launch(made, again, grid)
        monkeypatch.setattr(repeated, "_direct", True)
        assert ordinary
        assert compiled is wanted_compiled
        # Of Triton's own metadata and hooks, the hooks are empty chains: None says the same.
        assert wanted[6] == "metadata"
        assert not wanted[7].calls
        assert not wanted[8].calls
        assert direct[6:9] == (None, None, None)
        assert same(direct[:6], wanted[:6])
        assert same(direct[9:], wanted[9:])
        assert direct[3] == (stream, 0)
        assert direct[-2:] == (64, None)


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.zeros(65)[1:]},
        {"x": torch.zeros(64, dtype=torch.float16)},
        {"x": None},
        *({"count": count} for count in (1, 16, 2**31, 2**31 + 1, 2**63, 2**63 + 1, True, 0.5)),
        {"scale": 1},
        {"sizes": (1, 5)},
        {"sizes": (3, 16)},
        {"sizes": (3,)},
        {"sizes": (3, (5,))},
    ],
)
def test_another_class_of_an_argument_is_another_form(made, changed):
    first, *_ = launch(made, given())
    assert not launch(made, given())[2]
    _, _, ordinary = launch(made, given(**changed))
    assert ordinary
    arguments = given(**changed)
    compiled, passed, ordinary = launch(made, arguments)
    assert not ordinary
    assert same(passed[9:], (*arguments, 64, None))
    assert (compiled is first) == ("scale" in changed)  # declared float64: one kernel, whatever is passed


@pytest.mark.parametrize("constants", [{"BLOCK": 32}, {"num_warps": 8}, {"KIND": 0}, {"KIND": True}, {"KIND": tl.int8}])
def test_other_constants_and_devices_are_other_forms(made, constants):
    launch(made, given())
    assert launch(made, given(), **constants)[2]
    assert not launch(made, given(), **constants)[2]
    made.device = 1
    assert launch(made, given())[2]
    assert launch(made, given())[1][3] == (7, 1)


def test_a_constant_is_told_from_its_equal_of_another_type(made):
    launch(made, given(), KIND=1)
    assert launch(made, given(), KIND=True)[2]
    assert launch(made, given(), KIND=1.0)[2]


def test_what_would_see_or_change_a_launch_takes_the_ordinary_way(made, monkeypatch):
    launch(made, given())
    assert not launch(made, given())[2]
    hooks = []
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hooks.append)
        assert launch(made, given())[2]
        chain.remove(hooks.append)
        assert not launch(made, given())[2]
    for place, name, value in (
        (knobs.runtime, "launch_enter_hook", print),
        (knobs.runtime, "debug", True),
        (knobs.runtime, "add_stages_inspection_hook", lambda *given: ("key", "hash")),
        (knobs.compilation, "instrumentation_mode", "consan"),
        (made.kernel, "debug", True),
        (made.kernel, "pre_run_hooks", [lambda *given, **named: None]),
        (made.driver, "launcher_cls", object),
        (repeated, "_RUN", None),
        (repeated, "_direct", False),
    ):
        with monkeypatch.context() as context:
            context.setattr(place, name, value)
            assert launch(made, given())[2], name
        assert not launch(made, given())[2], name


def test_a_global_that_has_changed_is_left_to_triton(made):
    names = {"SIZE": tl.constexpr(4)}
    made.kernel.cache_key  # noqa: B018 - it looks for the globals
    made.kernel.used_global_vals = {("SIZE", id(names)): (copy.deepcopy(names["SIZE"]), names)}
    launch(made, given())
    assert not launch(made, given())[2]
    names["SIZE"] = tl.constexpr(5)
    with pytest.raises(RuntimeError, match="SIZE has changed"):
        launch(made, given())


def test_what_is_not_known_is_not_kept(made):
    class Own(torch.Tensor):
        pass

    for arguments, constants in (
        (given(x=torch.zeros(64).as_subclass(Own)), {}),
        ((*given(), 64), {}),  # a constant among the arguments
        (given()[:4], {"sizes": (3, 5)}),  # an argument among the constants
    ):
        for _ in range(2):
            before = made.ordinary
            constants = {"num_warps": 4} | constants | ({} if len(arguments) == 6 else {"BLOCK": 64})
            repeated.launch(made.kernel, (1,), 0, arguments, constants)
            assert made.ordinary == before + 1
    with pytest.raises(TypeError):
        launch(made, given(), BLOCK=[1])  # Triton's own: no hash
    assert repeated.form_of(made.kernel, 0, given(count=2**64), {}) is None
    assert not repeated._kept


def test_no_more_forms_are_kept_than_said(made, monkeypatch):
    monkeypatch.setattr(repeated, "MOST", 3)
    for block in range(10):
        launch(made, given(), BLOCK=block)
        assert 1 <= len(repeated._kept) <= 3
    assert not launch(made, given(), BLOCK=9)[2]


def specialised(binders: dict, kernel, arguments: tuple, constants: dict) -> str:
    """All that Triton makes the key of its own cache from."""
    if kernel not in binders:
        own = jit.JITFunction(kernel.fn)
        binders[kernel] = jit.create_function_from_signature(own.signature, own.params, CUDABackend)
    _, specialization, options = binders[kernel](*arguments, **constants)
    return str(specialization) + str(options)


def variants(arguments: tuple):
    """The arguments with one after another in every class."""
    wide = torch.zeros(64, dtype=torch.uint8)
    yield arguments
    for place, value in enumerate(arguments):
        others = [None, True, 0.5, 1.0, *INTEGERS, *((n, 16) for n in INTEGERS)]
        if isinstance(value, torch.Tensor):
            real = [wide[at : at + 8].view(kind) for kind in (value.dtype, torch.int32) for at in (0, 8, 16, 32)]
            others = [*real, None, torch.nn.Parameter(torch.zeros(4, dtype=torch.float32))]
        for other in others:
            yield *arguments[:place], other, *arguments[place + 1 :]


def test_equal_forms_are_equal_to_triton():
    """Over every kernel of the project: as the samples call it, and with each argument of every class."""
    with common.record() as launches:
        for call in itertools.chain(aot_samples.calls(), aot_samples.calls_of_ones()):
            call()
    binders, found, kernels, pairs = {}, {}, set(), 0
    for one in launches:
        again = variants(one.arguments) if one.kernel not in kernels else (one.arguments,)
        kernels.add(one.kernel)
        for arguments in again:
            form = repeated.form_of(one.kernel, 0, arguments, one.constants)
            assert form is not None
            theirs = specialised(binders, one.kernel, arguments, one.constants)
            pairs += form in found
            assert found.setdefault(form, theirs) == theirs
    assert len(kernels) >= 20
    assert len(found) > 1000
    assert pairs > 1000


def test_integers_of_equal_class_are_equal_to_triton():
    found = {}
    for value in (*INTEGERS, *(n + d for n in LARGE for d in (-16, -1, 1, 15) if n + d < 2**64)):
        classes = []
        assert repeated._classify((value,), classes.append)
        theirs = jit.native_specialize_impl(CUDABackend, value, False, True, True)
        assert found.setdefault(tuple(classes), theirs) == theirs
    assert len(set(found.values())) == len(found) == 7


def test_the_switch():
    for value, wanted in (("ordinary", "False"), ("", "True")):
        done = subprocess.run(
            [sys.executable, "-c", "from h2ot_kernels.triton import repeated; print(repeated._direct)"],
            env=os.environ | {"H2OT_KERNELS_TRITON_LAUNCH": value},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == wanted
