"""Who a draw belongs to: an identity and its family, or one image and its camera.

The one surprise: a person's attribute is the family's, unless this person redraws it. That makes look-alikes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chains.data.synthetic.arrays import Ints, Mask, Small, each
from chains.data.synthetic.draws import State, pick, state
from chains.data.synthetic.settings import FIRST_TEST_PID, PeopleSettings

_PERSON, _FAMILY, _SHOT, _CAMERA = 1, 2, 3, 4  # second key of every state, so that pid 3 and camera 3 differ


@dataclass(frozen=True)
class Person:
    """Choices that belong to n identities: the same in every image of each, and mostly shared with its look-alikes."""

    settings: PeopleSettings
    own: State
    family: State

    @classmethod
    def of(cls, settings: PeopleSettings, pids: Ints) -> Person:
        is_test = pids >= FIRST_TEST_PID
        family = np.where(is_test, pids - FIRST_TEST_PID, pids - 1) // settings.family_size
        seed = settings.seed
        return cls(settings, state(seed, _PERSON, pids), state(seed, _FAMILY, is_test, family))

    def pick(self, n: int, name: str) -> Small:
        """One of 0..n-1 per person: the family's, unless this person redraws the attribute. n <= 32768. (n, 1, 1)"""
        redrawn = pick(100, name + " redrawn", self.own) < self.settings.family_change_percent
        return each(pick(n, name, np.where(redrawn, self.own, self.family)))

    def chance(self, percent: int, name: str) -> Mask:
        return self.pick(100, name) < percent

    def between(self, low: int, high: int, name: str) -> Small:
        """One of low..high, both included."""
        return low + self.pick(high - low + 1, name)


@dataclass(frozen=True)
class Shot:
    """Choices that belong to n images: pose, crop, light, what stands in front. All answers are (n,)."""

    settings: PeopleSettings
    camids: Ints
    own: State
    camera: State

    @classmethod
    def of(cls, settings: PeopleSettings, pids: Ints, camids: Ints, shots: Ints) -> Shot:
        seed = settings.seed
        return cls(settings, camids, state(seed, _SHOT, pids, camids, shots), state(seed, _CAMERA, camids))

    def pick(self, n: int, name: str) -> Ints:
        return pick(n, name, self.own)

    def of_camera(self, n: int, name: str) -> Ints:
        """The same in every image of a camera."""
        return pick(n, name, self.camera)

    def between(self, low: int, high: int, name: str) -> Ints:
        """One of low..high, both included."""
        return low + self.pick(high - low + 1, name)
