"""Device graphs: mesh axes and rates, measured or given, and measurements on disk.

Read `_device_graph` first, then `_links` (collectives over several link levels), `_systems` (GPUs
and their links by published figures) and `_presets` (from files), `_rates` (the device graph of a
mesh) and `_calibrate` (measuring it), `_store` (measurements on disk, in a file that `_sqlite`
opens, for what `_environment` says) and `_processes` (several processes use the numbers of the
first, and find out what differs between them).
"""

from jaxlwp.devices._calibrate import measure
from jaxlwp.devices._device_graph import BUCKET_BYTES, DeviceGraph, LinkFit, MeshAxis
from jaxlwp.devices._environment import Environment, Measurement, environment_of, now
from jaxlwp.devices._presets import filled, load_system, preset, system_for, system_of
from jaxlwp.devices._processes import (
    check_same,
    check_short,
    from_first,
    local_devices,
    spans_processes,
)
from jaxlwp.devices._rates import (
    KIND,
    GivenDevices,
    GivenRates,
    Rates,
    choose_devices,
    device_graph,
    make_mesh,
    rates_key,
)
from jaxlwp.devices._store import Store, read_export
from jaxlwp.devices._systems import Gpu, Level, System

__all__ = [
    "BUCKET_BYTES",
    "DeviceGraph",
    "Environment",
    "GivenDevices",
    "GivenRates",
    "Gpu",
    "KIND",
    "Level",
    "LinkFit",
    "Measurement",
    "MeshAxis",
    "Rates",
    "Store",
    "System",
    "check_same",
    "check_short",
    "choose_devices",
    "device_graph",
    "environment_of",
    "filled",
    "from_first",
    "load_system",
    "local_devices",
    "make_mesh",
    "measure",
    "now",
    "preset",
    "rates_key",
    "read_export",
    "spans_processes",
    "system_for",
    "system_of",
]
