"""Times of layers on the devices at hand.

Read `_timer` first, then `_timing` (programs run in turn), `_local` (the work of one layer on one
device, alone), `_pages` (memory that a run takes anew) and `_profile` (measurements of another
machine).
"""

from jaxlwp.measure._profile import Profile, load_profile
from jaxlwp.measure._timer import LayerTimer, TimingCache, layer_timer

__all__ = [
    "LayerTimer",
    "Profile",
    "TimingCache",
    "layer_timer",
    "load_profile",
]
