"""How a stranger's module is called: found by trying, and then one way for all."""
