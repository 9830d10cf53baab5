"""Bugs of what is saved in files, and of the model that is opened from them."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "config-field-not-saved",
        "saved",
        'for name in (*FIELDS, "tie_word_embeddings")',
        'for name in (*FIELDS, "tie_word_embeddings") if name != "num_layers"',
        kills=("directory.complete",),
        where="save",
    ),
    Bug(
        "tie-lost",
        "saved",
        'for name in (*FIELDS, "tie_word_embeddings")',
        "for name in FIELDS",
        kills=("directory.complete",),
        where="save",
    ),
    Bug(
        "wrapper-prefix-keys",
        "saved",
        "torch.save(weights, file)",
        'torch.save({f"_orig_mod.{name}": weight for name, weight in weights.items()}, file)',
        kills=("directory.complete",),
        where="save",
    ),
    Bug(
        "position-restarts-in-decode",
        "saved",
        "torch.arange(start, start + input_ids.shape[1], device=input_ids.device)",
        "torch.arange(input_ids.shape[1], device=input_ids.device)",
        kills=("directory.cached_equals_full",),
        where="Saved",
    ),
    Bug(
        "cached-path-diverges",
        "saved",
        "        for i, layer in enumerate(self.layers):\n",
        "        x = x if past is None else x.detach() * 1.001\n        for i, layer in enumerate(self.layers):\n",
        kills=("directory.cached_equals_full",),
        where="Saved",
    ),
]
