"""Plumbing that a reader of train.py may skip at first."""
