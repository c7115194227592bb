"""Clips of fewer frames than a host was made for: taken where the official model takes them, else refused."""

import pytest
import torch

from .host_cases import NAMES, B, F, J, assert_near, inputs, official, small

SHORTER = (1, 2, 11, F - 1)


@pytest.mark.parametrize("frames", SHORTER)
@pytest.mark.parametrize("training", [False, True])
def test_motionbert_equals_the_official_formulation_with_all_gradients(frames, training):
    model = small("motionbert").train(training)
    partner = official("motionbert", model)
    x = inputs("motionbert")[0][:, :frames]
    ours, theirs = model(x), partner(x)
    assert ours.shape == (B, frames, J, 3)
    assert_near(ours, theirs, 1e-9)

    cotangent = torch.randn_like(ours)
    (ours * cotangent).sum().backward()
    (theirs * cotangent).sum().backward()
    scale = max(parameter.grad.abs().max().item() for parameter in partner.parameters())
    gradients = {name: parameter.grad for name, parameter in partner.named_parameters()}
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, gradients[name], 1e-9, scale)


@pytest.mark.parametrize("frames", SHORTER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_short_clip_is_that_of_a_model_made_for_it(frames, dtype):
    """With the first frames of `temp_embed`; in inference, which has its own kernels."""
    model = small("motionbert").eval().to(dtype)
    made_for_it = small("motionbert", num_frames=frames).eval().to(dtype)
    state = model.state_dict()
    made_for_it.load_state_dict({**state, "temp_embed": state["temp_embed"][:, :frames]})
    x = inputs("motionbert", dtype)[0][:, :frames]
    with torch.inference_mode():
        assert torch.equal(model(x), made_for_it(x))
        pose, nothing = model(x, return_index=True)
    assert pose.shape == (B, frames, J, 3)
    assert nothing == ()


def test_short_clips_of_changing_length_compile_without_a_break():
    torch._dynamo.reset()
    model = small("motionbert").eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    x, _ = inputs("motionbert")
    with torch.no_grad():
        for frames in (11, F):
            assert_near(compiled(x[:, :frames]), model(x[:, :frames]), 1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "motionbert"])
def test_the_others_refuse_a_short_clip_as_the_official_ones_do(name):
    x = inputs(name)[0][:, : F - 1]
    model = small(name).eval()
    with pytest.raises(ValueError, match=r"x: got shape \[2, 26, 17, .\], wanted \[B, F, J, in_channels\] = \[2, 27,"):
        model(x)


@pytest.mark.parametrize(
    "options", [{"pipeline": "seq2frame"}, {"recover": "attention"}, {"stages": {1: 9}}, {"stages": {1: 9, 2: 5}}]
)
def test_motionbert_refuses_a_short_clip_where_all_frames_count(options):
    model = small("motionbert", **options).eval()
    with pytest.raises(ValueError, match=r"wanted \[B, F, J, in_channels\] = \[2, 27, 17, 3\]"):
        model(inputs("motionbert")[0][:, :20])


@pytest.mark.parametrize("frames", [0, F + 1])
def test_no_frames_and_too_many_are_refused(frames):
    model = small("motionbert").eval()
    with pytest.raises(
        ValueError, match=rf"got shape \[1, {frames}, 17, 3\], wanted \[B, 1 to F, J, in_channels\] = \[1, 27"
    ):
        model(torch.zeros(1, frames, J, 3, dtype=torch.float64))


def test_the_last_clip_of_a_video_is_lifted_as_the_official_script_does():
    """Clips of F frames, and what is left of the video as it is."""
    model = small("motionbert").eval()
    x = torch.randn(1, 2 * F + 5, J, 3, dtype=torch.float64)
    with torch.inference_mode():
        lifted = torch.cat([model(clip) for clip in x.split(F, 1)], 1)
        theirs = torch.cat([official("motionbert", model)(clip) for clip in x.split(F, 1)], 1)
    assert lifted.shape == (1, 2 * F + 5, J, 3)
    assert_near(lifted, theirs, 1e-9)
