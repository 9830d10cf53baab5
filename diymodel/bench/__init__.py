"""What a model costs, measured: ``diymodel bench``.

FLOPs are counted and are the same everywhere; seconds are what one machine made of them, taken in turn with what they
are compared with.
"""
