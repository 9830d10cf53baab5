"""The properties, one file a concern; every module here registers its checks when it is imported."""
