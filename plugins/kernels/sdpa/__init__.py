"""``sdpa``: attention by PyTorch's own scaled-dot-product kernel, over paged or contiguous KV. A baseline.

``backend`` is the half without torch (what it reads, what it costs), ``impl`` the half that computes.
"""
