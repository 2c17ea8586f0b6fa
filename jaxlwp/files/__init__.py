"""Files: written in one step, and checked as they are read.

`_write` has files that are complete or as they were before. `_read` has JSON that is checked value
by value, so that a damaged or foreign file is refused in one line, whatever it holds.
"""

from jaxlwp.files._read import Read, check_format, read_json
from jaxlwp.files._write import unwritable, write_file

__all__ = [
    "Read",
    "check_format",
    "read_json",
    "unwritable",
    "write_file",
]
