"""Correct models, each a file of its own; ``diymodel.zoo.base`` lists them."""
