"""`python -m jaxlwp` is `jaxlwp`."""

from jaxlwp._cli import main

main(prog_name="jaxlwp")
