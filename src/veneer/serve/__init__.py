"""A server with OpenAI's API: many adapters, of any method, on one base model, in one running batch.

Imports `model`, `core`, `data`, `upstream`, `files` and `errors`; fastapi, uvicorn and prometheus-client are in the
extra `serve`. Start with `engine.py`, the thread that owns the model; `app.py` is the HTTP side.
"""
