"""The ``torch`` executor: real weights, real tokens. The only place in the tree that knows model modules.

Read in this order: ``executor`` (one launch from batch to outcomes), ``decoder`` (the model), ``rope``,
``linear``, ``weights`` (files to tensors), ``sampler``.
"""
