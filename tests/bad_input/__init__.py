"""What users get wrong, and the line that each gets.

`cases` has the table, which docs/errors.md shows; `desk` is what its calls and commands meet: one
small function, its plan, and a folder with files that are wrong.
"""
