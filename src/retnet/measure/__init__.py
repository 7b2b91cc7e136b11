"""Measurement for `retnet.bench` and `retnet.studies`: timing, memory, physical limits, tables, figures, records."""
