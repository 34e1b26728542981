"""Plugs for the inference servers that people run, each imported only when it is used.

lmcache/  an L2 adapter of LMCache's multi-process mode: docs/lmcache.md
sglang/   a storage backend of SGLang's HiCache: docs/sglang.md
vllm/     a secondary tier of vLLM's tiering offload spec: docs/vllm.md

What they have in common:

namespace.py   what a key of a server means besides the tokens it stands for
plain_data.py  configurations of servers as plain data, for a namespace
settings.py    options read, the service started
weights.py     which weights a model has
"""
