"""Roofline cost model: see ``cost``."""
