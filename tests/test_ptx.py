"""tests/ptx: the machine sees each kind of fault in a few lines of PTX, and computes as the manual says."""

import shutil

import numpy as np
import pytest
import torch

from . import ptx
from .ptx import program

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

KERNEL = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1,
	.param .u64 .ptr .global .align 1 kernel_param_2
)
.reqntid 64
{
	.reg .b64 	%rd<9>;
	mov.u32 	%r1, %tid.x;
	ld.param.b64 	%rd1, [kernel_param_0];
	mad.wide.u32 	%rd2, %r1, 4, %rd1;
	xor.b32 	%r2, %r1, 1;  // the neighbour
	xor.b32 	%r3, %r1, 63;  // of another warp
	mad.wide.u32 	%rd3, %r3, 4, %rd1;
	shl.b32 	%r4, %r1, 2;
	shl.b32 	%r5, %r2, 2;
	setp.lt.u32 	%p1, %r1, 5;
	setp.eq.b32 	%p2, %r1, 0;
	mov.u32 	%r8, %ctaid.x;
	@BODY
	ret;
}
"""
SEEDS = 5
STORE = "st.global.b32 [%rd2], %r1;"
# Two blocks store each in its own place; the second to come reads what the other has stored. The counter: number 64.
LAST = """mad.wide.u32 %rd4, %r8, 4, %rd1; xor.b32 %r9, %r8, 1; mad.wide.u32 %rd5, %r9, 4, %rd1;
	@%p2 st.global.b32 [%rd4], %r8; bar.sync 0; @%p2 atom.global.gpu.acq_rel.add.u32 %r6, [ %rd1 + 256 ], 1; bar.sync 0;
	setp.eq.b32 %p3, %r6, 1; @%p3 ld.global.b32 %r7, [%rd5];"""
FAULTS = {
    "beyond the end": ("st.global.b32 [%rd2+200], %r1;", "outside of all"),
    "before the beginning": ("ld.global.b32 %r6, [%rd2+-4];", "outside of all"),
    "a wide load off its multiple": ("ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd2];", "not a multiple"),
    "read without a barrier": (f"{STORE} ld.global.b32 %r6, [%rd3];", "without a barrier"),
    "written without a barrier": (f"ld.global.b32 %r6, [%rd3]; {STORE}", "without a barrier"),
    "two values in one place": ("st.global.b32 [%rd1], %r1;", "wrote without a barrier"),
    "shared, read without a barrier": ("st.shared.b32 [%r4], %r1; ld.shared.b32 %r6, [%r5];", "wrote without"),
    "shared, too little": ("st.shared.b32 [%r4+4], %r1;", "shared memory at 0x100, outside of all"),
    "a barrier for some": ("@%p1 bra $L1; bar.sync 0;\n$L1:", "ended"),
    "a shuffle of some lanes": ("@%p1 bra $L1; shfl.sync.bfly.b32 %r6, %r1, 1, 31, -1;\n$L1:", "ended"),
    "an end before a copy lands": ("cp.async.ca.shared.global [ %r4 + 0 ], [ %rd2 + 0 ], 0x4, 4;", "copies land"),
    "division by zero": ("sub.s32 %r6, %r1, %r1; div.s32 %r7, %r1, %r6;", "divided by zero"),
    "of two blocks one stores and one reads": (
        "setp.eq.b32 %p3, %r8, 0; @%p3 st.global.b32 [%rd2], %r1; @!%p3 ld.global.b32 %r6, [%rd2];",
        "without a barrier",
    ),
    "the last block, no barrier before it says so": (LAST.replace("bar.sync 0; @", "@"), "wrote without a barrier"),
}
SOUND = {
    "each its own": f"{STORE} ld.global.b32 %r6, [%rd2];",
    "a barrier between": f"{STORE} bar.sync 0; ld.global.b32 %r6, [%rd3]; bar.sync 0; st.global.b32 [%rd2], 5;",
    "a warp's barrier": "st.shared.b32 [%r4], %r1; bar.warp.sync -1; ld.shared.b32 %r6, [%r5];",
    "lanes apart": "@%p1 bra $L1; add.s32 %r6, %r1, 1;\n$L1: shfl.sync.bfly.b32 %r6, %r1, 1, 31, -1; bar.sync 0;",
    "one value in one place": "st.global.b32 [%rd1], 7;",
}


def run(body: str, out: torch.Tensor, blocks: int = 1, shared: int = 256, seeds: int = SEEDS) -> torch.Tensor:
    """The kernel with this body, once for each seed."""
    text = KERNEL.replace("@BODY", body.replace("; ", ";\n\t").replace(": ", ":\n\t"))
    parsed = program.parse(text, ptx.operation)
    for seed in range(seeds):
        ptx.run(parsed, shared, (blocks,), [out], seed)
    return out


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_seen(name):
    body, message = FAULTS[name]
    blocks = 2 if "block" in name else 1
    with pytest.raises(ptx.Fault, match=f"^kernel: .*{message}"):
        run(body, torch.zeros(64 + (blocks - 1), dtype=torch.int32), blocks)


@pytest.mark.parametrize("name", SOUND)
def test_what_is_sound_passes(name):
    run(SOUND[name], torch.zeros(64, dtype=torch.int32))


def test_the_last_block_may_read_what_the_others_stored():
    out = run(LAST, torch.zeros(65, dtype=torch.int32), blocks=2)
    assert out[:2].tolist() == [0, 1]
    assert out[64] == 2 * SEEDS


def test_copies_land_when_they_are_waited_for():
    out = torch.arange(64, dtype=torch.int32)
    copy = "cp.async.ca.shared.global [ %r4 + 0 ], [ %rd2 + 0 ], 0x4, 4; cp.async.commit_group;"
    wait, move = "cp.async.wait_group 0;", "ld.shared.b32 %r6, [%r4]; st.global.b32 [%rd2], %r6;"
    assert torch.equal(run(f"{copy} {wait} {move}", out.clone()), out)
    too_early = run(f"{copy} {move} {wait}", out.clone())
    assert (too_early == -1).all()


def test_unknown_instructions_are_named():
    with pytest.raises(program.Unknown, match=r"instruction add\.sideways\.s32"):
        run("add.sideways.s32 %r6, %r1, %r1;", torch.zeros(64, dtype=torch.int32))


def test_pairs_may_run_over():
    """What became of delta_kernel (tests/aot_read.py: overruns) computes what it says, not what was meant."""
    body = """cvt.u64.u32 %rd4, 1; shl.b64 %rd5, %rd4, 36; mul.wide.u32 %rd6, %r1, 2147483648; or.b64 %rd7, %rd6, %rd5;
	mov.b64 {_, %r6}, %rd7; st.global.b32 [%rd2], %r6;"""
    expected = 16 | torch.arange(64, dtype=torch.int32) >> 1
    assert torch.equal(run(body, torch.zeros(64, dtype=torch.int32)), expected)


# instruction of %f1 (and %f2) -> what NumPy computes; a bound in units of the last place
FLOATS = {
    "add.f32 %f3, %f1, %f2;": (lambda a, b: a + b, 0),
    "fma.rn.f32 %f3, %f1, %f2, %f2;": (lambda a, b: (a.astype("f8") * b + b).astype("f4"), 0),
    "div.rn.f32 %f3, %f1, %f2;": (lambda a, b: a / b, 0),
    "div.full.f32 %f3, %f1, %f2;": (lambda a, b: a / b, 2),
    "ex2.approx.f32 %f3, %f1;": (lambda a, b: np.exp2(a), 3),
    "min.f32 %f3, %f1, %f2;": (np.minimum, 0),
    "cvt.rna.tf32.f32 %f3, %f1;": (lambda a, b: ((a.view("u4") + 0x1000) & 0xFFFFE000).view("f4"), 0),
    "setp.lt.f32 %p3, %f1, %f2; selp.f32 %f3, %f1, %f2, %p3;": (np.minimum, 0),
    "cvt.rn.f16x2.f32 %r6, %f1, %f2; mov.b32 {%rs1, %rs2}, %r6; cvt.f32.f16 %f3, %rs2;": (
        lambda a, b: a.astype("f2").astype("f4"),
        0,
    ),
}


@pytest.mark.parametrize("instruction", FLOATS)
def test_floats_as_numpy(instruction):
    expected, places = FLOATS[instruction]
    values = torch.randn(128, dtype=torch.float32)
    a, b = values[:64].numpy().copy(), values[64:].numpy().copy()
    load = "ld.global.b32 %f1, [%rd2]; ld.global.b32 %f2, [%rd2+256]; bar.sync 0;"
    out = values.clone()
    run(f"{load} {instruction} st.global.b32 [%rd2], %f3;", out, seeds=1)
    np.testing.assert_array_max_ulp(out[:64].numpy(), expected(a, b), places)
