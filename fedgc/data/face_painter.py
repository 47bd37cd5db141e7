"""Paints the faces that `fedgc.data.face_traits` describes.

A head is an ellipsoid with a shaped outline; features lie on its surface, so that they move against the
outline when it turns. Shapes are signed distances (negative inside) with soft edges; blur is a softer edge.
Per-pixel work uses only + - * / sqrt, floor, minimum and maximum, which IEEE 754 rounds exactly: the bytes of
a face depend on nothing painted beside it. Lengths are in head units, as the traits are.
"""

from __future__ import annotations

import numpy as np

from fedgc.data.face_traits import HAIR, IRIS, SKIN, Array, Identity, Nuisance, palette


def paint(who: Identity, photo: Nuisance, size: int) -> Array:
    """Faces (N, 3, size, size) in [0, 1], without sensor noise."""
    return _Portrait(who, photo, size).painted()


def _colour(red: Array, green: Array, blue: Array) -> Array:
    return np.stack([red, green, blue], axis=1)


def _ellipse(x: Array, y: Array, width: Array | float, height: Array | float) -> Array:
    """Signed distance to an axis-parallel ellipse around the origin, exact to first order at its edge."""
    u, v = x / width, y / height
    radius = np.sqrt(u * u + v * v) + 1e-6
    slope = np.sqrt((u / width) ** 2 + (v / height) ** 2) + 1e-6
    return radius * (radius - 1) / slope


def _squircle(u: Array, v: Array, squareness: Array) -> Array:
    """Squared radius whose level 1 runs from a circle (squareness 0) to a square (squareness 1)."""
    u, v = u * u, v * v
    return u + v - squareness * np.minimum(u, 1) * np.minimum(v, 1)


def _rounded_max(a: Array, b: Array, radius: float) -> Array:
    """max(a, b) with its corner rounded: the intersection of two shapes."""
    blend = np.maximum(radius - np.abs(a - b), 0)
    return np.maximum(a, b) + blend * blend / (4 * radius)


def _wave(phase: Array) -> Array:
    """A smooth wave of period 1 in [-1, 1], made of parabolas."""
    ramp = 2 * (phase - np.floor(phase)) - 1
    return 4 * ramp * (1 - np.abs(ramp))


