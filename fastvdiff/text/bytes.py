"""A text encoder without files: UTF-8 bytes through a small pre-norm transformer, trained with the model it feeds."""

import math
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

BYTES = 256
PAD, BEGIN, END = BYTES, BYTES + 1, BYTES + 2
VOCABULARY = BYTES + 3
MAX_NGRAM = 7  # VOCABULARY ** 7 is the largest power that an int64 holds
LEAST = {"width": 1, "depth": 0, "heads": 1, "max_length": 3, "mlp_ratio": 1, "ngram_buckets": 1}
LENGTH_MULTIPLE = 8  # padded lengths: few enough for a compiled model to see each of them once


@dataclass(frozen=True)
class ByteTextEncoderConfig:
    """Sizes of a `ByteTextEncoder`.

    `width` is the width D of the output, `max_length` counts the begin and end marks, `mlp_ratio` is the hidden width
    of the feed-forward part over `width`. With `lowercase`, "Red Circle" reads as "red circle".
    """

    width: int = 128
    depth: int = 3
    heads: int = 4
    max_length: int = 64
    mlp_ratio: int = 4
    lowercase: bool = True
    ngrams: tuple[int, ...] = ()
    ngram_buckets: int = 1021

    def __post_init__(self) -> None:
        object.__setattr__(self, "ngrams", tuple(self.ngrams))  # JSON has lists only
        for name, least in LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"ByteTextEncoderConfig: {name}: expected an integer >= {least}, got {value!r}")
        if self.width % self.heads:
            raise ValueError(f"ByteTextEncoderConfig: heads={self.heads} does not divide width={self.width}")
        in_range = all(isinstance(length, int) and 2 <= length <= MAX_NGRAM for length in self.ngrams)
        if not in_range or len(set(self.ngrams)) != len(self.ngrams):
            raise ValueError(
                f"ByteTextEncoderConfig: ngrams: expected different integers from 2 to {MAX_NGRAM}, got {self.ngrams!r}"
            )


