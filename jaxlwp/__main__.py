"""`python -m jaxlwp` is `jaxlwp`."""

from jaxlwp.cli._commands import main

main(prog_name="jaxlwp")
