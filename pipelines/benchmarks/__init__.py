"""Speed of the parts, for people: not a stage."""
