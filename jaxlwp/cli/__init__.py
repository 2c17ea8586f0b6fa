"""The command line.

`_commands` has the commands about a model on devices, `_search` those about saved problems and
strategies, `_simulate` the one about systems that are not at hand, `_cache` those about
measurements, `_doctor` the one about what is here; `_workload` loads the model, and `_shell` has
what all commands share.
"""

from jaxlwp.cli._cache import cache
from jaxlwp.cli._commands import main
from jaxlwp.cli._doctor import doctor
from jaxlwp.cli._search import diff_command, search_command
from jaxlwp.cli._simulate import simulate

main.add_command(cache)
main.add_command(diff_command)
main.add_command(doctor)
main.add_command(search_command)
main.add_command(simulate)

__all__ = [
    "main",
]
