"""Reading 2D keypoints of one person, and cutting them into windows as lifting code does.

What is read:
- `.npz`: `keypoints_2d` [T, J, 2] in pixels, or `positions_2d` (a plain array, as VideoPose3D-style data without
  pickle), or `keypoints_2d_norm`, or a single array of that shape. Also used where there: `image_wh` [2], `fps`,
  `joints_3d_cam` or `joints_3d_world` [T, J, 3] in metres.
- `.npy`: one array [T, J, 2].
- `.json`: COCO-style keypoints: a list of annotations (or an object with `annotations` and `images`), each with
  `image_id` and 17 * 3 flat `keypoints`; the highest `score` per image is taken, the 17 joints are mapped to
  Human3.6M's order, and the images follow each other in the natural order of their ids.

Coordinates that are not finite (in COCO files: not visible) are filled linearly in time from the same joint, held at
the ends; a joint that is never seen stands at the mean of that frame's seen joints. `Clip.repaired` counts them.
Nothing is unpickled.
"""

import json
import re
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WANTED = (
    "wanted .npz with keypoints_2d [T, J, 2] (or positions_2d, keypoints_2d_norm, or a single array), "
    ".npy [T, J, 2], or COCO-style .json (annotations with image_id and 17 * 3 keypoints)"
)
ARRAY_2D = ("keypoints_2d", "positions_2d", "keypoints_2d_norm")
ARRAY_3D = ("joints_3d_cam", "joints_3d_world")


# What json, zipfile, zlib and numpy (which tokenizes an array's header) raise for a damaged file.
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, MemoryError, OverflowError, SyntaxError, TypeError)
_UNREADABLE += (tokenize.TokenError, zipfile.BadZipFile, zlib.error, struct.error)


class KeypointError(ValueError):
    """A keypoint file that cannot be used; the message names the file, what it holds and what was wanted."""


@dataclass(frozen=True)
class Clip:
    """One person over T frames.

    points [T, J, 2] float64 in `unit`; normalised [T, J, 2] float32, what a model reads; joints_3d [T, J, 3] float64 in
    metres or None.
    """

    name: str
    points: np.ndarray
    normalised: np.ndarray
    unit: str
    note: str
    joints_3d: np.ndarray | None = None
    fps: float | None = None
    repaired: int = 0

    @property
    def num_frames(self) -> int:
        return self.points.shape[0]

    @property
    def num_joints(self) -> int:
        return self.points.shape[1]


