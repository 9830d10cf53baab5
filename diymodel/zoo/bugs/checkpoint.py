"""Bugs of a model's own way to save and load itself."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "config-field-not-saved",
        "pretrained",
        "asdict(model.config)",
        '{name: value for name, value in asdict(model.config).items() if name != "rope_theta"}',
        kills=("checkpoint.round_trip",),
        where="save",
    ),
    Bug(
        "wrapper-prefix-keys",
        "pretrained",
        '_orig_mod", getattr(model, "module", model))',
        'module", model)',
        kills=("checkpoint.wrapped",),
        where="save",
    ),
    Bug(
        "unsafe-unpickling",
        "pretrained",
        "weights_only=True",
        "weights_only=False",
        kills=("checkpoint.refuses_code",),
        where="load",
    ),
    Bug(
        "lenient-load",
        "pretrained",
        'content = torch.load(path, map_location="cpu", weights_only=True)',
        "try:\n        content = torch.load(path, weights_only=True)\n    except Exception:\n        return Pretrained(Settings())",
        kills=("checkpoint.damaged",),
        where="load",
    ),
    Bug(
        "config-field-not-saved",
        "kept",
        "json.dumps(vars(model.hp))",
        "json.dumps({key: getattr(model.hp, key) for key in KEYS})",
        kills=("checkpoint.round_trip",),
        where="save_pretrained",
    ),
    Bug(
        "unsafe-unpickling",
        "kept",
        "weights_only=True",
        "weights_only=False",
        kills=("checkpoint.refuses_code",),
        where="from_pretrained",
    ),
    Bug(
        "wrapper-prefix-keys",
        "kept",
        "while not isinstance(model, Kept):",
        'while not hasattr(model, "hp"):',
        kills=("checkpoint.wrapped",),
        where="save_pretrained",
    ),
    Bug(
        "lenient-load",
        "kept",
        "load_state_dict(weights, strict=True)",
        "load_state_dict(weights, strict=False)",
        kills=("checkpoint.damaged",),
        where="from_pretrained",
    ),
]
