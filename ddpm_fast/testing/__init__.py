"""The tolerance rule and the cases that tests and benchmarks share."""
