"""What the wrong calls and command lines of docs/errors.md meet."""
