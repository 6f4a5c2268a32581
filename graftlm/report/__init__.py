"""Explain finished and unfinished runs: one run folder in, one self-contained HTML file out."""
