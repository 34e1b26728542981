"""Plugs for the inference servers that people run, each imported only when it is used.

vllm/     a secondary tier of vLLM's tiering offload spec: docs/vllm.md
lmcache/  an L2 adapter of LMCache's multi-process mode: docs/lmcache.md
"""
