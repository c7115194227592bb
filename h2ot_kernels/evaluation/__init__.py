"""Evaluation as the field does it: MPJPE and P-MPJPE, test-time flip, windows over whole videos.

Files: those of VideoPose3D / Human3.6M (`human36m`), or clips as the demo reads them.
"""

from .human36m import Video, read_clip_video, read_videos
from .metrics import mpjpe, p_mpjpe
from .run import Score, evaluate, flip, lift

__all__ = ["Score", "Video", "evaluate", "flip", "lift", "mpjpe", "p_mpjpe", "read_clip_video", "read_videos"]
