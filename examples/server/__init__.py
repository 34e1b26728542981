"""An inference server that keeps the prefixes of its prompts across restarts with LightMem.

    python -m examples.server --model small --store ./kv-store --processes 2

Made to be copied: the folder has no other dependency than light_mem and transformers, and imports
only from itself. `docs/example-server.md` starts it from nothing and shows a hit after a restart.

    prefix.py    a name for every full page of a prompt: a chain of hashes over its tokens
    pages.py     K and V of some tokens as one row of the KV tensor; who has which row
    cache.py     load a prefix, store a prefix: everything that touches LightMem
    model.py     a model by name or path, its tokenizer, its identity, the shape of its K and V
    generate.py  one request: load, prefill the rest, decode, store
    web.py       HTTP: JSON in, a stream of server-sent events out
    process.py   one server process: model, KV tensor, LocalCacheService, web server
    __main__.py  the command: binds the port, starts the processes and replaces dead ones
    client.py    a client, and a server started for it: for tests and the benchmark
"""
