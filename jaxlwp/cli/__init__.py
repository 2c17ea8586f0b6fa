"""The command line.

`_commands` has the commands; `_workload` loads the model that they are about.
"""

from jaxlwp.cli._commands import main

__all__ = [
    "main",
]
