"""What the wrong calls and command lines of docs/errors.md meet; tests/test_bad_input.py runs them."""
