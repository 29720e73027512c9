"""``LLM``: the engine behind a Python object.

``llm`` is the object, ``setup`` makes a run of its arguments, ``stream_text`` its growing texts. Requests
reach the engine by ``servelab.core.client``, from any thread.
"""
