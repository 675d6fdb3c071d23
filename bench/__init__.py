"""One script a kernel: ``python -m groupwise.bench.NAME`` checks it, times it, and prints a table and a JSON line."""
