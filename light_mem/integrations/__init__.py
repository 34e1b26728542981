"""Plugs for the inference servers that people run, each imported only when it is used.

vllm/   a secondary tier of vLLM's tiering offload spec: docs/vllm.md
"""
