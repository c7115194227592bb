"""Keypoints and poses in the files that public Human3.6M code shares, and the skeleton's sides.

2D: an .npz with `positions_2d`: {subject: {action: [keypoints [T, 17, 2] in pixels of each camera]}}, and optionally
`metadata`. 3D: an .npz with `positions_3d`: {subject: {action: poses}}, where poses are a list [T, J, 3] of each
camera, in its coordinates, or one [T, J, 3] in the world's, which the cameras of the same file turn:
`cameras`: {subject: [{"orientation": unit quaternion (w, x, y, z), "translation": [3] in metres} of each camera]}.
J is 17, or the 32 of the raw data, of which the usual 17 are taken. Metres.

Such files hold pickled dictionaries. They are read as data: of Python's pickle only dictionaries, lists, strings,
numbers and numpy arrays are understood, nothing else is ever called.
"""

import io
import pickle
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..demo.keypoints import read_clip

LEFT, RIGHT = (4, 5, 6, 11, 12, 13), (1, 2, 3, 14, 15, 16)
OF_32 = (0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17, 18, 19, 25, 26, 27)
# Width and height in pixels of the four cameras, in the files' order.
IMAGE_SIZES = ((1000, 1002), (1000, 1000), (1000, 1000), (1000, 1002))


# What reading a damaged archive or pickle raises.
BROKEN = (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError)
BROKEN += (ValueError, OverflowError)


class DataFileError(ValueError):
    """A data file that cannot be used; the message names the file, what it holds and what was wanted."""


@dataclass(frozen=True)
class Video:
    """One person before one camera. keypoints [T, J, 2] float32, normalised: x / w * 2 - 1, y / w * 2 - h / w.

    poses [T, J, 3] float32 in metres in the camera's coordinates, or None. action: without the number of the take.
    """

    name: str
    action: str
    keypoints: Tensor
    poses: Tensor | None


def read_clip_video(path: str | Path) -> Video:
    """A clip as the demo reads it (.npz, .npy, .json), with the file's name as its action."""
    clip = read_clip(path)
    poses = None if clip.joints_3d is None else torch.from_numpy(clip.joints_3d).float()
    return Video(clip.name, Path(path).stem, torch.from_numpy(clip.normalised), poses)


def read_videos(
    keypoints: str | Path,
    poses: str | Path | None = None,
    subjects: tuple[str, ...] = ("S9", "S11"),
    image_sizes: tuple[tuple[float, float], ...] = IMAGE_SIZES,
) -> list[Video]:
    """The videos of these subjects in a 2D file, with the poses of a 3D file where given.

    image_sizes: (width, height) of each camera. Where a pose has fewer frames than its keypoints, or more, the shorter
    counts (the keypoint files of Human3.6M hold a few frames too many). Raises DataFileError that names the file.
    """
    found = _tree(keypoints, "positions_2d", subjects)
    targets = None if poses is None else _Targets(poses, subjects)
    videos = []
    for subject in subjects:
        for action, cameras in found[subject].items():
            if not (isinstance(cameras, (list, tuple)) or np.ndim(cameras)):
                raise DataFileError(
                    f"{keypoints}: {subject} {action} is {type(cameras).__name__}, wanted the keypoints of each camera"
                )
            if len(cameras) > len(image_sizes):
                raise DataFileError(
                    f"{keypoints}: {subject} {action} has {len(cameras)} cameras, got {len(image_sizes)} image sizes"
                )
            for camera, (points, (width, height)) in enumerate(zip(cameras, image_sizes, strict=False)):
                name = f"{subject} {action} camera {camera}"
                points = _array(keypoints, name, points, 2)
                if points.shape[1] != 17:
                    raise DataFileError(f"{keypoints}: {name} has {points.shape[1]} joints, wanted 17")
                pose = None if targets is None else targets.of(subject, action, camera)
                T = len(points) if pose is None else min(len(points), len(pose))
                normalised = points[:T] * (2 / width) - np.array([1, height / width])
                pose = None if pose is None else torch.from_numpy(pose[:T]).float()
                kind = re.sub(r"[ _]\d+$", "", action)
                videos.append(Video(name, kind, torch.from_numpy(normalised).float(), pose))
    return videos


