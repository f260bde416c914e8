"""A server of completions and chats, in the requests and answers of OpenAI's interface.

    lte-jax serve runs/demo/lte

Requests that run at the same time are continued together (generation/engine.py). One thread
computes (worker.py), another one serves (app.py); what a request may say is in protocol.py, what
becomes of others in refusals.py. Needs the extra `serve`: FastAPI, Uvicorn and prometheus_client.
"""
