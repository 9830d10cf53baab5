"""Bugs of the state dict, of loading and of copying."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "state-outside-checkpoint",
        "plain",
        "self.positions = nn.Parameter(torch.randn(config.max_seq_len, d))",
        'self.register_buffer("positions", torch.randn(config.max_seq_len, d), persistent=False)',
        kills=("state.round_trip",),
        where="Plain",
    ),
    Bug(
        "lenient-load",
        "rotary",
        "def forward(self, input_ids: Tensor, past",
        "def load_state_dict(self, values):\n        own = self.state_dict()\n        fitting = {k: v for k, v in values.items() if k in own and v.shape == own[k].shape}\n        return super().load_state_dict(fitting, strict=False)\n\n    def forward(self, input_ids: Tensor, past",
        kills=("state.strict_load",),
        where="Rotary",
    ),
    Bug(
        "block-shared",
        "rotary",
        "nn.ModuleList([RotaryBlock(config) for _ in range(config.num_layers)])",
        "nn.ModuleList([RotaryBlock(config)] * config.num_layers)",
        kills=("state.depth_adds_parameters",),
        where="Rotary",
    ),
    Bug(
        "parameters-unregistered",
        "rotary",
        "nn.ModuleList([RotaryBlock(config) for _ in range(config.num_layers)])",
        "list([RotaryBlock(config) for _ in range(config.num_layers)])",
        kills=("state.every_parameter_registered",),
        where="Rotary",
    ),
    Bug(
        "tie-lost",
        "rotary",
        "self.head.weight = self.embed.weight",
        "self.head.weight = nn.Parameter(self.embed.weight.clone())",
        kills=("state.tied_weights_stay_tied",),
        where="Rotary",
    ),
    Bug(
        "tie-lost",
        "hub",
        "def forward(\n",
        "def load_state_dict(self, values):\n        return super().load_state_dict(values, assign=True)\n\n    def forward(\n",
        kills=("state.tied_weights_stay_tied",),
        where="Hub",
    ),
    Bug(
        "state-outside-checkpoint",
        "rotary",
        "self.embed = nn.Embedding(config.vocab_size, config.hidden_size)",
        "self.embed = embed = nn.Embedding(config.vocab_size, config.hidden_size)\n        embed.forward = lambda ids: F.embedding(ids, embed.weight)",
        kills=("state.deepcopy",),
        where="Rotary",
    ),
]
