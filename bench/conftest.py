"""Microbenchmarks: ``pytest bench/`` runs them, with every option of pytest-benchmark."""
