"""Photographs of people: figures are painted, framed, coloured, put before a background and developed.

The one surprise: work goes in chunks of 32 images, for speed alone; no image depends on the others of its chunk.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from chains.data.synthetic.arrays import Bytes, Ints
from chains.data.synthetic.background import backgrounds
from chains.data.synthetic.camera import develop
from chains.data.synthetic.choices import Person, Shot
from chains.data.synthetic.framing import Crop, paint_occluders
from chains.data.synthetic.materials import BACKGROUND, MATERIALS, palette
from chains.data.synthetic.painting import paint
from chains.data.synthetic.settings import LAST_PID, PeopleSettings
from chains.errors import DataError

_CHUNK = 32  # figures painted at once: their canvases stay in the second-level cache


def render(
    settings: PeopleSettings, pids: npt.ArrayLike, camids: npt.ArrayLike, shots: npt.ArrayLike
) -> npt.NDArray[np.uint8]:
    """Photograph person pids[i] by camera camids[i] for the shots[i]-th time. uint8 (n, height, width, 3)

    An image depends on the settings and its own three numbers only, not on the others in the call. Raises `DataError`
    where the arrays differ in length, a pid is outside 1..9999, a shot below 0 or a camid outside 1..cameras.
    """
    keys = [np.asarray(k, dtype=np.int64).reshape(-1) for k in (pids, camids, shots)]
    if len({len(k) for k in keys}) != 1:
        raise DataError(f"pids, camids and shots must be equally long, not {[len(k) for k in keys]}")
    bounds = {"pids": (1, LAST_PID), "camids": (1, settings.cameras), "shots": (0, 2**31)}
    for (name, (low, high)), values in zip(bounds.items(), keys, strict=True):
        if ((values < low) | (values > high)).any():
            raise DataError(f"{name} must lie in {low}..{high}; got {values.min()}..{values.max()}")
    out = np.empty((len(keys[0]), settings.height, settings.width, 3), np.uint8)
    for start in range(0, len(out), _CHUNK):
        part = slice(start, start + _CHUNK)
        out[part] = _render_chunk(settings, *(k[part] for k in keys))
    return out


def _render_chunk(settings: PeopleSettings, pids: Ints, camids: Ints, shots: Ints) -> Bytes:
    person, shot = Person.of(settings, pids), Shot.of(settings, pids, camids, shots)
    canvas, crop = paint(person, shot), Crop.of(shot)
    material, shade = crop.look(canvas.material), crop.look(canvas.shade)
    paint_occluders(material, shade, shot)
    colours = palette(person, shot).reshape(-1)[(np.arange(len(pids)) * MATERIALS)[:, None, None] + material]
    np.copyto(colours, backgrounds(shot), where=material == BACKGROUND)
    return develop(colours | shade.astype(np.uint32) << np.uint32(24), shot)
