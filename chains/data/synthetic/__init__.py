"""Synthetic people: a deterministic renderer of pedestrians, the data set of the tests, the demo and the benchmarks.

Every image is a function of (settings, pid, camid, shot) and of nothing else: all choices come from one counter-based
hash, so a crop does not depend on its batch, on the order of calls or on the machine. Pixels are integer arithmetic.

How a crop comes to be, and the module to read for it; each needs only those above it:

    settings    one site: how many people, seen by which cameras, how hard to tell apart
    arrays      the array types, and four bytes to a pixel
    draws       the hash: a number for a name and some keys, and smooth noise
    choices     who a draw belongs to: a person and a family of look-alikes, or a shot and its camera
    materials   what a point of the picture is made of, and its colour on each person
    patterns    cloth patterns and chest emblems
    canvas      256 x 128 points of material and shade; parts of a body as boxes and outlines
    figure      people in their pose, before they are painted, and what they wear
    legs, upper_body, head, bags    the parts, painted one by one
    painting    all parts, from far to near
    framing     the detector's box: scaled, leant, shifted; occluders stand in front
    background  the camera's panorama
    camera      2 x 2 points become a pixel; light, blur, colour cast and noise
    renderer    all of the above, for some pids, camids and shots
    splits      training, query and gallery images, in memory, in pieces or as files

The one surprise: identities come in families of look-alikes. A family shares every attribute, and each member redraws
only some of them, so that two members may differ in a chest emblem and a trouser seam.
"""

from chains.data.synthetic.renderer import render
from chains.data.synthetic.settings import FIRST_TEST_PID, STATION, PeopleSettings
from chains.data.synthetic.splits import (
    FOLDERS,
    gallery_images,
    query_images,
    stream,
    train_images,
    write_market1501,
)

__all__ = [
    "FIRST_TEST_PID",
    "FOLDERS",
    "STATION",
    "PeopleSettings",
    "gallery_images",
    "query_images",
    "render",
    "stream",
    "train_images",
    "write_market1501",
]
