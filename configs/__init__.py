"""Experiment configurations; base.py documents every key."""
