"""One request: load what is stored of the prompt, compute the rest, decode, store what is new."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from time import perf_counter
from typing import Any

import torch
from transformers import DynamicCache

from .cache import PrefixCache
from .model import Model

# Tokens that go through the model at once. Attention needs memory for a chunk against all tokens
# before it: without chunks that would grow with the square of the prompt.
CHUNK = 2048


class Generation:
    """The answer to one prompt, greedy: iterate over it once for its tokens.

    The other attributes are true from the first token on. Closing the iterator early (the client
    has gone) stores what was computed until then.
    """

    def __init__(
        self,
        model: Model,
        prefixes: PrefixCache | None,
        prompt: Sequence[int],
        max_tokens: int,
    ) -> None:
        self._model = model
        self._prefixes = prefixes
        self._cache: Any = DynamicCache(config=model.network.config)
        self.prompt = list(prompt)
        self.max_tokens = max_tokens
        self.tokens: list[int] = []
        self.cached_tokens = 0  # of the prompt; the others went through the model
        self.match_seconds = 0.0  # looking the prompt up
        self.load_seconds = 0.0  # bringing its K and V back
        self.first_token_seconds = 0.0  # both, the rest of the prefill, and the argmax

    def __iter__(self) -> Generator[int, None, None]:
        started = perf_counter()
        try:
            self._load()
            for begin in range(self.cached_tokens, len(self.prompt), CHUNK):
                token = self._forward(self.prompt[begin : begin + CHUNK])
            self.first_token_seconds = perf_counter() - started
            while True:
                self.tokens.append(token)
                yield token
                if len(self.tokens) >= self.max_tokens or token in self._model.end_tokens:
                    break
                token = self._forward([token])
        finally:
            self._store()

    def _load(self) -> None:
        if self._prefixes is None:
            return
        prefix = self._prefixes.load(self.prompt)
        for layer, (keys, values) in enumerate(prefix.layers):
            self._cache.update(keys[None], values[None], layer)
        self.cached_tokens = prefix.tokens
        self.match_seconds = prefix.match_seconds
        self.load_seconds = prefix.load_seconds

    @torch.inference_mode()
    def _forward(self, tokens: Sequence[int]) -> int:
        """Append `tokens` to the cache; returns the most likely next one.

        A chunk that begins at a loaded prefix has another height than in a run without the cache,
        and matrix products of another height add in another order: the logits agree up to
        rounding, not in every bit. (`light_mem/demo` shows what equal bits take.)
        """
        result = self._model.network(
            input_ids=torch.tensor([tokens]),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return int(result.logits[0, -1].argmax())

    def _store(self) -> None:
        """Prompt *and* answer: in a conversation they are the beginning of the next prompt."""
        # The last token was chosen but has not been through the model: it has no K and V. The
        # least of all layers, because an error may have struck between two of them.
        known = min(layer.get_seq_length() for layer in self._cache.layers)
        if self._prefixes is None or not known:
            return
        layers = [(layer.keys[0], layer.values[0]) for layer in self._cache.layers]
        self._prefixes.store((self.prompt + self.tokens)[:known], layers)
