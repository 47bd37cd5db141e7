"""Traits of synthetic faces: who a person is (`Identity`), apart from how a photo was taken (`Nuisance`).

Every trait is annotated with the ends of its span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_type_hints

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]  # float32 throughout
Traits = TypeVar("Traits", "Identity", "Nuisance")

# Stops of the palettes, RGB in [0, 1].
SKIN = ((0.99, 0.85, 0.76), (0.95, 0.75, 0.62), (0.83, 0.61, 0.46), (0.64, 0.43, 0.31), (0.46, 0.30, 0.22))
HAIR = (
    (0.09, 0.07, 0.08),
    (0.20, 0.12, 0.09),
    (0.36, 0.22, 0.13),
    (0.50, 0.31, 0.17),
    (0.60, 0.31, 0.16),
    (0.87, 0.69, 0.41),
    (0.74, 0.73, 0.74),
)
IRIS = ((0.20, 0.11, 0.07), (0.42, 0.26, 0.12), (0.34, 0.48, 0.26), (0.28, 0.50, 0.68), (0.50, 0.58, 0.64))


@dataclass(frozen=True)
class Identity:
    """What stays the same in every photo of a person; each trait has shape (faces, 1, 1).

    Lengths are in head units (half a head's height is about 1; x to the right, y down, origin between the
    eyes), angles are slopes, colours are positions 0..1 along a palette. Where a negative value means nothing
    (beard, curl, mole) the person has none; glasses and baldness set in above a threshold.
    """

    head_width: Annotated[Array, 0.68, 0.86]
    chin_taper: Annotated[Array, 0.08, 0.40]
    jaw_square: Annotated[Array, 0.0, 0.9]
    head_height: Annotated[Array, 0.93, 1.05]
    skin: Annotated[Array, 0.0, 1.0]
    blush: Annotated[Array, 0.0, 0.35]
    eye_x: Annotated[Array, 0.27, 0.37]
    eye_y: Annotated[Array, -0.06, 0.06]
    eye_width: Annotated[Array, 0.125, 0.18]
    eye_height: Annotated[Array, 0.055, 0.105]
    eye_tilt: Annotated[Array, -0.22, 0.22]
    iris: Annotated[Array, 0.0, 1.0]
    iris_size: Annotated[Array, 0.060, 0.080]
    brow_gap: Annotated[Array, 0.15, 0.25]
    brow_thick: Annotated[Array, 0.018, 0.060]
    brow_slope: Annotated[Array, -0.22, 0.22]
    brow_arch: Annotated[Array, 0.01, 0.08]
    brow_width: Annotated[Array, 0.15, 0.22]
    nose_length: Annotated[Array, 0.32, 0.48]
    nose_width: Annotated[Array, 0.09, 0.19]
    nose_bridge: Annotated[Array, 0.03, 0.08]
    mouth_drop: Annotated[Array, 0.17, 0.26]
    mouth_width: Annotated[Array, 0.19, 0.34]
    upper_lip: Annotated[Array, 0.025, 0.07]
    lower_lip: Annotated[Array, 0.035, 0.095]
    lip_tint: Annotated[Array, 0.15, 0.75]
    hair: Annotated[Array, 0.0, 1.0]
    hair_volume: Annotated[Array, 0.03, 0.20]
    hair_length: Annotated[Array, -0.35, 1.3]
    hairline: Annotated[Array, -0.72, -0.36]
    hair_sweep: Annotated[Array, -0.35, 0.35]
    hair_peak: Annotated[Array, -0.5, 0.7]
    hair_side: Annotated[Array, 0.82, 1.0]
    curl: Annotated[Array, -0.05, 0.05]
    baldness: Annotated[Array, 0.0, 1.0]
    ear_size: Annotated[Array, 0.11, 0.19]
    ear_out: Annotated[Array, 0.0, 0.07]
    beard: Annotated[Array, -1.6, 0.95]
    beard_width: Annotated[Array, 0.2, 1.0]
    moustache: Annotated[Array, -1.8, 0.95]
    glasses: Annotated[Array, 0.0, 1.0]
    glasses_size: Annotated[Array, 0.20, 0.25]
    glasses_round: Annotated[Array, 0.0, 1.0]
    glasses_tone: Annotated[Array, 0.05, 0.5]
    mole_x: Annotated[Array, -0.5, 0.5]
    mole_y: Annotated[Array, 0.1, 0.75]
    mole_size: Annotated[Array, -0.04, 0.035]


@dataclass(frozen=True)
class Nuisance:
    """What differs between photos of the same person; each trait has shape (faces, 1, 1).

    Turns are sines of angles; shifts, the background and the size of a head unit are in half frames, other
    lengths in head units; noise is a standard deviation of pixel values in [0, 1].
    """

    yaw: Annotated[Array, -0.26, 0.26]
    pitch: Annotated[Array, -0.14, 0.14]
    roll: Annotated[Array, -0.1, 0.1]
    shift_x: Annotated[Array, -0.06, 0.06]
    shift_y: Annotated[Array, -0.01, 0.08]
    scale: Annotated[Array, 0.66, 0.74]
    light_x: Annotated[Array, -0.75, 0.75]
    light_y: Annotated[Array, -0.65, 0.25]
    ambient: Annotated[Array, 0.45, 0.72]
    intensity: Annotated[Array, 0.75, 1.15]
    warmth: Annotated[Array, -0.11, 0.18]
    tint: Annotated[Array, -0.06, 0.06]
    tone: Annotated[Array, -0.15, 0.6]
    smile: Annotated[Array, -0.01, 0.13]
    mouth_open: Annotated[Array, -0.08, 0.1]
    eye_open: Annotated[Array, 0.70, 1.12]
    brow_raise: Annotated[Array, -0.03, 0.05]
    gaze_x: Annotated[Array, -0.04, 0.04]
    gaze_y: Annotated[Array, -0.02, 0.02]
    back_red: Annotated[Array, 0.2, 0.85]
    back_green: Annotated[Array, 0.2, 0.85]
    back_blue: Annotated[Array, 0.2, 0.85]
    slope_x: Annotated[Array, -0.25, 0.25]
    slope_y: Annotated[Array, -0.25, 0.25]
    blob_x: Annotated[Array, -1.0, 1.0]
    blob_y: Annotated[Array, -1.0, 0.6]
    blob_size: Annotated[Array, 0.15, 0.6]
    blob_gain: Annotated[Array, -0.35, 0.35]
    other_x: Annotated[Array, -1.0, 1.0]
    other_y: Annotated[Array, -1.0, 0.6]
    other_size: Annotated[Array, 0.15, 0.6]
    other_gain: Annotated[Array, -0.35, 0.35]
    shirt_red: Annotated[Array, 0.1, 0.9]
    shirt_green: Annotated[Array, 0.1, 0.9]
    shirt_blue: Annotated[Array, 0.1, 0.9]
    blur: Annotated[Array, 0.005, 0.04]
    noise: Annotated[Array, 0.0, 0.02]


def draw(kind: type[Traits], generators: Sequence[np.random.Generator]) -> Traits:
    """One set of traits per generator, from its stream alone; each trait is uniform over its span."""
    traits = get_type_hints(kind, include_extras=True)
    low, high = np.array([trait.__metadata__ for trait in traits.values()]).T
    drawn = np.stack([low + (high - low) * generator.random(len(low)) for generator in generators])
    columns = drawn.T.astype(np.float32)[:, :, None, None]
    return kind(**dict(zip(traits, columns, strict=True)))


def palette(stops: Sequence[tuple[float, float, float]], where: Array) -> Array:
    """Colours (N, 3, 1, 1) at positions 0..1 along a palette."""
    at = np.linspace(0.0, 1.0, len(stops))
    channels = [np.interp(where[:, 0, 0], at, channel) for channel in zip(*stops, strict=True)]
    return np.stack(channels, axis=1).astype(np.float32)[:, :, None, None]
