"""Experiment configurations; base.py has every key, the others change some."""
