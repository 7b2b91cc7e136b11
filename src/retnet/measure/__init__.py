"""Measuring: how anything is timed, weighed, tabled, drawn and recorded; `retnet.bench` and `retnet.studies` say what."""
