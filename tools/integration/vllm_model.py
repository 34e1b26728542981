"""The tiny model of `vllm_restart.py` and `lmcache_restart.py`."""

from __future__ import annotations

import json
from pathlib import Path

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_model(directory: Path, seed: int) -> None:
    """A Llama with random weights whose answers depend on all of a prompt: vLLM's own dummy weights
    are so small that the last token alone decides."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    hidden, inner, vocab = MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["vocab_size"]
    heads = {"q": MODEL["num_attention_heads"], "k": MODEL["num_key_value_heads"]}

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain / columns**0.5)

    tensors = {
        "model.embed_tokens.weight": matrix(vocab, hidden, hidden**0.5),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": matrix(vocab, hidden),
    }
    for n in range(MODEL["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        width = {name: count * MODEL["head_dim"] for name, count in heads.items()}
        tensors |= {
            layer + "input_layernorm.weight": torch.ones(hidden),
            layer + "post_attention_layernorm.weight": torch.ones(hidden),
            layer + "self_attn.q_proj.weight": matrix(width["q"], hidden, 2.0),
            layer + "self_attn.k_proj.weight": matrix(width["k"], hidden, 2.0),
            layer + "self_attn.v_proj.weight": matrix(width["k"], hidden, 2.0),
            layer + "self_attn.o_proj.weight": matrix(hidden, width["q"], 2.0),
            layer + "mlp.gate_proj.weight": matrix(inner, hidden),
            layer + "mlp.up_proj.weight": matrix(inner, hidden),
            layer + "mlp.down_proj.weight": matrix(hidden, inner),
        }
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(MODEL))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
