"""Language models that generate: capture with a cache, sessions, sampling, and the formats people serve."""
