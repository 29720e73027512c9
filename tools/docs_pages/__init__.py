"""The parts of the documentation that are made from code: one module per page or table.

``python tools/generate_docs.py --write`` puts all of them in place.
"""
