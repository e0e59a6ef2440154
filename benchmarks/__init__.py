"""What is measured, against what. `python -m benchmarks.main_job --help`."""
