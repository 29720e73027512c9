"""Checkpoints: from the ``model`` section to checked files, shape, tokenizer. No torch here.

``find`` and ``describe`` are in ``find.py``; tensors for torch in ``executors/torch/weights.py``.
"""