class ByteTextEncoder(nn.Module, PyTorchModelHubMixin, library_name="fastvdiff", tags=["text-encoder"]):
    """Encode prompts in any language from their bytes.

    ```python
    ids, mask = encoder.encode(prompts)                      # text to integers, no parameters
    hidden, mask = encoder.forward_ids(ids, mask, drop)      # tensors only: compile this one
    ```

    With `config.ngrams`, each byte's embedding is joined by those of the n-grams that end there, looked up by a hash
    (Pagnoni et al. 2024, arXiv:2412.09871, section 3.2.1): words differ from the first step on, before any block has
    learned to put bytes together.

    The unconditional embedding is one learned vector at position 0, everything after it masked; it stands for the empty
    prompt and for every prompt that `drop` marks. `save_pretrained` and `from_pretrained` write and read
    `config.json` and `model.safetensors`, without a network for a local folder.
    """

    # The hub mixin reads this annotation to rebuild the config from JSON: it must be the class, not a string.
    def __init__(self, config: ByteTextEncoderConfig = ByteTextEncoderConfig()) -> None:
        super().__init__()
        self.config = config
        self.dim = config.width
        self.max_length = config.max_length
        self.token_embedding = nn.Embedding(VOCABULARY, config.width)
        self.ngram_embeddings = nn.ModuleList(nn.Embedding(config.ngram_buckets, config.width) for _ in config.ngrams)
        self.position_embedding = nn.Parameter(torch.empty(config.max_length, config.width))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.null_embedding = nn.Parameter(torch.empty(config.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise embeddings with std 1, the rest as GPT-2 does: 0.02, less for what writes to the residual stream.

        Embeddings of 0.02 drown in the biases that joint training learns first: soon every prompt reads alike.
        """
        tables = (table.weight for table in (self.token_embedding, *self.ngram_embeddings))
        for weight in (*tables, self.position_embedding, self.null_embedding):
            nn.init.normal_(weight, std=1.0)
        for block in self.blocks:
            for linear in (block.qkv, block.attention_out, block.mlp_in, block.mlp_out):
                onto_residual = linear is block.attention_out or linear is block.mlp_out
                scale = 1 / math.sqrt(2 * len(self.blocks)) if onto_residual else 1.0
                nn.init.normal_(linear.weight, std=0.02 * scale)
                nn.init.zeros_(linear.bias)

    def encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn prompts into byte ids: begin mark, UTF-8 bytes, end mark, padding.

        Text is first NFC-normalised, its white space collapsed and, if the config says so, lower-cased. A prompt of
        more than `max_length` - 2 bytes is cut before the character that does not fit, with a warning.

        Args:
            prompts: B strings.

        Returns:
            ids (B, L) int64 and mask (B, L) bool, on the CPU; L is the longest prompt's length rounded up to a multiple
            of 8, at most `max_length`.

        Raises:
            TypeError: `prompts` is one string, or holds something that is not a string.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            got = "one str" if isinstance(prompts, str) else type(prompts).__name__
            raise TypeError(f"ByteTextEncoder: prompts: expected a list of str, got {got}")
        if not all(isinstance(prompt, str) for prompt in prompts):
            kinds = sorted({type(prompt).__name__ for prompt in prompts})
            raise TypeError(f"ByteTextEncoder: prompts: expected a list of str, got {kinds}")
        rows = [[BEGIN, *self._bytes(prompt), END] for prompt in prompts]
        longest = max((len(row) for row in rows), default=2)
        length = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, self.max_length)
        ids = torch.full((len(rows), length), PAD, dtype=torch.int64)
        for row, target in zip(rows, ids, strict=True):
            target[: len(row)] = torch.tensor(row)
        return ids, ids != PAD

    def forward(self, prompts: Sequence[str], drop: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prompts on the parameters' device: hidden (B, L, D) and mask (B, L) bool; see `TextEncoder`."""
        device = self.null_embedding.device
        ids, mask = self.encode(prompts)
        if drop is not None:
            if drop.dtype != torch.bool or drop.shape != (len(ids),):
                raise ValueError(
                    f"ByteTextEncoder: drop: expected a bool tensor of shape ({len(ids)},), "
                    f"got {drop.dtype} {tuple(drop.shape)}"
                )
            drop = drop.to(device)
        return self.forward_ids(ids.to(device), mask.to(device), drop)

    def forward_ids(
        self, ids: torch.Tensor, mask: torch.Tensor, drop: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode what `encode` gave: ids (B, L) int64, mask (B, L) bool, drop (B,) bool or None.

        Returns hidden (B, L, D), zero where masked, and the mask, which for an unconditional row keeps position 0 only.
        """
        hidden = self.token_embedding(ids) + self.position_embedding[: ids.shape[1]]
        for length, table in zip(self.config.ngrams, self.ngram_embeddings, strict=True):
            hidden = hidden + table(ngram_numbers(ids, length) % self.config.ngram_buckets)
        attend = mask[:, None, None, :]
        for block in self.blocks:
            hidden = block(hidden, attend)
        hidden = self.norm(hidden)
        unconditional = ids[:, 1] == END
        if drop is not None:
            unconditional = unconditional | drop
        first = torch.arange(ids.shape[1], device=ids.device) == 0
        mask = torch.where(unconditional[:, None], first, mask)
        hidden = torch.where(unconditional[:, None, None], self.null_embedding, hidden)
        return hidden.masked_fill(~mask[..., None], 0.0), mask

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **options: Any) -> Self:
        # The mixin's default loads the keys that happen to match and leaves the rest at random, silently.
        return super()._from_pretrained(strict=strict, **options)

    @classmethod
    def _load_as_pickle(cls, *arguments: Any) -> NoReturn:
        # What the mixin falls back to when a repository has no model.safetensors.
        raise ValueError("ByteTextEncoder: found no model.safetensors; pickled weights are not read")

    def _bytes(self, prompt: str) -> bytes:
        """The prompt's normalised UTF-8 bytes, at most `max_length` - 2, never ending inside a character."""
        text = " ".join(unicodedata.normalize("NFC", prompt).split())
        data = (text.lower() if self.config.lowercase else text).encode("utf-8", errors="replace")
        limit = self.max_length - 2
        if len(data) <= limit:
            return data
        kept = data[:limit].decode("utf-8", errors="ignore").encode("utf-8")
        warnings.warn(
            f"prompt of {len(data)} bytes cut to {len(kept)} (max_length {self.max_length}): "
            f"{kept.decode('utf-8')[-24:]!r} is the last that is read",
            stacklevel=2,
        )
        return kept


def ngram_numbers(ids: torch.Tensor, length: int) -> torch.Tensor:
    """The `length` ids that end at each position as one number in base `VOCABULARY`; before the first, `PAD`.

    ids (B, L) int64 -> (B, L) int64, different for different n-grams.
    """
    numbers = ids
    for back in range(1, length):
        numbers = numbers + F.pad(ids, (back, 0), value=PAD)[:, : ids.shape[1]] * VOCABULARY**back
    return numbers


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on (B, L, D)."""

    def __init__(self, config: ByteTextEncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, config.mlp_ratio * config.width)
        self.mlp_out = nn.Linear(config.mlp_ratio * config.width, config.width)

    def forward(self, x: torch.Tensor, attend: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
