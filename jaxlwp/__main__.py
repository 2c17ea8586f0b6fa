"""`python -m jaxlwp` is `jaxlwp`."""

from jaxlwp.cli import main

main(prog_name="jaxlwp")
