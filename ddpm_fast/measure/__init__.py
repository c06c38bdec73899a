"""Measurement: interleaved timings, machine ceilings, counts of work, and comparisons with upstream."""
