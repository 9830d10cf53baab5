"""Bugs of sliding windows, and of the ring buffers that keep no more than a window."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "window-off-by-one",
        "windowed",
        "gap < WINDOW",
        "gap <= WINDOW",
        kills=("window.width",),
        where="sdpa",
    ),
    Bug(
        "window-off-by-one",
        "windowed",
        "gap < WINDOW",
        "gap < WINDOW - 1",
        kills=("causality.each_backend",),
        where="eager",
    ),
    Bug(
        "window-ignored-in-decode",
        "windowed",
        "attn_mask=seen",
        "attn_mask=seen if q.shape[2] > 1 else None",
        kills=("decode.cached_equals_full",),
        where="sdpa",
    ),
    Bug(
        "ring-cache-overwritten",
        "windowed",
        "position = torch.arange(self.seen - len(kept), end)\n        return torch.cat((old_k, k), 2), torch.cat((old_v, v), 2), position",
        "position = torch.arange(max(0, end - WINDOW), end)\n        k, v = (ring[:, :, position % WINDOW] for ring in self.layers[layer])\n        return k, v, position",
        kills=("decode.chunks",),
        where="RingCache",
    ),
    Bug(
        "position-from-kept-length",
        "windowed",
        "else cache.seen",
        "else min(cache.seen, WINDOW - 1)",
        kills=("decode.cached_equals_full",),
        where="Windowed",
    ),
]
