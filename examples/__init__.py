"""Short programs that run, and the models they run on."""
