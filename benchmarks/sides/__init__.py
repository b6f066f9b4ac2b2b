"""Whoever does the work that is measured, one file each."""
