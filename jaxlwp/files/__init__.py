"""Files: written in one step, and checked as they are read.

`_write` has files that are complete or as they were before. `_text` reads texts and JSON with
errors of one line. `_read` has JSON that is checked value by value, so that a damaged or foreign
file is refused in one line, whatever it holds.
"""

from jaxlwp.files._read import Read, check_format, read_json
from jaxlwp.files._text import is_text, parse_json, read_text, reason
from jaxlwp.files._write import unwritable, write_file

__all__ = [
    "Read",
    "check_format",
    "is_text",
    "parse_json",
    "read_json",
    "read_text",
    "reason",
    "unwritable",
    "write_file",
]