class _Portrait:
    """One chunk of faces in the making: an albedo image, and the light that falls on it."""

    def __init__(self, who: Identity, photo: Nuisance, size: int) -> None:
        self.who, self.photo = who, photo
        centres = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
        self.u, self.v = centres[None, None, :], centres[None, :, None]
        self.soft = np.sqrt((3 / size / photo.scale) ** 2 + photo.blur**2)
        self._pose()
        self.skin = palette(SKIN, who.skin)
        self.hair = palette(HAIR, who.hair)
        self.haired = (who.baldness < 0.93).astype(np.float32)
        self.albedo = self._background()
        self.shade = np.ones_like(self.x)

    def _pose(self) -> None:
        """Outline coordinates (x, y), surface coordinates (fx, fy), and the surface normal."""
        who, photo = self.who, self.photo
        across, down = (self.u - photo.shift_x) / photo.scale, (self.v - photo.shift_y) / photo.scale
        turn = np.sqrt(1 - photo.roll**2)
        self.x = turn * across + photo.roll * down
        self.y = turn * down - photo.roll * across
        a, b = self.x / who.head_width, self.y / who.head_height
        below, above = np.maximum(b, 0), np.minimum(b, 0)
        a = a / (1 - who.chin_taper * below * below - 0.08 * above * above)
        square = _squircle(a, b, who.jaw_square * (b > 0))
        self.head = (np.sqrt(np.maximum(square, 1e-6)) - 1) * 0.85
        depth = 0.8 * np.sqrt(np.maximum(1 - square, 0))
        self.normal = a, b, depth / 0.8
        self.fx, self.fy = self._surface(depth)

    def _surface(self, depth: Array | float) -> tuple[Array, Array]:
        """Where on the unturned head a pixel at this depth (towards the viewer) lies."""
        yaw, pitch = self.photo.yaw, self.photo.pitch
        return self.x * np.sqrt(1 - yaw**2) - depth * yaw, self.y * np.sqrt(1 - pitch**2) - depth * pitch

    def _inside(self, distance: Array) -> Array:
        """Coverage in [0, 1] of a shape."""
        step = np.clip(0.5 - distance / self.soft, 0, 1)
        return step * step * (3 - 2 * step)

    def _stroke(self, distance: Array, half_width: Array | float) -> Array:
        """Coverage of a line around distance 0; thinner than a pixel, it fades instead of growing."""
        return self._inside(distance - half_width) - self._inside(distance + half_width)

    def _lay(self, colour: Array | float, coverage: Array, shade: Array | float | None = None) -> None:
        """Put a colour over the picture where the coverage says, lit by `shade` if that is given."""
        self.albedo += coverage[:, None] * (colour - self.albedo)
        if shade is not None:
            self.shade += coverage * (shade - self.shade)

    def _background(self) -> Array:
        photo = self.photo
        tone = photo.slope_x * self.u + photo.slope_y * self.v
        blob = photo.blob_x, photo.blob_y, photo.blob_size, photo.blob_gain
        other = photo.other_x, photo.other_y, photo.other_size, photo.other_gain
        for x, y, extent, gain in (blob, other):
            far = ((self.u - x) ** 2 + (self.v - y) ** 2) / extent**2
            tone = tone + gain / (1 + far * far)
        wall = _colour(photo.back_red, photo.back_green, photo.back_blue)
        return np.clip(wall + tone[:, None], 0, 1)

    def painted(self) -> Array:
        self._body()
        self._head()
        self._beard()
        self._mouth()
        for side in (-1.0, 1.0):
            self._eye(side)
        self._nose()
        self._mole()
        self._front_hair()
        for side in (-1.0, 1.0):
            self._brow(side)
        self._glasses()
        return self._exposed()

    def _body(self) -> None:
        """What lies behind the head: hair at the back, neck, shoulders and ears."""
        who, photo = self.who, self.photo
        x, y = self._surface(-0.35)  # behind the head's middle, so it swings the other way
        hanging = np.minimum(y, 0) + np.maximum(y, 0) * 0.45
        bulk = who.head_width + who.hair_volume * np.clip(who.hair_length + 0.6, 0.2, 1.2) + self._curls()
        back = _ellipse(x, hanging, bulk, who.head_height + 0.6 * who.hair_volume)
        back = _rounded_max(back, y - who.hair_length - 0.05, 0.3)
        self._lay(self.hair * 0.7, self._inside(back) * self.haired, 0.75)
        neck = np.maximum(np.abs(x) - 0.36 - 0.1 * np.maximum(y - 0.9, 0), 0.3 - y)
        self._lay(self.skin * 0.8, self._inside(neck), 0.75)
        shirt = _ellipse(x, y - 2.05, 1.35, 0.85)
        self._lay(_colour(photo.shirt_red, photo.shirt_green, photo.shirt_blue), self._inside(shirt), 0.85)
        for side in (-1.0, 1.0):
            out = side * x - who.head_width - who.ear_out + 0.02
            self._lay(self.skin * 0.93, self._inside(_ellipse(out, y - 0.08, 0.6 * who.ear_size, who.ear_size)), 0.8)
            inner = _ellipse(out - 0.01, y - 0.08, 0.3 * who.ear_size, 0.6 * who.ear_size)
            self._lay(self.skin * 0.68, self._inside(inner) * 0.8)

    def _head(self) -> None:
        who = self.who
        nx, ny, nz = self.normal
        self._lay(self.skin, self._inside(self.head), self._lambert(nx, ny, nz))
        for side in (-1.0, 1.0):
            far = ((self.fx - side * 0.42) ** 2 + (self.fy - 0.33) ** 2) / 0.05
            flush = self.skin * np.array([1.0, 0.68, 0.66], np.float32)[None, :, None, None]
            self._lay(flush, who.blush * self._inside(self.head) / (1 + far * far))
            socket = (self.fx - side * who.eye_x) ** 2 / 0.05 + (self.fy - who.eye_y + 0.03) ** 2 / 0.02
            self._lay(self.skin * 0.72, 0.5 * self._inside(self.head) / (1 + socket * socket))

    def _lambert(self, nx: Array, ny: Array, nz: Array) -> Array:
        photo = self.photo
        norm = np.sqrt(1 + photo.light_x**2 + photo.light_y**2)
        facing = (nx * photo.light_x + ny * photo.light_y + nz) / norm
        return photo.ambient + (1.15 - photo.ambient) * np.maximum(facing, 0)

    def _eye(self, side: float) -> None:
        who, photo = self.who, self.photo
        x, y = side * (self.fx - side * who.eye_x), self.fy - who.eye_y
        y = y + who.eye_tilt * x
        arch = np.maximum(1 - (x / who.eye_width) ** 2, -1)
        upper, lower = -who.eye_height * photo.eye_open * arch, 0.65 * who.eye_height * arch
        opening = self._inside(np.maximum(upper - y, y - lower) * 0.9)
        self._lay(0.95, opening)
        gx, gy = self.fx - side * who.eye_x - photo.gaze_x, y + 0.01 - photo.gaze_y
        eyeball = np.sqrt(gx * gx + gy * gy)
        iris = palette(IRIS, who.iris)
        self._lay(iris * 0.5, opening * self._inside(eyeball - who.iris_size))
        self._lay(iris, opening * self._inside(eyeball - who.iris_size * 0.82))
        self._lay(0.03, opening * self._inside(eyeball - who.iris_size * 0.45))
        glint = np.sqrt((gx + 0.025) ** 2 + (gy + 0.028) ** 2)
        self._lay(1.0, 0.9 * self._inside(glint - 0.016))
        within = self._inside(np.abs(x) - who.eye_width * 1.08)
        self._lay(self.skin * 0.15, within * self._stroke(y - upper, 0.018))
        self._lay(self.skin * 0.55, within * 0.6 * self._stroke(y - lower, 0.008))
        self._lay(self.skin * 0.62, within * 0.6 * self._stroke(y - upper + 0.055, 0.01))

    def _brow(self, side: float) -> None:
        who, photo = self.who, self.photo
        x = side * self.fx - who.eye_x - 0.01
        along = x / who.brow_width
        line = who.eye_y - who.brow_gap - photo.brow_raise - who.brow_slope * x - who.brow_arch * (1 - along * along)
        thick = who.brow_thick * (1 - 0.35 * along)
        band = self._stroke(self.fy - line, thick) * self._inside(np.abs(x) - who.brow_width)
        self._lay(self.hair * 0.6, 0.9 * band)

    def _nose(self) -> None:
        who, photo = self.who, self.photo
        x, y = self.fx - 0.12 * photo.yaw, self.fy - who.eye_y  # stands out from the face
        down = np.clip(y / who.nose_length, 0, 1.15)
        width = who.nose_bridge + (who.nose_width - who.nose_bridge) * down * down
        across = np.clip(x / (1.5 * width), -1, 1)
        fade = np.clip((who.nose_length + 0.03 - y) / 0.07, 0, 1) * np.clip((y + 0.1) / 0.15, 0, 1)
        slant = across * (1 - across * across) * fade
        self.shade *= 1 + 0.9 * slant * (photo.light_x + 0.15)
        ridge = (1 - across * across) ** 2 * fade
        self.shade *= 1 + 0.10 * ridge * down
        under = _ellipse(x, y - who.nose_length - 0.03, who.nose_width * 1.05, 0.05)
        self._lay(self.skin * 0.62, 0.65 * self._inside(under + 0.01))
        tip = _ellipse(x, y - who.nose_length + 0.02, who.nose_width * 0.8, 0.07)
        self._lay(self.skin * 1.02, 0.9 * self._inside(tip))
        for side in (-1.0, 1.0):
            hole = _ellipse(side * x - 0.5 * who.nose_width, y - who.nose_length - 0.03, 0.3 * who.nose_width, 0.022)
            self._lay(self.skin * 0.25, 0.85 * self._inside(hole))

    def _mouth(self) -> None:
        who, photo = self.who, self.photo
        middle = who.eye_y + who.nose_length + who.mouth_drop
        width = who.mouth_width * (1 + 1.2 * photo.smile)
        x = self.fx / width
        arch = np.maximum(1 - x * x, -1)
        seam = self.fy - middle - photo.smile * (arch - 0.6)
        gap = np.maximum(photo.mouth_open, 0)
        bow = who.upper_lip * arch * (1 - 0.25 / (1 + 60 * x * x))
        top, bottom = seam + bow + 0.3 * gap * arch, seam - (who.lower_lip + gap) * arch
        lips = np.maximum(-top, bottom)
        tint = np.array([0.78, 0.30, 0.32], np.float32)[None, :, None, None]
        lip = (self.skin + who.lip_tint[:, None] * (tint - self.skin)) * 0.92
        self._lay(lip, self._inside(lips))
        self._lay(self.skin * 0.6, 0.35 * self._stroke(bottom - 0.03, 0.02) * self._inside(np.abs(x) - 0.6))
        mouth = np.maximum(-(seam + 0.3 * gap * arch), seam - gap * arch)
        opened = (gap > 0.015).astype(np.float32)
        self._lay(0.13, opened * self._inside(mouth))
        teeth = np.maximum(mouth, seam - 0.35 * gap)
        self._lay(0.93, opened * self._inside(teeth + 0.005))
        line = self._stroke(seam, 0.012) * self._inside(np.abs(x) - 1.02) * (1 - opened)
        self._lay(self.skin * 0.28, 0.9 * line)

    def _beard(self) -> None:
        who = self.who
        seam = who.eye_y + who.nose_length + who.mouth_drop
        cheek = seam - 0.02 - 0.9 * np.maximum(np.abs(self.fx) - 0.25, 0) - self.fy
        region = 0.35 * np.maximum(cheek, np.abs(self.fx) - who.beard_width)  # hair thins out, skin does not
        cover = self._inside(region) * self._inside(self.head - 0.02)
        self._lay(self.hair * 0.8, np.maximum(who.beard, 0) * cover)
        above = self.fy - seam + 0.09 - 0.5 * self.fx**2
        patch = _ellipse(self.fx, above, who.mouth_width * 1.05, 0.06)
        self._lay(self.hair * 0.75, np.maximum(who.moustache, 0) * self._inside(patch))

    def _curls(self) -> Array:
        return np.maximum(self.who.curl, 0) * _wave(3 * self.x + 0.3) * _wave(3 * self.y)

    def _front_hair(self) -> None:
        who = self.who
        end = self.fy - who.hair_length - 0.1
        grown = self.head - who.hair_volume * np.clip(-2.5 * end, 0.1, 1) - self._curls()
        x = self.fx
        line = who.hairline + who.hair_sweep * x - who.hair_peak * (0.25 - np.abs(x)) * 0.25
        side = np.abs(x) - who.head_width * who.hair_side + 0.05
        open_face = _rounded_max(line - self.fy, side, 0.25)
        cap = _rounded_max(np.maximum(grown, -open_face), end, 0.2)
        nx, ny, nz = self.normal
        strands = 1 + 0.07 * _wave(8 * self.x / (1.4 + self.y * self.y) + 3 * who.hair_sweep * self.y)
        shine = np.maximum(self._lambert(0.8 * nx, 0.8 * ny, np.maximum(nz, 0.45)), 0.4)
        self._lay(self.hair, self._inside(cap) * self.haired, strands * shine)

    def _glasses(self) -> None:
        who = self.who
        x, y = self.fx - 0.10 * self.photo.yaw, self.fy - who.eye_y - 0.02
        worn = (who.glasses > 0.75).astype(np.float32)
        tone = np.broadcast_to(who.glasses_tone[:, None], self.skin.shape)
        for side in (-1.0, 1.0):
            u, v = (side * x - who.eye_x) / who.glasses_size, y / (who.glasses_size * 0.85)
            square = _squircle(u, v, 0.85 * (1 - who.glasses_round))
            rim = (np.sqrt(np.maximum(square, 1e-6)) - 1) * who.glasses_size
            self._lay(tone, worn * self._stroke(rim, 0.018))
        bridge = self._stroke(y + 0.03, 0.014) * self._inside(np.abs(x) - who.eye_x + who.glasses_size)
        self._lay(tone, worn * bridge)

    def _mole(self) -> None:
        who = self.who
        spot = np.sqrt((self.fx - who.mole_x) ** 2 + (self.fy - who.mole_y) ** 2) - np.maximum(who.mole_size, 0)
        self._lay(self.skin * 0.35, (who.mole_size > 0.005) * self._inside(spot))

    def _exposed(self) -> Array:
        """The picture under the light's colour and the camera's tone curve."""
        photo = self.photo
        light = photo.intensity[:, None] * _colour(1 + photo.warmth, 1 + photo.tint, 1 - photo.warmth)
        seen = np.clip(self.albedo * self.shade[:, None] * light, 0, 1)
        tone = photo.tone[:, None]
        return seen * (1 + tone) / (1 + tone * seen)
