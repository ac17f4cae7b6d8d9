"""An OpenAI-compatible server over foredraft's engines: many users at once, streaming, the same tokens, sooner.

`foredraft.server.app.create_app` makes it; `foredraft serve` runs it. Importing this imports nothing.
"""
