"""One small change each that breaks a base; ``diymodel.zoo.bug`` lists and applies them."""
