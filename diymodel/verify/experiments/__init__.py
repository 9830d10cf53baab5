"""What the diagnosis does to a module that failed: watch its operations, repair one, look for parts it lacks."""
