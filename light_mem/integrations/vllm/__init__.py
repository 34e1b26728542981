"""LightMem as a secondary tier of vLLM's KV offloading: chunks that outlive the engine.

tier.py           LightMemTier: the class that vLLM makes, and all that touches vLLM's types
transfers.py      TierTransfers: jobs on their way to and from the store, without blocking anyone
background.py     the threads that do them; jobs.py: what passes between them and the scheduler
opening.py        a service over the rows of the primary tier
namespace.py      Namespace: what a key means besides the tokens it stands for
engine_config.py  vLLM's configuration as plain data
weights.py        which weights a model has
plugin.py         the short name `light_mem` for vLLM's configuration

Only tier.py and plugin.py import vLLM.
"""
