"""Bugs of the gradient, and of learning."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "gradient-detached",
        "rotary",
        "y = F.scaled",
        "k = k.detach(); keys = keys.detach(); y = F.scaled",
        kills=("gradients.reach_every_parameter",),
        where="RotaryBlock",
    ),
    Bug(
        "masked-row-nan",
        "hub",
        "y = F.dropout(scores.softmax(-1)",
        "allowed = allowed & allowed.diagonal(dim1=2, dim2=3)[..., None]  # padding sees nothing\n        scores = scores + torch.zeros_like(scores).masked_fill(~allowed, -torch.inf)\n        y = F.dropout(scores.softmax(-1).nan_to_num()",
        kills=("gradients.finite",),
        where="HubBlock",
    ),
    Bug(
        "statistic-over-vocabulary",
        "rotary",
        "x = self.embed(input_ids)",
        "x = self.embed(input_ids) * (1 + self.embed.weight.mean())",
        kills=("gradients.absent_tokens_zero",),
        where="Rotary",
    ),
    Bug(
        "gradient-wrong",
        "plain",
        "return self.head(self.encoder(self.embed(x) + self.positions[:T], mask=future))",
        "y = self.head(self.encoder(self.embed(x) + self.positions[:T], mask=future)); return 2 * y.detach() - y",
        kills=("training.small_step_lowers_loss",),
        where="Plain",
    ),
    Bug(
        "statistic-over-sequence",
        "rotary",
        "self.head(self.norm(x))",
        "self.head(self.norm(x.mean(1, keepdim=True).expand_as(x)))",
        kills=("training.overfits_a_tiny_batch",),
        where="Rotary",
    ),
]
