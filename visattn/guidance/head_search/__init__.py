"""The search for the heads that a guidance perturbs."""
