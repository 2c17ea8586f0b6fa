"""Device graphs: mesh axes and rates, measured or given, and measurements on disk.

Read `_device_graph` first, then `_calibrate` (measuring rates), `_store` (one SQLite file of
measurements) and `_processes` (several processes use the numbers of the first).
"""

from jaxlwp.devices._calibrate import (
    KIND,
    Rates,
    choose_devices,
    device_graph,
    local_devices,
    make_mesh,
    measure,
    rates_key,
)
from jaxlwp.devices._device_graph import DeviceGraph, LinkFit, MeshAxis
from jaxlwp.devices._processes import from_first, spans_processes
from jaxlwp.devices._store import Environment, Measurement, Store, environment_of, now, read_export

__all__ = [
    "DeviceGraph",
    "Environment",
    "KIND",
    "LinkFit",
    "Measurement",
    "MeshAxis",
    "Rates",
    "Store",
    "choose_devices",
    "device_graph",
    "environment_of",
    "from_first",
    "local_devices",
    "make_mesh",
    "measure",
    "now",
    "rates_key",
    "read_export",
    "spans_processes",
]
