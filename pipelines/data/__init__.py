"""The data sets: making the demo ones, manifests, checks, cards."""
