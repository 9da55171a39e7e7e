"""Paint n people, each part over those behind it.

The one surprise: the order is the same for every direction; only which limb is the near one, and whether the backpack
goes behind the body or over it, depends on where a person looks.
"""

from __future__ import annotations

from chains.data.synthetic.bags import paint_backpack, paint_bag, paint_straps
from chains.data.synthetic.canvas import Canvas
from chains.data.synthetic.choices import Person, Shot
from chains.data.synthetic.figure import Figure
from chains.data.synthetic.head import paint_head
from chains.data.synthetic.legs import paint_leg, paint_skirt
from chains.data.synthetic.upper_body import paint_arm, paint_torso

_FAR, _NEAR = -1, 1


def paint(person: Person, shot: Shot) -> Canvas:
    """The people on canvases of their own, from far to near; attributes are the person's, pose is the shot's."""
    figure = Figure.of(person, shot)
    paint_backpack(figure, seen=~figure.away)
    paint_arm(figure, _FAR)
    paint_leg(figure, _FAR)
    paint_leg(figure, _NEAR)
    paint_torso(figure)
    paint_skirt(figure)
    paint_arm(figure, _NEAR)
    paint_head(figure)
    paint_backpack(figure, seen=figure.away)
    paint_straps(figure)
    paint_bag(figure)
    return figure.canvas
