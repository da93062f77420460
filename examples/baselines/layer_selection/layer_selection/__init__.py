"""Selective layer fine-tuning: the apps of the installed `layerfed`."""
