"""What Jia et al. (ICML 2018) published: set-up, Tables 3 to 5, Figures 7 and 8.

Figures are read off bars, good to about 1 %.
"""

from __future__ import annotations

from collections.abc import Mapping

COUNTS = (1, 2, 4, 8, 16)
"""Numbers of P100s: up to 4 in one node, 8 in two, 16 in four; NVLink inside, 100 Gb/s between."""

BATCH = 32
"""Examples of each GPU."""

NETWORKS = ("AlexNet", "VGG-16", "Inception-v3")
STRATEGIES = ("model", "data", "owt", "search")

IMAGES_PER_S: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "AlexNet": {
        "model": (745, 1303, 1824, 2460, 3303),
        "data": (745, 1181, 1760, 2484, 3230),
        "owt": (745, 1400, 2029, 3043, 4260),
        "search": (745, 1492, 2741, 4934, 9045),
    },
    "VGG-16": {
        "model": (184, 313, 502, 778, 1048),
        "data": (184, 343, 632, 1080, 1660),
        "owt": (184, 360, 700, 1216, 1990),
        "search": (184, 364, 727, 1417, 2715),
    },
    "Inception-v3": {
        "model": (157, 220, 264, 224, 160),
        "data": (157, 305, 503, 966, 1690),
        "owt": (157, 310, 522, 992, 1745),
        "search": (157, 316, 632, 1248, 2430),
    },
}
"""Figure 7, by number of GPUs as in `COUNTS`; "search" is layer-wise parallelism."""

MOVED_GB: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "AlexNet": {
        "model": (0.28, 0.57, 1.13, 2.26),
        "data": (1.11, 2.23, 4.46, 8.91),
        "owt": (0.049, 0.121, 0.339, 1.06),
        "search": (0.049, 0.098, 0.195, 0.390),
    },
    "VGG-16": {
        "model": (3.6, 7.2, 14.4, 28.8),
        "data": (2.06, 4.12, 8.23, 16.5),
        "owt": (0.239, 0.541, 1.34, 3.69),
        "search": (0.208, 0.336, 0.687, 1.63),
    },
    "Inception-v3": {
        "model": (3.45, 6.90, 13.8, 27.6),
        "data": (0.355, 0.710, 1.42, 2.84),
        "owt": (0.326, 0.656, 1.33, 2.72),
        "search": (0.282, 0.563, 1.13, 2.25),
    },
}
"""Figure 8: GB of a step, all GPUs together, on 2, 4, 8 and 16."""

SEARCH: Mapping[str, tuple[int, str, float]] = {
    "LeNet-5": (6, "5.6 s", 0.01),
    "AlexNet": (11, "2.1 h", 0.02),
    "VGG-16": (21, "> 24 h", 0.1),
    "Inception-v3": (102, "> 24 h", 0.4),
}
"""Table 3, 4 GPUs: layers, seconds of depth-first search and of elimination."""

ERRORS: Mapping[str, tuple[float, ...]] = {
    "AlexNet": (0.01, 0.04, -0.05, 0.02, -0.01),
    "VGG-16": (0.00, 0.03, 0.02, 0.06, 0.07),
    "Inception-v3": (0.01, 0.05, 0.05, 0.09, 0.06),
}
"""Table 4: (seconds by the cost model - seconds measured) / seconds measured."""

GROUPS_1_TO_4 = ("conv[1-4]_*", "max_pool_[0-3]")
GROUP_5 = ("conv5_*", "max_pool_4")

VGG_PLAN: Mapping[str, Mapping[str, int]] = {
    **dict.fromkeys(GROUPS_1_TO_4, {"sample": 4}),
    **dict.fromkeys(GROUP_5, {"height": 2, "width": 2}),
    "fc6": {"channel": 4},
    "fc7": {"channel": 4},
    "fc8": {"channel": 2},
    "take_0": {},
}
"""Table 5: VGG-16 on 4 GPUs of one node, by patterns of our layers' names; take_0 is the loss."""
