"""A fuzzer of programs: random small programs under random strategies on random meshes.

Read in this order: `operators` (what a program is made of), `programs` (drawing one and writing it
down as Python), `strategies` (meshes and strategies), `checks` (what must hold), `shrink` (fewer
operators for what fails), `planted` (faults that must be found), `pool` (worker processes),
`__main__` (the command line).
"""
