"""Plugs for the inference servers that people run, each imported only when it is used.

sglang/   a storage backend of SGLang's HiCache: docs/sglang.md
vllm/     a secondary tier of vLLM's tiering offload spec: docs/vllm.md
"""
