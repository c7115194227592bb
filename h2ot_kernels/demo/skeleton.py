"""A made-up walker: smooth, in metres and in pixels, with a still stretch in the middle."""

import numpy as np

from .keypoints import Clip, make_clip

FPS = 60.0
IMAGE_WH = (1000.0, 1000.0)
FOCAL = 1145.0


def walking_clip(num_frames: int = 600) -> Clip:
    """A person who walks a circle, stands still for about a sixth of the clip, and walks on (Human3.6M's joints).

    While standing, every frame is the same: exact duplicates, the case that makes selection hard.
    """
    joints = _walk(num_frames)
    camera = joints * np.array([1.0, -1.0, 1.0]) + np.array([0.0, 0.95, 5.5])
    points = camera[..., :2] / camera[..., 2:] * FOCAL + np.array(IMAGE_WH) / 2
    return make_clip("made-up walker", points, image_wh=IMAGE_WH, joints_3d=camera, fps=FPS)


def _pace(num_frames: int) -> np.ndarray:
    """Walking speed in [0, 1] per frame: 1, a smooth stop, exactly 0 for about a sixth of the clip, a smooth start."""
    position = np.linspace(0.0, 1.0, num_frames)
    away = np.clip((np.abs(position - 0.5) - 0.085) / 0.06, 0.0, 1.0)
    return away * away * (3.0 - 2.0 * away)


def _walk(num_frames: int) -> np.ndarray:
    """[T, 17, 3] in metres, y up: angles of hips, knees, shoulders and elbows from one gait phase."""
    pace = _pace(num_frames)
    phase = 2 * np.pi * np.cumsum(pace) * 0.95 / FPS
    travelled = np.cumsum(pace) * 1.2 / FPS
    heading = travelled / 1.3
    forward = np.stack([np.cos(heading), np.zeros_like(heading), np.sin(heading)], -1)
    side = np.stack([np.sin(heading), np.zeros_like(heading), -np.cos(heading)], -1)
    up = np.broadcast_to([0.0, 1.0, 0.0], forward.shape)

    def limb(start, first, second, first_angle, second_angle):
        """Two segments hanging from start, each swung forward by its angle."""
        ends = []
        for length, angle in ((first, first_angle), (second, second_angle)):
            swing = np.sin(angle)[:, None] * forward - np.cos(angle)[:, None] * up
            start = start + length * swing
            ends.append(start)
        return ends

    place = np.cumsum(forward * (pace * 1.2 / FPS)[:, None], 0)
    pelvis = place - place.mean(0) + up * (0.93 + 0.02 * pace * np.cos(2 * phase))[:, None]
    lean = 0.05 * pace[:, None] * forward
    spine, thorax = pelvis + 0.25 * up + lean, pelvis + 0.5 * up + 2 * lean
    neck, head = thorax + 0.12 * up + lean, thorax + 0.24 * up + lean

    joints = [pelvis]
    legs, arms = [], []
    for sign, offset in ((1.0, 0.0), (-1.0, np.pi)):
        swing = np.sin(phase + offset)
        bend = 0.15 + 0.85 * np.maximum(np.cos(phase + offset), 0.0) ** 2
        hip = pelvis + sign * 0.13 * side
        legs.append([hip, *limb(hip, 0.44, 0.44, 0.5 * pace * swing, pace * (0.5 * swing - bend))])
        shoulder = thorax + sign * 0.18 * side
        arm = -0.45 * pace * swing
        arms.append([shoulder, *limb(shoulder, 0.28, 0.25, arm, arm + 0.15 + 0.35 * pace)])
    joints += [*legs[0], *legs[1], spine, thorax, neck, head, *arms[1], *arms[0]]
    return np.stack(joints, 1)
