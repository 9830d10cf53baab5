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
        "position = torch.arange(self.seen - len(kept), end, device=k.device)\n        return torch.cat((old_k, k), 2), torch.cat((old_v, v), 2), position",
        "position = torch.arange(max(0, end - WINDOW), end, device=k.device)\n        k, v = (ring[:, :, position % WINDOW] for ring in self.layers[layer])\n        return k, v, position",
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
    Bug("window-off-by-one", "rolling", "gap < WINDOW", "gap <= WINDOW", kills=("window.width",), where="Attention"),
    Bug(
        "window-ignored-in-decode",
        "rolling",
        "mask = (gap >= 0) & (gap < WINDOW)\n        n_rep = self.n_heads // self.n_kv_heads\n        keys = xk[:, :, :, None].expand(-1, -1, -1, n_rep, -1).flatten(2, 3)\n        values = xv[:, :, :, None].expand(-1, -1, -1, n_rep, -1).flatten(2, 3)\n        xq, keys, values = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)\n        out = F.scaled_dot_product_attention(xq, keys, values, attn_mask=mask)\n        out = self.wo(out.transpose(1, 2).reshape(bs, t, -1))\n        return out, (xk[:, -(WINDOW - 1) :], xv[:, -(WINDOW - 1) :])",
        "mask = (gap >= 0) & (gap < (WINDOW if t > 1 else s + 1))\n        n_rep = self.n_heads // self.n_kv_heads\n        keys = xk[:, :, :, None].expand(-1, -1, -1, n_rep, -1).flatten(2, 3)\n        values = xv[:, :, :, None].expand(-1, -1, -1, n_rep, -1).flatten(2, 3)\n        xq, keys, values = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)\n        out = F.scaled_dot_product_attention(xq, keys, values, attn_mask=mask)\n        out = self.wo(out.transpose(1, 2).reshape(bs, t, -1))\n        return out, (xk, xv)",
        kills=("decode.cached_equals_full",),
        where="Attention",
    ),
    Bug(
        "ring-cache-overwritten",
        "rolling",
        "torch.cat([kept[0], xk], 1), torch.cat([kept[1], xv], 1)",
        "torch.cat([kept[0], xk], 1)[:, -max(WINDOW, t) :], torch.cat([kept[1], xv], 1)[:, -max(WINDOW, t) :]",
        kills=("decode.chunks",),
        where="Attention",
    ),
    Bug(
        "position-from-kept-length",
        "rolling",
        "else cache.seen",
        "else cache.layers[0][0].shape[1]",
        kills=("decode.cached_equals_full",),
        where="Rolling",
    ),
]
