"""Facts about a model: wrappers, weights, its fingerprint."""