def read_clip(path: str | Path) -> Clip:
    """The clip in a keypoint file. Raises KeypointError for whatever cannot be read as one."""
    path = Path(path)
    readers = {".npz": _read_npz, ".npy": _read_npy, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise KeypointError(f"{path}: unknown file type {path.suffix or '(no suffix)'!r}; {WANTED}")
    if not path.is_file():
        raise KeypointError(f"{path}: {'not a file' if path.exists() else 'no such file'}; {WANTED}")
    try:
        return readers[path.suffix.lower()](path)
    except KeypointError:
        raise
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "allow_pickle" in reason or "pickled" in reason:
            known = "it" if reason.startswith("Object arrays") else "it is no file of numpy's, or"
            reason = f"{known} holds pickled Python objects, which are not read; save plain numeric arrays instead"
        raise KeypointError(f"{path}: cannot be read: {reason}; {WANTED}") from error


def make_clip(
    name: str,
    points: np.ndarray,
    *,
    image_wh: tuple[float, float] | None = None,
    is_normalised: bool = False,
    joints_3d: np.ndarray | None = None,
    fps: float | None = None,
    note: str = "",
) -> Clip:
    """A clip from arrays in memory: checks, fills what is not finite, normalises. Raises KeypointError."""
    points, repaired = fill_missing(_numeric(name, "2D keypoints", points, 2), name)
    if joints_3d is not None:
        joints_3d, _ = fill_missing(_numeric(name, "3D joints", joints_3d, 3), name)
        if joints_3d.shape[:2] != points.shape[:2]:
            raise KeypointError(
                f"{name}: 3D joints have shape {list(joints_3d.shape)}, wanted {[*points.shape[:2], 3]} as the 2D ones"
            )
    unit = "px"
    if is_normalised:
        normalised, how = points, "normalised in the file"
        if image_wh is None:
            unit = "half image widths"
        else:
            width, height = image_wh
            points = (points + np.array([1.0, height / width])) * (width / 2)
    elif image_wh is not None:
        width, height = image_wh
        normalised = points * (2 / width) - np.array([1.0, height / width])
        how = f"normalised by the image, {width:g} x {height:g}"
    else:
        low, high = points.min((0, 1)), points.max((0, 1))
        half = max(float((high - low).max()) / 2, np.finfo(np.float32).tiny)
        normalised = (points - (low + high) / 2) / half
        how = "normalised by the clip's bounding box (no image size)"
    note = "; ".join(part for part in (note, how) if part)
    return Clip(name, points, normalised.astype(np.float32), unit, note, joints_3d, fps, repaired)


def fill_missing(points: np.ndarray, name: str) -> tuple[np.ndarray, int]:
    """points [T, J, D] with coordinates that are not finite filled as the module says, and how many joints were."""
    seen = np.isfinite(points).all(-1)
    if not seen.any():
        raise KeypointError(f"{name}: no frame holds a finite keypoint; wanted at least one")
    if seen.all():
        return points, 0
    filled = np.where(seen[..., None], points, 0.0)
    frames = np.arange(points.shape[0])
    ever = seen.any(0)
    for joint in np.flatnonzero(ever & ~seen.all(0)):
        for axis in range(points.shape[2]):
            known = seen[:, joint]
            filled[:, joint, axis] = np.interp(frames, frames[known], points[known, joint, axis])
    filled[:, ~ever] = filled[:, ever].mean(1, keepdims=True)
    return filled, int((~seen).sum())


def window_starts(num_frames: int, window: int) -> list[int]:
    """First frames of the windows that cover a clip: back to back, the last one moved back to end with the clip."""
    if num_frames <= window:
        return [0]
    starts = list(range(0, num_frames - window + 1, window))
    return starts if starts[-1] + window == num_frames else [*starts, num_frames - window]


def cut_windows(frames: np.ndarray, window: int) -> np.ndarray:
    """[T, ...] -> [B, window, ...]; a clip shorter than the window is padded with its last frame."""
    short = max(window - frames.shape[0], 0)
    padded = np.concatenate([frames, np.repeat(frames[-1:], short, 0)])
    return np.stack([padded[start : start + window] for start in window_starts(frames.shape[0], window)])


def join_windows(windows: np.ndarray, num_frames: int) -> np.ndarray:
    """[B, window, ...] -> [T, ...], the inverse of `cut_windows`: a frame in two windows is taken from the first."""
    joined = np.empty((num_frames, *windows.shape[2:]), windows.dtype)
    for start, window in reversed(list(zip(window_starts(num_frames, windows.shape[1]), windows, strict=True))):
        stop = min(start + windows.shape[1], num_frames)
        joined[start:stop] = window[: stop - start]
    return joined


def _numeric(name: str, what: str, array: np.ndarray, size: int) -> np.ndarray:
    """[T, J, size] float64; infinities of float32 count as not finite."""
    array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        raise KeypointError(f"{name}: {what} have dtype {array.dtype}, wanted numbers")
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3 or array.shape[-1] != size or 0 in array.shape:
        raise KeypointError(f"{name}: {what} have shape {list(array.shape)}, wanted [T, J, {size}], T and J at least 1")
    array = array.astype(np.float64)
    return np.where(np.abs(array) < np.finfo(np.float32).max, array, np.nan)


def _read_npy(path: Path) -> Clip:
    return make_clip(str(path), np.load(path, allow_pickle=False))


def _read_npz(path: Path) -> Clip:
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise KeypointError(f"{path}: holds a single .npy array under the name of an .npz; {WANTED}")
    with archive:
        names = archive.files
        chosen = next((key for key in ARRAY_2D if key in names), names[0] if len(names) == 1 else None)
        if chosen is None:
            raise KeypointError(f"{path}: holds {', '.join(names) or 'nothing'}; {WANTED}")
        spatial = next((key for key in ARRAY_3D if key in names), None)
        return make_clip(
            str(path),
            archive[chosen],
            image_wh=_image_wh(path, archive["image_wh"]) if "image_wh" in names else None,
            is_normalised=chosen == "keypoints_2d_norm",
            joints_3d=archive[spatial] if spatial else None,
            fps=float(_positive(path, "fps", archive["fps"], 1)[0]) if "fps" in names else None,
        )


def _positive(path: Path, key: str, value, size: int) -> np.ndarray:
    value = np.asarray(value)
    if value.dtype.kind not in "fiu" or value.size != size or not (np.isfinite(value).all() and (value > 0).all()):
        raise KeypointError(f"{path}: {key} is {value.tolist()!r}, wanted {size} positive number{'s' * (size > 1)}")
    return value.reshape(size).astype(np.float64)


def _image_wh(path: Path, value) -> tuple[float, float]:
    width, height = _positive(path, "image_wh", value, 2)
    return float(width), float(height)


def _natural(image_id) -> list:
    """Sort key under which img2 comes before img10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", str(image_id))]


def _read_json(path: Path) -> Clip:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise KeypointError(f"{path}: is nested too deeply; {WANTED}") from error
    image_wh = None
    if isinstance(content, dict):
        sizes = {(image.get("width"), image.get("height")) for image in _objects(path, content.get("images", []))}
        if len(sizes) == 1 and None not in (size := sizes.pop()):
            image_wh = _image_wh(path, size)
        content = content.get("annotations")
    best: dict[str, tuple[float, np.ndarray]] = {}
    for position, person in enumerate(_objects(path, content)):
        joints, score = _person(path, position, person)
        image = str(person["image_id"])
        if image not in best or score > best[image][0]:
            best[image] = (score, joints)
    if not best:
        raise KeypointError(f"{path}: holds no annotation; {WANTED}")
    joints = np.stack([best[image][1] for image in sorted(best, key=_natural)])
    points = np.where(joints[..., 2:] > 0, joints[..., :2], np.nan)
    return make_clip(str(path), coco_to_h36m(points), image_wh=image_wh, note="COCO joints mapped to Human3.6M's order")


def _objects(path: Path, content) -> list[dict]:
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise KeypointError(f"{path}: is not a list of objects; {WANTED}")
    return content


def _person(path: Path, position: int, person: dict) -> tuple[np.ndarray, float]:
    """joints [17, 3] and the score (the mean confidence of the joints where the file gives none)."""
    missing = [key for key in ("image_id", "keypoints") if key not in person]
    if missing:
        raise KeypointError(f"{path}: annotation {position} has no {' and no '.join(missing)}; {WANTED}")
    numbers = person["keypoints"]
    if not isinstance(numbers, list) or len(numbers) != 51 or not all(type(n) in (int, float) for n in numbers):
        size = len(numbers) if isinstance(numbers, list) else type(numbers).__name__
        raise KeypointError(f"{path}: keypoints of annotation {position} are {size}, wanted 17 * 3 = 51 numbers")
    try:
        joints = np.array(numbers, dtype=np.float64).reshape(17, 3)
    except OverflowError as error:
        raise KeypointError(f"{path}: keypoints of annotation {position} hold a number beyond float64") from error
    score = person.get("score", float(joints[:, 2].mean()))
    if type(score) not in (int, float):
        raise KeypointError(f"{path}: score of annotation {position} is {score!r}, wanted a number")
    return joints, score


def coco_to_h36m(coco: np.ndarray) -> np.ndarray:
    """[T, 17, 2] from COCO's joints to Human3.6M's: hip, spine, thorax and head are means of COCO joints."""
    pelvis = coco[:, [11, 12]].mean(1)
    thorax = coco[:, [5, 6]].mean(1)
    made = {0: pelvis, 7: (pelvis + thorax) / 2, 8: thorax, 10: coco[:, 1:5].mean(1)}
    taken = {1: 12, 2: 14, 3: 16, 4: 11, 5: 13, 6: 15, 9: 0, 11: 5, 12: 7, 13: 9, 14: 6, 15: 8, 16: 10}
    return np.stack([made[joint] if joint in made else coco[:, taken[joint]] for joint in range(17)], 1)