class _Targets:
    """The poses of a 3D file in camera coordinates."""

    def __init__(self, path: str | Path, subjects: tuple[str, ...]):
        self.path, self.poses = path, _tree(path, "positions_3d", subjects)
        self.cameras = _read(path, "cameras", optional=True)

    def of(self, subject: str, action: str, camera: int) -> np.ndarray:
        if action not in self.poses[subject]:
            raise DataFileError(f"{self.path}: {subject} has no {action!r}, which the keypoints have")
        name, poses = f"{subject} {action} camera {camera}", self.poses[subject][action]
        if isinstance(poses, list):
            if camera >= len(poses):
                raise DataFileError(
                    f"{self.path}: {subject} {action} has {len(poses)} cameras, the keypoints have more"
                )
            return _seventeen(self.path, name, _array(self.path, name, poses[camera], 3))
        poses = _seventeen(self.path, name, _array(self.path, name, poses, 3))
        try:
            position = self.cameras[subject][camera]
            rotation = np.asarray(position["orientation"], dtype=np.float64).reshape(4)
            translation = np.asarray(position["translation"], dtype=np.float64).reshape(3)
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise DataFileError(
                f"{self.path}: {name} is in world coordinates, and `cameras` does not say where that camera is; wanted "
                "poses of each camera, or cameras[subject][camera] with orientation [4] and translation [3]"
            ) from error
        return _rotate_back(rotation, poses - translation)


def _rotate_back(quaternion: np.ndarray, points: np.ndarray) -> np.ndarray:
    """points [..., 3] turned by the inverse of a unit quaternion (w, x, y, z)."""
    w, axis = quaternion[0], -quaternion[1:]
    across = np.cross(axis, points)
    return points + 2 * (w * across + np.cross(axis, across))


def _seventeen(path, name: str, poses: np.ndarray) -> np.ndarray:
    if poses.shape[1] not in (17, 32):
        raise DataFileError(f"{path}: {name} has {poses.shape[1]} joints, wanted 17 or 32")
    return poses if poses.shape[1] == 17 else poses[:, list(OF_32)]


def _array(path, name: str, value, size: int) -> np.ndarray:
    try:
        value = np.asarray(value)
    except ValueError as error:
        raise DataFileError(f"{path}: {name} is no array: {error}, wanted numbers [T, J, {size}]") from error
    is_right = value.dtype.kind in "fiu" and value.ndim == 3 and len(value) and value.shape[-1] >= size
    if not (is_right and np.isfinite(value).all()):
        raise DataFileError(
            f"{path}: {name} is {value.dtype} {list(value.shape)}, wanted finite numbers [T, J, {size}], T at least 1"
        )
    return value[..., :size].astype(np.float64)


def _tree(path, key: str, subjects: tuple[str, ...]) -> dict:
    """{subject: {action: ...}} under the key of an .npz."""
    tree = _read(path, key)
    if not isinstance(tree, dict) or not all(isinstance(actions, dict) for actions in tree.values()):
        raise DataFileError(f"{path}: {key} is not a dictionary of subjects of actions")
    for subject, actions in tree.items():
        for action in actions:
            if not isinstance(action, str):
                raise DataFileError(f"{path}: {key} of {subject} has the action {action!r}, wanted its name as text")
    missing = [subject for subject in subjects if subject not in tree]
    if missing:
        raise DataFileError(f"{path}: {key} has no {', '.join(missing)}; it has {', '.join(map(str, tree))}")
    return tree


def _read(path, key: str, optional: bool = False):
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{key}.npy" not in archive.namelist():
                if optional:
                    return None
                raise DataFileError(f"{path}: has no {key}; it has {', '.join(archive.namelist()) or 'nothing'}")
            with archive.open(f"{key}.npy") as file:
                _, _, dtype = _read_header(file)
                if dtype.kind != "O":
                    raise DataFileError(f"{path}: {key} is an array of {dtype}, wanted a dictionary")
                return _Data(io.BytesIO(file.read())).load().item()
    except DataFileError:
        raise
    except BROKEN as error:
        raise DataFileError(f"{path}: {key} cannot be read: {error!r}") from error


def _read_header(file) -> tuple:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


_KNOWN = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
for _core in ("core", "_core"):  # numpy before and from 2.0
    _KNOWN[f"numpy.{_core}.multiarray", "_reconstruct"] = np.zeros(1).__reduce__()[0]
    _KNOWN[f"numpy.{_core}.multiarray", "scalar"] = np.float64(0).__reduce__()[0]


class _Data(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers; every other class or function is refused."""

    def find_class(self, module: str, name: str):
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array and no plain container")
        return _KNOWN[module, name]
