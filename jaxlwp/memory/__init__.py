"""Bytes of a training step on each device, as XLA for GPUs lays them out.

Read `_memory` first (of strategies, and of each layer under each config), then `_buffers` (what is
live when, followed through a program).
"""

from jaxlwp.memory._memory import (
    Memory,
    MemoryCosts,
    MemoryTables,
    memory_costs,
    strategy_memory,
)

__all__ = [
    "Memory",
    "MemoryCosts",
    "MemoryTables",
    "memory_costs",
    "strategy_memory",
]
